# Cloud TPU slices, through gcloud: a TPU VM of their own, or a queued resource of the same name.
# shellcheck shell=bash disable=SC2034

backend_prepare() {
  local number
  [[ -n $FLAG_ZONE ]] || fail "--backend=tpu needs --zone=ZONE, such as us-west4-a"
  if ! read_slice; then
    [[ -n $FLAG_RUNTIME_VERSION && -n $FLAG_HOSTS ]] ||
      fail "--accelerator-type: $SLICE_FAULT. For one that this launcher does not know, give" \
        "--runtime-version=VERSION and --hosts=NUMBER"
    SLICE_TYPE=$FLAG_ACCELERATOR_TYPE SLICE_COUNT=1
  fi
  ((SLICE_COUNT == 1)) ||
    fail "--accelerator-type=$FLAG_ACCELERATOR_TYPE: --backend=tpu makes one slice; several that" \
      "train together need --backend=gke"
  FLAG_RUNTIME_VERSION=${FLAG_RUNTIME_VERSION:-$SLICE_RUNTIME}
  FLAG_HOSTS=${FLAG_HOSTS:-$SLICE_HOSTS}
  [[ -n $FLAG_RUNTIME_VERSION ]] ||
    fail "--accelerator-type=$FLAG_ACCELERATOR_TYPE is rented through Kubernetes: --backend=gke"
  [[ $FLAG_HOSTS =~ ^[1-9][0-9]*$ ]] ||
    fail "--hosts=$FLAG_HOSTS: --backend=tpu needs the number of machines, or none"
  for ((number = 0; number < FLAG_HOSTS; number++)); do WORKERS+=("$FLAG_NAME-w-$number"); done
  check_shared_workdir
  WORKER_SCRIPT=$FLAG_DIR/worker.sh
  WORKER_DIR=$FLAG_DIR
  FLAG_COORDINATOR=${FLAG_COORDINATOR:-auto}
  read -ra CREATE_FLAGS <<<"$FLAG_CREATE_FLAGS"
  read -ra SSH_FLAGS <<<"$FLAG_SSH_FLAGS"
}

cloud() {
  perform gcloud compute tpus "$@" --zone="$FLAG_ZONE" ${FLAG_PROJECT:+--project="$FLAG_PROJECT"}
}

# gcloud itself tries again, up to ten times, when a connection breaks.
backend_on() {
  cloud tpu-vm ssh "$FLAG_NAME" --worker="$1" --ssh-flag=-oConnectTimeout=20 \
    --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4 "${SSH_FLAGS[@]}" \
    --command="$(quote "${@:2}")"
}

backend_environment() { echo "MEDMOE_COORDINATOR=$FLAG_COORDINATOR"; }

backend_copy() { cloud tpu-vm scp "$@" "$FLAG_NAME:$WORKER_DIR/" --worker=all "${SSH_FLAGS[@]}"; }

backend_ship() { ship_to_workers; }

backend_create() {
  local spot=()
  if [[ $FLAG_SPOT == yes ]]; then spot=(--spot); fi
  if [[ $FLAG_QUEUED == yes ]]; then
    cloud queued-resources create "$FLAG_NAME" --node-id="$FLAG_NAME" "${spot[@]}" \
      --accelerator-type="$SLICE_TYPE" --runtime-version="$FLAG_RUNTIME_VERSION" \
      "${CREATE_FLAGS[@]}" || return
  else
    cloud tpu-vm create "$FLAG_NAME" "${spot[@]}" \
      --accelerator-type="$SLICE_TYPE" --version="$FLAG_RUNTIME_VERSION" \
      "${CREATE_FLAGS[@]}" || return
  fi
  note "every $FLAG_POLL s, until the TPU is READY:"
  wait_until_ready || {
    say "error: $FLAG_NAME was not made ready; delete it before another try"
    return 1
  }
}

# State and hosts of the TPU, and the state of its queued resource; nothing for what is not there.
list_node() {
  cloud tpu-vm list --filter="name~\"(^|/)$FLAG_NAME\$\"" \
    --format='value(state,networkEndpoints.len())'
}

list_request() {
  if [[ $FLAG_QUEUED == yes ]]; then
    cloud queued-resources list --filter="name~\"(^|/)$FLAG_NAME\$\"" --format='value(state.state)'
  fi
}

# Sets node, hosts and request of its caller; fails with $LOST where a question has no answer, which
# must not pass for a TPU that is gone.
look() {
  local found
  if ! found=$(list_node) || ! request=$(list_request); then
    say "error: gcloud does not say how $FLAG_NAME is"
    return "$LOST"
  fi
  read -r node hosts <<<"$found"
}

# Waits while the TPU is being made (or undone); fails with 1 when it will not come by itself.
wait_until_ready() {
  local node hosts request last='' told=''
  if dry; then
    list_node
    list_request
    return
  fi
  while true; do
    look || return
    if [[ $node/$request != "$last" ]]; then
      last=$node/$request
      say "$FLAG_NAME: TPU ${node:-not there}, queued resource ${request:-not there}"
    fi
    case $node/$request in
      READY/*)
        ((hosts == FLAG_HOSTS)) ||
          fail "$FLAG_NAME has $hosts hosts and $FLAG_HOSTS were expected: give --hosts=$hosts"
        return
        ;;
      STOPPED/* | HIDDEN/*) fail "$FLAG_NAME is $node: start it with gcloud, or delete it" ;;
      *ING/* | */*ING | */ACCEPTED | */WAITING_FOR_RESOURCES | /ACTIVE)
        if [[ -z $told ]]; then
          told=yes
          say "waiting for $FLAG_NAME; after Ctrl-C it stays asked for, and is paid for once it is" \
            "there, until: delete"
        fi
        sleep "$FLAG_POLL"
        ;;
      *) return 1 ;;
    esac
  done
}

# The machines, made again where they were taken away.
backend_ensure() {
  local node hosts request code=0 kind='on demand'
  if dry; then
    list_node
    list_request
    note "where they are gone, as after a preemption:"
    backend_delete
    backend_create
    return
  fi
  wait_until_ready || code=$?
  ((code == 1)) || return "$code"
  look || return
  if [[ $FLAG_SPOT == yes ]]; then kind=spot; fi
  say "asking for $FLAG_NAME anew: $SLICE_TYPE, $kind"
  if [[ -n $node$request ]]; then backend_delete || return; fi
  backend_create
}

# Ends the launcher where there are no workers to ask.
backend_status() {
  local node hosts request
  if dry; then
    list_node
    list_request
    return
  fi
  look || exit 1
  echo "$FLAG_NAME: TPU ${node:-not there}, queued resource ${request:-not there}"
  [[ $node == READY ]] || exit 0
}

backend_delete() {
  if [[ $FLAG_QUEUED == yes ]]; then
    cloud queued-resources delete "$FLAG_NAME" --force --quiet
  else
    cloud tpu-vm delete "$FLAG_NAME" --quiet
  fi
}
