#!/usr/bin/env bash
# One entry point for pods: create machines, start one medmoe command on all of them, follow it, and
# start it again until it is done. See launch/README.md, or launch/tpu_run.sh --help.
set -euo pipefail

# Before anything that an older bash does not read, such as 3.2 of macOS.
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "tpu_run.sh: error: bash $BASH_VERSION is too old: 5.1 or later is needed" >&2
  exit 1
fi
shopt -s inherit_errexit

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$LAUNCH")

# shellcheck source=common.sh
source "$LAUNCH/common.sh"
# shellcheck source=watch.sh
source "$LAUNCH/watch.sh"

VERBS='create  rent the machines and wait until they are ready
ship    send the code and install it, with its own environment, once per version of the code
run     ship where needed, start medmoe on all workers, follow it; ends with its exit status
resume  run again, on new machines where the old ones are gone, until the job is done
status  the machines and the job of every worker
logs    the last lines of every worker, or of one; go on with --follow
stop    ask medmoe to save and end on all workers; end it after --grace seconds
delete  give the machines back; gke, ssh, local: stop, and remove what was made or installed'

# flag|default|meaning. yes or no as default makes a switch: --spot is --spot=yes.
FLAGS='backend|tpu|tpu (Cloud TPU through gcloud), gke (a cluster you have), ssh (hosts you have) or local
name|medmoe|the name of the TPU and of its queued resource; gke: of the JobSet
zone||tpu: zone, such as us-west4-a; always needed
project||tpu: project; empty: the one gcloud is set to
accelerator-type|v5litepod-16|tpu, gke: slice, by any of its names: v5litepod-16, v5e-16, v5e:4x4; gke: 2xv5e-16
runtime-version||tpu: software of the machines; empty: the usual one of the slice
spot|no|tpu, gke: cheaper machines that can be taken away at any time
queued|yes|tpu: wait in the queue for machines; no: take them now or fail
create-flags||tpu: more flags for the gcloud command that creates, such as --network=N
ssh-flags||tpu: more flags for gcloud tpu-vm ssh and scp, such as --internal-ip
hosts||ssh: host,host,...; local: how many processes (2); tpu, gke: how many, if not as usual
image||gke: image with medmoe, REGISTRY/NAME:TAG; without a tag it is built of this checkout
context||gke: cluster, as kubectl config get-contexts names it; empty: the current one
namespace|default|gke: namespace
service-account||gke: service account of the pods, such as one that may use gs://
volumes||gke: claims that the pods mount, CLAIM:/PATH ...
devices|4|local: simulated CPU devices of each process
coordinator||tpu, ssh, local: where processes meet; empty: tpu auto, ssh port 8476 of the first host, local any
dir|medmoe-run|tpu, ssh: folder on the workers, from the home folder, for code and logs
setup||tpu, ssh: shell command on every worker before each start, such as a mount
python|3.12|tpu, ssh, gke: Python of the environment or image; uv fetches it where it is missing
packages|-e .[tpu]|tpu, ssh, gke: what is installed in it, as pip takes it
env-file||tpu, ssh, gke: file of VAR=value lines for medmoe, such as tokens; never printed
logs|runs/launch|folder on this machine; worker-N.log holds what this launcher saw
worker|all|logs: number of one worker, or all
lines|50|logs: how many lines back
follow|no|logs: go on as lines are written
grace|60|seconds between asking medmoe to end and ending it
max-restarts|3|resume: give up after so many starts in a row that saved nothing new; gke: so many failures
poll|20|resume: seconds before the next try; tpu: between looks at machines being made; gke: at the job
dry-run|no|print the commands, one a line and quoted for a shell, and do nothing; gke: the manifest'

usage() {
  local verb flag default meaning
  echo "usage: launch/tpu_run.sh VERB [--FLAG=VALUE ...] [-- ARGUMENTS OF medmoe, UNTOUCHED]"
  printf '\nverbs:\n'
  while read -r verb meaning; do printf '  %-8s %s\n' "$verb" "$meaning"; done <<<"$VERBS"
  printf '\nflags, the variables that set their defaults, and the defaults:\n'
  while IFS='|' read -r flag default meaning; do
    printf '  --%-17s %-26s %-13s %s\n' "$flag" "$(environment_name "$flag")" "$default" "$meaning"
  done <<<"$FLAGS"
  printf '\n%s\n%s\n%s\n' \
    'exit status of run and resume: 0 done, 1 or 2 bad input, 74 storage failed, 75 saved after a' \
    'preemption notice, 130 stopped, 255 a worker was lost, otherwise that of the worker that ended' \
    'first.'
}

