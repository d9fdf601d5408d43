# Start the job, follow it, and start it again.
# shellcheck shell=bash

# worker.sh's status for a job that runs already, from the same command.
ALREADY_RUNNING=10
STOPPED=130
LOST=255

# The processes of this launcher that are starting a job, by worker, and the workers of those that
# follow one.
STARTING=()
declare -A ATTACHED=()

start_worker() {
  local environment
  mapfile -t environment < <(backend_environment "$1")
  worker "$1" start "${environment[@]}" -- "${ARGUMENTS[@]}"
}

# The job on all workers; where all of them run it already, as after a lost connection, it stays.
start() {
  local number code bad=0 running=0
  if dry; then
    each start_worker
    return
  fi
  for number in "${!WORKERS[@]}"; do
    start_worker "$number" &
    STARTING[number]=$!
  done
  for number in "${!WORKERS[@]}"; do
    code=0
    wait "${STARTING[number]}" || code=$?
    case $code in
      0) ;;
      "$ALREADY_RUNNING") running=$((running + 1)) ;;
      *)
        say "worker $number (${WORKERS[number]}): could not start, status $code"
        bad=$code
        ;;
    esac
  done
  STARTING=()
  if ((running == ${#WORKERS[@]})); then
    say "this job runs already: following it"
  elif ((running || bad)); then
    say "not all workers started together: stopping those that did"
    each worker stop "$FLAG_GRACE" || return "$LOST"
    ((bad)) || each start_worker || bad=$LOST
  fi
  return "$bad"
}

# One worker's log into LOGS/worker-N.log, worker 0's on the terminal too, until its job ends; ends
# with the job's status.
attach() {
  local copy=$FLAG_LOGS/worker-$1.log
  if dry; then
    worker "$1" attach
  elif (($1 == 0)); then
    worker 0 attach 2>&1 | tee -a "$copy"
  else
    worker "$1" attach >>"$copy" 2>&1
  fi
}

in_words() {
  case $1 in
    75) echo "saved and ended after a preemption notice (status 75)" ;;
    "$STOPPED") echo "was told to stop (status $STOPPED)" ;;
    "$LOST") echo "was lost: the connection ended and could not be made again" ;;
    129 | 1[3-9]?) echo "was killed by signal $(($1 - 128))" ;;
    *) echo "ended with status $1" ;;
  esac
}

report() {
  local copy=$FLAG_LOGS/worker-$1.log
  say "worker $1 (${WORKERS[$1]}) $(in_words "$2"); its last lines, of $copy:"
  tac "$copy" | sed '/^== worker/q' | head -n 20 | tac | sed 's/^/    /' >&2
}

interrupted() {
  trap - INT TERM
  say "stopping the job on all workers (again to leave it to itself)"
  # What has not begun cannot be stopped.
  if ((${#STARTING[@]})); then wait "${STARTING[@]}" || true; fi
  each worker stop "$FLAG_GRACE" || say "some workers could not be told; see: status"
  exit "$STOPPED"
}

# Follow all workers. At the first that ends otherwise than with 0 the others are stopped, and its
# status is the result; $LOST when one of the others cannot be reached any more.
watch_job() {
  local number process code=0 title
  if dry; then
    each attach
    return
  fi
  mkdir -p "$FLAG_LOGS"
  for number in "${!WORKERS[@]}"; do
    title="== worker $number, $(date '+%F %T'): medmoe $(quote "${ARGUMENTS[@]}")"
    echo "$title" >>"$FLAG_LOGS/worker-$number.log"
    set -m # a process group each, so that all of a lost connection can be ended
    attach "$number" </dev/null &
    set +m
    ATTACHED[$!]=$number
  done
  while ((${#ATTACHED[@]} && code == 0)); do
    wait -n -p process "${!ATTACHED[@]}" || code=$?
    number=${ATTACHED[$process]}
    unset "ATTACHED[$process]"
  done
  if ((code)); then
    report "$number" "$code"
    stop_others || code=$LOST
  fi
  return "$code"
}

# Stop the workers that are still followed; fails when one of them cannot be reached.
stop_others() {
  local process number lost=0
  declare -A stopping=()
  for process in "${!ATTACHED[@]}"; do
    worker "${ATTACHED[$process]}" stop "$FLAG_GRACE" &
    stopping[$process]=$!
  done
  for process in "${!stopping[@]}"; do
    number=${ATTACHED[$process]}
    if wait "${stopping[$process]}"; then
      wait "$process" || true # its status is that of a stopped job
      unset "ATTACHED[$process]"
    else
      say "worker $number (${WORKERS[number]}) cannot be reached"
      lost=1
    fi
  done
  leave
  return "$lost"
}

# End what follows the workers; their jobs go on.
leave() {
  local process
  for process in "${!ATTACHED[@]}"; do kill -- "-$process" 2>/dev/null || true; done
  ATTACHED=()
}

# One start of the job; returns its status.
attempt() {
  local code=0
  trap interrupted INT TERM
  trap 'exit 129' HUP # the terminal is gone; the job stays
  trap leave EXIT
  if start; then watch_job || code=$?; else code=$?; fi
  trap - INT TERM HUP
  return "$code"
}

# What the work directory holds, as one line that changes with every save.
saved() {
  local path
  path=$(workdir)
  if [[ -n $path ]]; then worker 0 saved "$path"; fi
}

resume() {
  local before='' now code fruitless=0 starts=0
  while true; do
    backend_ensure
    backend_ship
    if dry; then
      saved
      attempt
      note "and all of it again until the status is 0, 1 or 2 (bad input), or $STOPPED (stopped), or" \
        "$FLAG_MAX_RESTARTS starts in a row saved nothing new"
      return
    fi
    now=$(saved)
    fruitless=$((fruitless + 1))
    if ((starts == 0)) || [[ $now != "$before" ]]; then fruitless=0; fi
    if ((fruitless == FLAG_MAX_RESTARTS)); then
      say "giving up: $fruitless starts in a row saved nothing new; the last one had status $code"
      return "$code"
    fi
    before=$now starts=$((starts + 1)) code=0
    say "start $starts"
    attempt || code=$?
    case $code in
      0) say "done after $starts starts" && return ;;
      1 | 2) # a message for a person, or of the parser of the command line
        say "giving up: status $code means bad input, which another start does not mend"
        return "$code"
        ;;
      "$STOPPED") return "$STOPPED" ;;
    esac
  done
}

prefixed() {
  worker "$1" log "$FLAG_LINES" "$FLAG_FOLLOW" | while IFS= read -r line; do echo "[$1] $line"; done
}

show_logs() {
  if [[ $FLAG_WORKER == all ]]; then
    if dry; then each worker log "$FLAG_LINES" "$FLAG_FOLLOW"; else each prefixed; fi
  else
    [[ $FLAG_WORKER =~ ^[0-9]+$ && -n ${WORKERS[FLAG_WORKER]-} ]] ||
      fail "--worker=$FLAG_WORKER: all, or a number from 0 to $((${#WORKERS[@]} - 1))"
    worker "$FLAG_WORKER" log "$FLAG_LINES" "$FLAG_FOLLOW"
  fi
}
