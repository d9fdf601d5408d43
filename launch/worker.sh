#!/usr/bin/env bash
# Works on each worker for tpu_run.sh: installs the code that was sent, and keeps one job, detached
# from whoever started it.
#
#   worker.sh VERB DIR NUMBER ...
#
#   DIR/code/HASH/       the code and its .venv; DIR/current points at the one in use
#   DIR/worker-NUMBER/   the job: command, log, pid (medmoe), group (all its processes), lock (held
#                        while one of them lives), stopped (it was asked to end), status (its end),
#                        env (variables for medmoe; gone when the job ends), env.next (those of
#                        the next start: the job that runs may end before it)
#
# Every folder that the launcher makes holds a file .tpu_run, and it removes none without it.
#
# TPU_RUN_DEVICE_FILES holds the patterns of device files that only one job may have open.
# shellcheck disable=SC2329  # main calls the verbs by their names
set -euo pipefail

say() { printf 'worker %s (%s): %s\n' "$number" "$(hostname)" "$*"; }

fail() {
  say "error: $*" >&2
  exit 11
}

# A folder of this launcher's, made where it is not there.
make_own() { # FOLDER
  if [[ ! -e $1 ]]; then
    mkdir -p "$1" && chmod 700 "$1" && touch "$1/.tpu_run"
  fi
  [[ -e $1/.tpu_run && ! -L $1 ]] || fail "$1 was not made by this launcher: move it away"
}

remove_own() { # FOLDER
  [[ -e $1 || -L $1 ]] || return 0
  make_own "$1"
  rm -rf -- "$1"
}

# The lock goes when the last process of the job is gone, however it went.
running() { [[ -e $job/lock ]] && ! flock --nonblock "$job/lock" true; }

install() { # HASH PYTHON PACKAGES SETUP
  local code=$dir/code/$1 uv=$dir/uv/bin/uv packages
  take_environment
  [[ -z $4 ]] || bash -c "$4" || fail "--setup ended with status $?"
  exec 8>"$dir/install.lock"
  flock 8 # workers may share their home folder
  if [[ ! -e $code/.installed ]]; then
    ! running || fail "a job of other code is running here: stop it first"
    remove_own "$dir/code" # an environment takes gigabytes: only one is kept
    make_own "$dir/code"
    mkdir "$code"
    tar --extract --gzip --file="$dir/code.tar.gz" --directory="$code"
    make_own "$dir/uv"
    [[ -x $uv ]] || python3 -m pip install --quiet --target="$dir/uv" uv
    uv=$(realpath "$uv")
    read -ra packages <<<"$3"
    (
      cd "$code"
      "$uv" venv --quiet --python "$2" .venv
      "$uv" pip install --quiet --python .venv "${packages[@]}"
    )
    touch "$code/.installed"
    say "installed code $1"
  fi
  ln -sfn "code/$1" "$dir/current"
}

# The variables that were sent become this worker's own; its folder may be that of others, too.
take_environment() {
  make_own "$job"
  rm -f "$job/env.next"
  if [[ -e $dir/env ]]; then (umask 077 && cat "$dir/env" >"$job/env.next"); fi
}

# A TPU serves one process; where one of an earlier job still has it, libtpu's error hides that.
check_devices() {
  local pattern find=(find) tests=() link process
  for pattern in ${TPU_RUN_DEVICE_FILES:-/dev/accel* /dev/vfio/*}; do
    tests+=(-o -lname "$pattern")
  done
  if sudo -n true 2>/dev/null; then find=(sudo -n find); fi # processes of other users, too
  # find complains of processes that end while it looks.
  link=$("${find[@]}" /proc/[0-9]*/fd "${tests[@]:1}" 2>/dev/null | head -n 1) || true
  [[ -n $link ]] || return 0
  process=$(cut -d / -f 3 <<<"$link")
  fail "the TPU is held by process $process ($(tr '\0' ' ' <"/proc/$process/cmdline")), which" \
    "is no job of this launcher's: end it on this host (kill $process), then run again"
}

start() { # VARIABLE=VALUE ... -- ARGUMENTS
  local environment=()
  while [[ $1 != -- ]]; do
    environment+=("$1")
    shift
  done
  shift
  make_own "$job"
  trap 'rm -f "$job/env.next"' EXIT # where the job does not begin
  if running; then
    [[ $(cat "$job/command") == "${*@Q}" ]] ||
      fail "another job is running here: medmoe $(cat "$job/command"); stop it first"
    exit 10
  fi
  [[ " ${environment[*]} " == *" JAX_PLATFORMS=cpu "* ]] || check_devices
  rm -f "$job"/{pid,group,stopped,status,env}
  if [[ -e $job/env.next ]]; then mv "$job/env.next" "$job/env"; fi
  printf '%s' "${*@Q}" >"$job/command"
  (setsid bash "$0" keep "$dir" "$number" "${environment[@]}" -- "$@" </dev/null >"$job/log" 2>&1 &)
  for _ in {1..100}; do
    if [[ -s $job/pid ]]; then return; fi
    sleep 0.1
  done
  fail "the job did not start within 10 s: $(cat "$job/log")"
}

