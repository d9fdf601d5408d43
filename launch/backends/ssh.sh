# Hosts that are there already, by ssh: keys, users and ports are the business of ~/.ssh/config.
# shellcheck shell=bash disable=SC2034

SSH_OPTIONS=(-oBatchMode=yes -oConnectTimeout=20 -oServerAliveInterval=15 -oServerAliveCountMax=4)

backend_prepare() {
  local host
  IFS=, read -ra WORKERS <<<"$FLAG_HOSTS"
  ((${#WORKERS[@]})) || fail "--backend=ssh needs --hosts=HOST,HOST,..."
  for host in "${WORKERS[@]}"; do
    [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.@-]*$ ]] || fail "--hosts: '$host' is no name of a host"
  done
  check_shared_workdir
  WORKER_SCRIPT=$FLAG_DIR/worker.sh
  WORKER_DIR=$FLAG_DIR
  [[ -n $FLAG_COORDINATOR ]] || FLAG_COORDINATOR=${WORKERS[0]#*@}:8476
}

backend_on() { perform ssh "${SSH_OPTIONS[@]}" "${WORKERS[$1]}" "$(quote "${@:2}")"; }

backend_environment() {
  echo "MEDMOE_COORDINATOR=$FLAG_COORDINATOR"
  if [[ $FLAG_COORDINATOR != auto ]]; then
    printf '%s\n' "MEDMOE_PROCESSES=${#WORKERS[@]}" "MEDMOE_PROCESS=$1"
  fi
}

backend_copy() { each copy_to_host "$@"; }

copy_to_host() { perform scp -q "${SSH_OPTIONS[@]}" "${@:2}" "${WORKERS[$1]}:$WORKER_DIR/"; }

backend_ship() { ship_to_workers; }

# Nothing to rent: they answer, or not.
backend_create() { each backend_on true; }

backend_ensure() { backend_create; }

backend_status() { :; }

backend_delete() {
  each worker stop "$FLAG_GRACE"
  each worker remove
}
