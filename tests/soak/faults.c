// A file system that fails and a clock that is wrong, for one process: load it with LD_PRELOAD.
//
//   FAULTS          FAULTS.$MEDMOE_PROCESS is the file of the numbers of `struct block`, mapped
//   FAULTS_BELOW    a piece of a path: operations on other files are let be
//
// When `after` operations that change a file have been counted, the next one ends the process with
// SIGKILL (`action` -1), or fails with `action` as errno, as do those after it until `action` is 0.
// The time of day is `clock` seconds off the machine's.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct block {
  int64_t after, action, struck, clock;
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

static int64_t off(clockid_t clock) {
  return block && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) ? block->clock : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int status = REAL(clock_gettime)(clock, now);
  if (!status) now->tv_sec += off(clock);
  return status;
}

int gettimeofday(struct timeval *now, void *zone) {
  int status = REAL(gettimeofday)(now, zone);
  if (!status) now->tv_sec += off(CLOCK_REALTIME);
  return status;
}

time_t time(time_t *into) {
  time_t now = REAL(time)(NULL) + off(CLOCK_REALTIME);
  return into ? *into = now : now;
}

// Waits until a time of day are the kernel's, which knows nothing of this clock.
static struct timespec machine(const struct timespec *until) {
  return (struct timespec){until->tv_sec - off(CLOCK_REALTIME), until->tv_nsec};
}

int pthread_cond_timedwait(pthread_cond_t *one, pthread_mutex_t *held, const struct timespec *at) {
  struct timespec until = machine(at);
  return REAL(pthread_cond_timedwait)(one, held, &until);
}

int sem_timedwait(sem_t *one, const struct timespec *at) {
  struct timespec until = machine(at);
  return REAL(sem_timedwait)(one, &until);
}

long syscall(long number, ...) {
  long given[6];
  struct timespec until;
  va_list rest;
  va_start(rest, number);
  for (int i = 0; i < 6; i++) given[i] = va_arg(rest, long);
  va_end(rest);
  if (number == SYS_futex && (given[1] & FUTEX_CLOCK_REALTIME) && given[3]) {
    until = machine((const struct timespec *)given[3]);
    given[3] = (long)&until;
  }
  return REAL(syscall)(number, given[0], given[1], given[2], given[3], given[4], given[5]);
}
