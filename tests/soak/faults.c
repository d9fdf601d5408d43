// A file system that fails, for one process: load it with LD_PRELOAD.
//
//   FAULTS          file of two numbers, `struct block`, mapped; FAULTS.$MEDMOE_PROCESS, to be exact
//   FAULTS_BELOW    a piece of a path: operations on other files are let be
//
// When `after` operations that change a file have been counted, the next one ends the process with
// SIGKILL (`action` -1), or fails with `action` as errno, as do those after it until `action` is 0.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

struct block {
  int64_t after, action, struck;
};
static struct block *block;
static const char *below;

__attribute__((constructor)) static void begin(void) {
  char path[PATH_MAX];
  const char *faults = getenv("FAULTS"), *process = getenv("MEDMOE_PROCESS");
  below = getenv("FAULTS_BELOW");
  if (!faults || !below || !process) return;
  snprintf(path, sizeof path, "%s.%s", faults, process);
  int file = open(path, O_RDWR | O_CLOEXEC);
  if (file < 0) return;
  void *mapped = mmap(NULL, sizeof *block, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (mapped != MAP_FAILED) block = mapped;
}

// Whether the operation on this path fails; errno is set then.
static int fails(const char *path) {
  if (!block || !block->action || !path || !strstr(path, below)) return 0;
  if (__atomic_fetch_sub(&block->after, 1, __ATOMIC_SEQ_CST) > 0) return 0;
  block->struck++;
  if (block->action < 0) raise(SIGKILL);
  errno = (int)block->action;
  return 1;
}

static int fails_open(int file) {
  char link[64], path[PATH_MAX];
  if (!block || !block->action) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | O_TMPFILE)) { \
    va_list rest; \
    va_start(rest, flags); \
    mode = va_arg(rest, mode_t); \
    va_end(rest); \
  }
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))
#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    MODE(flags) \
    return WRITES(flags) && fails(path) ? -1 : REAL(name)(path, flags, mode); \
  }
#define OPENAT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    MODE(flags) \
    return WRITES(flags) && fails(path) ? -1 : REAL(name)(folder, path, flags, mode); \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define ON_FILE(type, name, parameters, ...) \
  type name parameters { return fails_open(file) ? -1 : REAL(name)(__VA_ARGS__); }
ON_FILE(ssize_t, write, (int file, const void *from, size_t n), file, from, n)
ON_FILE(ssize_t, writev, (int file, const struct iovec *from, int n), file, from, n)
ON_FILE(ssize_t, pwrite, (int file, const void *from, size_t n, off_t at), file, from, n, at)
ON_FILE(ssize_t, pwrite64, (int file, const void *from, size_t n, off64_t at), file, from, n, at)
ON_FILE(int, fsync, (int file), file)
ON_FILE(int, fdatasync, (int file), file)
ON_FILE(int, ftruncate, (int file, off_t n), file, n)
ON_FILE(int, ftruncate64, (int file, off64_t n), file, n)

#define ON_PATH(name, path, parameters, ...) \
  int name parameters { return fails(path) ? -1 : REAL(name)(__VA_ARGS__); }
ON_PATH(rename, to, (const char *from, const char *to), from, to)
ON_PATH(renameat, to, (int a, const char *from, int b, const char *to), a, from, b, to)
ON_PATH(mkdir, path, (const char *path, mode_t mode), path, mode)
ON_PATH(mkdirat, path, (int at, const char *path, mode_t mode), at, path, mode)
ON_PATH(unlink, path, (const char *path), path)
ON_PATH(unlinkat, path, (int at, const char *path, int flags), at, path, flags)
ON_PATH(rmdir, path, (const char *path), path)