environment_name() {
  local name=${1//-/_}
  echo "TPU_RUN_${name^^}"
}

# Each flag becomes the variable FLAG_NAME; SWITCHES holds the names of those that are yes or no.
read_defaults() {
  local flag default variable
  while IFS='|' read -r flag default _; do
    variable=$(environment_name "$flag")
    if [[ $default == yes || $default == no ]]; then SWITCHES+=" $flag "; fi
    set_flag "$flag" "${!variable-$default}"
  done <<<"$FLAGS"
}

set_flag() {
  local name=${1//-/_}
  if [[ $SWITCHES == *" $1 "* && $2 != yes && $2 != no ]]; then
    fail "--$1=$2: yes or no is needed"
  fi
  printf -v "FLAG_${name^^}" '%s' "$2"
}

read_command_line() {
  local flag
  while (($#)); do
    flag=${1%%=*}
    flag=${flag#--}
    case $1 in
      --) ARGUMENTS=("${@:2}") && return ;;
      -h | --help) usage && exit ;;
      --*)
        [[ $flag =~ ^[a-z-]+$ && $'\n'$FLAGS == *$'\n'"$flag|"* ]] ||
          fail "unknown flag --$flag; --help lists them (arguments of medmoe come after --)"
        [[ $1 == *=* || $SWITCHES == *" $flag "* ]] || fail "--$flag needs a value: --$flag=VALUE"
        if [[ $1 == *=* ]]; then set_flag "$flag" "${1#*=}"; else set_flag "$flag" yes; fi
        ;;
      *)
        [[ -z $VERB ]] || fail "'$1' after the verb '$VERB': arguments of medmoe come after --"
        VERB=$1
        ;;
    esac
    shift
  done
}

check_flags() {
  local name
  for name in DEVICES LINES GRACE MAX_RESTARTS POLL; do
    local variable=FLAG_$name
    [[ ${!variable} =~ ^[1-9][0-9]*$ ]] ||
      fail "--${name,,}=${!variable}: a whole number of at least 1 is needed"
  done
  [[ $FLAG_BACKEND =~ ^(tpu|gke|ssh|local)$ ]] ||
    fail "--backend=$FLAG_BACKEND: tpu, gke, ssh or local"
  [[ $FLAG_NAME =~ ^[a-z][a-z0-9-]*$ ]] ||
    fail "--name=$FLAG_NAME: lower-case letters, digits and hyphens, a letter first"
  local part='[A-Za-z0-9_][A-Za-z0-9_.-]*'
  [[ $FLAG_DIR =~ ^$part(/$part)*$ ]] ||
    fail "--dir=$FLAG_DIR: a folder below the home folder; its names begin with a letter, a digit or" \
      "_, and consist of these and of . and -"
  [[ -z $FLAG_ENV_FILE ]] || check_env_file
  if [[ $VERB == run || $VERB == resume ]]; then
    ((${#ARGUMENTS[@]})) ||
      fail "$VERB needs the arguments of medmoe: $VERB ... -- train --config=..."
  fi
}

# A shell reads the file where the job begins: what it would take for more than a value is refused.
# The lines are secret and not shown.
check_env_file() {
  [[ -r $FLAG_ENV_FILE && ! -d $FLAG_ENV_FILE ]] || fail "--env-file=$FLAG_ENV_FILE cannot be read"
  local line number=0 value="('[^']*'|\"[^\"\$\`\\]*\"|[]A-Za-z0-9_./:@%+,=^#[-]*)"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line != *$'\r' ]] ||
      fail "--env-file=$FLAG_ENV_FILE, line $number: ends with a carriage return; convert the file"
    [[ $line =~ ^[[:blank:]]*(#.*)?$ ||
      $line =~ ^[[:blank:]]*(export )?[A-Za-z_][A-Za-z0-9_]*=$value([[:blank:]]+(#.*)?)?$ ]] ||
      fail "--env-file=$FLAG_ENV_FILE, line $number: write VAR=value, and the value in single quotes" \
        "where it has other signs than letters, digits and _ . / : @ % + , = ^ # [ ] -"
  done <"$FLAG_ENV_FILE"
}

VERB='' SWITCHES='' ARGUMENTS=()
read_defaults
read_command_line "$@"
[[ -n $VERB ]] || { usage >&2 && exit 1; }
[[ $VERB =~ ^[a-z]+$ && $'\n'$VERBS == *$'\n'"$VERB "* ]] ||
  fail "unknown verb '$VERB'; --help lists them"
check_flags
dry || sweep

# shellcheck source=backends/tpu.sh
source "$LAUNCH/backends/$FLAG_BACKEND.sh"
backend_prepare
check_workdir_scheme

case $VERB in
  create) backend_create ;;
  ship) backend_ship ;;
  run | resume | status | logs | stop) "verb_$VERB" ;;
  delete) backend_delete ;;
esac
