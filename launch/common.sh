# What the verbs and the back ends share. A back end sets, in backend_prepare,
#
#   WORKERS         the name of every worker, in the order of their numbers
#   WORKER_SCRIPT   launch/worker.sh, where the workers see it
#   WORKER_DIR      the folder in which it works
#
# and defines backend_on NUMBER COMMAND... (run on a worker), backend_environment NUMBER (variables
# of medmoe there, one a line), backend_create, backend_ensure (the machines are there, or are made
# again), backend_ship, backend_status and backend_delete.
# shellcheck shell=bash

say() { printf '%s\n' "tpu_run.sh: $*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

dry() { [[ $FLAG_DRY_RUN == yes ]]; }

# A line of the printed plan that is not a command.
note() { if dry; then printf '# %s\n' "$*"; fi; }

# The words as a shell would read them; plain ones as they are.
quote() {
  local word words=()
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then words+=("$word"); else words+=("${word@Q}"); fi
  done
  printf '%s' "${words[*]}"
}

# Run a command, or print it.
perform() {
  if dry; then
    quote "$@"
    echo
  else
    "$@" </dev/null
  fi
}

# A verb of worker.sh on one worker.
worker() { backend_on "$1" bash "$WORKER_SCRIPT" "$2" "$WORKER_DIR" "$1" "${@:3}"; }

# COMMAND NUMBER ARGUMENTS... for all workers at once; fails when it fails for one, with $LOST where ssh
# says so.
each() {
  local number code failed=0 processes=()
  for number in "${!WORKERS[@]}"; do
    if dry; then
      "$1" "$number" "${@:2}"
    else
      "$1" "$number" "${@:2}" &
      processes[number]=$!
    fi
  done
  for number in "${!processes[@]}"; do
    code=0
    wait "${processes[number]}" || code=$?
    if ((code)); then
      say "worker $number (${WORKERS[number]}): failed with status $code"
      if ((failed == 0 || code == LOST)); then failed=$((code == LOST ? LOST : 1)); fi
    fi
  done
  return "$failed"
}

# For a worker, before worker.sh is there: its folder, private, and made by this launcher. The worker
# says what is wrong with it: here gcloud's own failures have the same status.
# shellcheck disable=SC2016
CLAIM='{ test -e "$1/.tpu_run" || { mkdir -p "$(dirname "$1")" && mkdir "$1" && touch "$1/.tpu_run"; } || { echo "--dir=$1 cannot be made, or is there and was not made by this launcher: give another" >&2; exit 1; }; } && chmod 700 "$1" && rm -f "$1/env"'

# What a launcher that was killed has left on this machine.
sweep() {
  local scratch process
  for scratch in "${TMPDIR:-/tmp}"/tpu_run.[0-9]*.*; do
    process=${scratch##*/tpu_run.}
    process=${process%%.*}
    if [[ -d $scratch && -O $scratch && ! -L $scratch ]] && ! kill -0 "$process" 2>/dev/null; then
      rm -rf -- "$scratch"
    fi
  done
}

# The tracked files as they are now, uncommitted changes too, as FILE ('' for none); sets CODE to
# the hash of their content. Git's objects are made beside the repository, which stays as it was.
pack_code() {
  local scratch changes
  git -C "$ROOT" rev-parse HEAD >/dev/null ||
    fail "$ROOT must be a git checkout: its tracked files are sent"
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/tpu_run.$$.XXXXXX")
  CODE=$(
    cd "$ROOT" || exit
    objects=$(git rev-parse --path-format=absolute --git-path objects)
    cp "$(git rev-parse --git-path index)" "$scratch/index" && mkdir "$scratch/objects" || exit
    export GIT_INDEX_FILE=$scratch/index GIT_OBJECT_DIRECTORY=$scratch/objects
    export GIT_ALTERNATE_OBJECT_DIRECTORIES=$objects
    git add --update && tree=$(git write-tree) &&
      git archive --format=tar.gz --output="$scratch/code.tar.gz" "$tree" && echo "${tree:0:12}"
  ) || fail "the tracked files of $ROOT cannot be packed"
  if [[ -n $1 ]]; then mv "$scratch/code.tar.gz" "$1" || fail "$1 cannot be written"; fi
  rm -rf "$scratch"
  changes=$(git -C "$ROOT" status --short)
  if [[ -n $changes ]]; then
    say "code $CODE, with these changes (files marked ?? are not sent):"$'\n'"$changes"
  fi
}

# Code and worker.sh on every worker, by backend_copy FILE..., and installed there; fails where a
# worker could not do its part.
ship_to_workers() {
  local files=("$FLAG_LOGS/ship/code.tar.gz" "$LAUNCH/worker.sh") code=0
  if dry; then
    pack_code ''
    note "pack the tracked files of $ROOT into ${files[0]}: code $CODE"
  else
    mkdir -p "$FLAG_LOGS/ship" || fail "--logs=$FLAG_LOGS cannot be made"
    pack_code "$FLAG_LOGS/ship/code.tar.gz"
  fi
  if [[ -n $FLAG_ENV_FILE ]]; then
    # Under the name that worker.sh reads; scp follows the link.
    files+=("$FLAG_LOGS/ship/env")
    perform ln -sfn "$(realpath "$FLAG_ENV_FILE")" "$FLAG_LOGS/ship/env"
  fi
  each backend_on sh -c "$CLAIM" sh "$WORKER_DIR" || return
  if [[ -n $FLAG_ENV_FILE ]]; then
    # A copy keeps the mode of a file that is there.
    each backend_on install -m 600 /dev/null "$WORKER_DIR/env" || return
  fi
  backend_copy "${files[@]}" &&
    each worker install "$CODE" "$FLAG_PYTHON" "$FLAG_PACKAGES" "$FLAG_SETUP" || code=$?
  if [[ -n $FLAG_ENV_FILE ]]; then each backend_on rm -f "$WORKER_DIR/env" || code=$?; fi
  return "$code"
}

# The value of --workdir among the arguments of medmoe, the last one as it takes it; '' where there is
# none.
workdir() {
  local number path=''
  for number in "${!ARGUMENTS[@]}"; do
    case ${ARGUMENTS[number]} in
      --workdir=*) path=${ARGUMENTS[number]#*=} ;;
      --workdir) path=${ARGUMENTS[number + 1]-} ;;
    esac
  done
  printf '%s\n' "$path"
}

# What is no path of a machine, as storage/places.py reads it.
SCHEME='^[A-Za-z][A-Za-z0-9+.-]*:/'

# What the workers cannot use is said here.
check_workdir_scheme() {
  local path
  path=$(workdir)
  [[ ! $path =~ $SCHEME || $path == gs://* || ($path == s3://* && ${#WORKERS[@]} == 1) ]] ||
    fail "--workdir=$path: several workers write to a disk that all share, or to gs://; one alone" \
      "also to s3://"
}

# What --accelerator-type means, by whichever of its names it is given: SLICE_NAME, _LAYOUT, _COUNT,
# _CHIPS, _HOSTS, _TYPE (Google Cloud's name), _RUNTIME, _ACCELERATOR and _MACHINE (GKE's words).
# Fails, with SLICE_FAULT, where nothing is called so.
read_slice() {
  local told key value
  command -v python3 >/dev/null || fail "python3 is needed on this machine: it knows the slices"
  told=$(PYTHONPATH=$ROOT python3 -m medmoe_jax.parallel.slices "$FLAG_ACCELERATOR_TYPE" 2>&1) || {
    # shellcheck disable=SC2034  # for the back ends
    SLICE_FAULT=$told
    return 1
  }
  while IFS='=' read -r key value; do printf -v "SLICE_$key" '%s' "$value"; done <<<"$told"
}

# For machines of their own: they share no current folder, and new code replaces the old one's.
check_shared_workdir() {
  local path
  path=$(workdir)
  [[ -z $path || $path == /* || $path =~ $SCHEME ]] ||
    fail "--workdir=$path: --backend=$FLAG_BACKEND needs an absolute path, on storage that all" \
      "workers share and that outlives them"
}