# The detached parent of medmoe: notes how it ended, and ends what it left behind.
keep() { # VARIABLE=VALUE ... -- ARGUMENTS
  local environment=() code=0
  while [[ $1 != -- ]]; do
    environment+=("$1")
    shift
  done
  exec 9>"$job/lock"
  flock --nonblock 9
  echo "$$" >"$job/group"
  (run_medmoe "${@:2}") >"$job/log" 2>&1 || code=$?
  rm -f "$job/env"
  if [[ -e $job/stopped ]]; then code=130; fi
  echo "$code" >"$job/status.new"
  mv "$job/status.new" "$job/status"
  kill -KILL -- "-$$" # this process too
}

# Becomes medmoe, in the code where it was sent, here otherwise; knows `environment` of keep.
run_medmoe() {
  echo "$BASHPID" >"$job/pid"
  if [[ -e $job/env ]]; then
    set -a
    # shellcheck source=/dev/null
    . "$job/env" || exit
    set +a
  fi
  enter_code
  exec env "${environment[@]}" medmoe "$@"
}

# Where medmoe is first in PATH: the code that was sent, or here.
enter_code() {
  if [[ -e $dir/current ]]; then
    cd "$dir/current" || exit
    PATH=$PWD/.venv/bin:$PATH
  fi
}

# The log so far and from now on until the job ends, and then its status.
attach() {
  local status=137 # where not even its parent lived to note it
  [[ -s $job/pid ]] || fail "no job was started here"
  tail --lines=+1 --sleep-interval=0.2 --follow --pid="$(cat "$job/pid")" "$job/log"
  while [[ ! -e $job/status ]] && kill -0 "$(cat "$job/group")" 2>/dev/null; do sleep 0.1; done
  if [[ -e $job/status ]]; then status=$(cat "$job/status"); fi
  if [[ -n $(tail --bytes=1 "$job/log") ]]; then echo; fi # its last line had no end
  echo "== ended with status $status"
}

status() {
  local state
  if [[ ! -s $job/pid ]]; then
    say "no job was started here"
    return
  elif running; then
    state="running since $(date -r "$job/pid" '+%F %T'), process $(cat "$job/pid")"
  elif [[ -e $job/status ]]; then
    state="ended with status $(cat "$job/status") at $(date -r "$job/status" '+%F %T')"
  else
    state="killed, with no time to note a status"
  fi
  say "$state"
  say "  medmoe $(cat "$job/command")"
  # A progress bar writes its line again and again, after a carriage return.
  say "  $(tail --lines=1 "$job/log" | sed 's/.*\r//')"
}

log() { # LINES FOLLOW
  [[ -e $job/log ]] || fail "no job was started here"
  if [[ $2 == yes ]]; then
    tail --lines="$1" --sleep-interval=0.2 --follow --pid="$(cat "$job/pid")" "$job/log"
  else
    tail --lines="$1" "$job/log"
  fi
}

stop() { # GRACE
  if ! running; then
    rm -f "$job"/env{,.next} # of a job that was killed with its parent, or never started
    return
  fi
  touch "$job/stopped"
  kill -TERM "$(cat "$job/pid")" 2>/dev/null || true # its children are medmoe's own to end
  for ((tenths = 0; tenths < $1 * 10; tenths++)); do
    running || break
    sleep 0.1
  done
  if running; then
    say "the job did not end within $1 s: killed"
    kill -KILL -- "-$(cat "$job/group")"
    while running; do sleep 0.1; done
  fi
  rm -f "$job"/env{,.next}
}

# One line that changes with every checkpoint and every finished stage of a work directory.
saved() { # WORKDIR
  local folder=$1 python
  if [[ $folder == gs://* || $folder == s3://* ]]; then
    enter_code
    # Of a program that is a link, such as one that pipx makes, Python lies where that leads.
    python=$(dirname "$(realpath "$(command -v medmoe)")")/python
    [[ -x $python ]] || python=python3
    "$python" -m medmoe_jax.checkpoints.saves "$folder"
    return
  fi
  if [[ $folder =~ ^~(/|$) ]]; then folder=$HOME${folder:1}; fi # as medmoe reads it
  if [[ -d $folder/stages ]]; then
    cd "$folder/stages"
    find . -maxdepth 4 '(' -name SEAL.json -o -name manifest.json ')' | sort | cksum
  fi
}

remove() {
  ! running || fail "the job is still running"
  remove_own "$job"
  # What `install` and the copies before it left.
  if [[ -e $dir/.tpu_run ]]; then
    remove_own "$dir/code"
    remove_own "$dir/uv"
    rm -f "${dir:?}"/{current,env,code.tar.gz,install.lock,worker.sh}
    # The marker stays while another worker's folder does.
    if [[ -z $(find "$dir" -mindepth 1 ! -name .tpu_run -print -quit) ]]; then
      rm -f "$dir/.tpu_run"
    fi
  fi
  if [[ -d $dir ]]; then rmdir --ignore-fail-on-non-empty "$dir"; fi
}

main() {
  local verb=$1
  dir=$2 number=$3 job=$2/worker-$3
  case $verb in
    install | start | keep | attach | status | log | stop | saved | remove) "$verb" "${@:4}" ;;
    *) fail "unknown verb '$verb'" ;;
  esac
}

# On one line, which bash reads whole: this file may be replaced while a job runs.
main "$@"; exit
