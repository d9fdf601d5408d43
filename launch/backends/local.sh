# This machine: several processes, each with simulated CPU devices. medmoe is the one on PATH, or
# that of the checkout's .venv.
# shellcheck shell=bash disable=SC2034

backend_prepare() {
  local number
  FLAG_HOSTS=${FLAG_HOSTS:-2}
  [[ $FLAG_HOSTS =~ ^[1-9][0-9]*$ ]] ||
    fail "--hosts=$FLAG_HOSTS: --backend=local needs the number of processes"
  for ((number = 0; number < FLAG_HOSTS; number++)); do WORKERS+=("local-$number"); done
  WORKER_SCRIPT=$LAUNCH/worker.sh
  WORKER_DIR=$FLAG_LOGS
  PATH=$PATH:$ROOT/.venv/bin
  [[ -n $FLAG_COORDINATOR ]] || FLAG_COORDINATOR=localhost:$(free_port)
}

# A port on which nobody listens, nor on the next one, which medmoe also uses.
free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 10000))
    listens "$port" || listens $((port + 1)) || break
  done
  echo "$port"
}

listens() { (exec 3<>"/dev/tcp/localhost/$1") 2>/dev/null; }

backend_on() { perform "${@:2}"; }

backend_environment() {
  printf '%s\n' "MEDMOE_COORDINATOR=$FLAG_COORDINATOR" "MEDMOE_PROCESSES=$FLAG_HOSTS" \
    "MEDMOE_PROCESS=$1" JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo \
    "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$FLAG_DEVICES"
}

backend_ship() {
  [[ -z $FLAG_ENV_FILE ]] ||
    fail "--env-file=$FLAG_ENV_FILE: processes of --backend=local have the variables of this shell;" \
      "set them there: set -a; . FILE; set +a"
  command -v medmoe >/dev/null ||
    fail "no medmoe on PATH and none in $ROOT/.venv: pip install -e '$ROOT', or make demo"
}

backend_create() { backend_ship; }

backend_ensure() { :; }

backend_status() { :; }

backend_delete() {
  each worker stop "$FLAG_GRACE"
  each worker remove
}
