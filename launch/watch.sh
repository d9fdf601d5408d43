# Start the job, follow it, and start it again, on workers that keep it with worker.sh. The verbs of a
# job are at the end; a back end whose cluster keeps the job has verbs of its own.
# shellcheck shell=bash

# Of worker.sh: the same job runs already; it refused, and said why.
ALREADY_RUNNING=10
REFUSED=11
STOPPED=130
LOST=255

# The workers of the processes that follow one.
declare -A ATTACHED=()

start_worker() {
  local environment
  mapfile -t environment < <(backend_environment "$1")
  worker "$1" start "${environment[@]}" -- "${ARGUMENTS[@]}"
}

# The job on all workers; where all of them run it already, as after a lost connection, it stays.
start() {
  local number code bad=0 running=0 began=() starting=()
  if dry; then
    each start_worker
    return
  fi
  for number in "${!WORKERS[@]}"; do
    start_worker "$number" &
    starting[number]=$!
  done
  for number in "${!WORKERS[@]}"; do
    code=0
    wait "${starting[number]}" || code=$?
    case $code in
      0) began+=("$number") ;;
      "$ALREADY_RUNNING") running=$((running + 1)) ;;
      "$REFUSED") bad=1 ;;
      *)
        say "worker $number (${WORKERS[number]}) cannot be reached"
        bad=$LOST
        ;;
    esac
  done
  if ((running == ${#WORKERS[@]})); then
    say "this job runs already: following it"
  elif ((bad)); then
    for number in "${began[@]}"; do worker "$number" stop "$FLAG_GRACE"; done
  elif ((running)); then
    say "some workers still run an earlier start: stopping it, and starting all together"
    each worker stop "$FLAG_GRACE" || return "$LOST"
    backend_ship || return "$LOST" # the variables went with the jobs that were stopped
    each start_worker || bad=$LOST
  fi
  return "$bad"
}

# One worker's log into LOGS/worker-N.log, worker 0's on the terminal too, until its job ends; ends
# with the job's status. That is in the log's last line: gcloud and ssh end with 1 and 255 for
# reasons of their own.
attach() {
  local copy=$FLAG_LOGS/worker-$1.log status
  if dry; then
    worker "$1" attach
    return
  elif (($1 == 0)); then
    worker 0 attach 2>&1 | tee -a "$copy" || true
  else
    worker "$1" attach >>"$copy" 2>&1 || true
  fi
  status=$(awk '/^== worker /{s = ""} /^== ended with status /{s = $5} END{print s}' "$copy")
  return "${status:-$LOST}"
}

in_words() {
  case $1 in
    69) echo "ended because another worker never came or is gone (status 69)" ;;
    74) echo "ended because its storage failed or could not be reached (status 74)" ;;
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
  awk -v most=20 '
    /^== worker /{n = 0}
    {lines[n++ % most] = $0}
    END{for (i = n > most ? n - most : 0; i < n; i++) print "    " lines[i % most]}' "$copy" >&2
}

# COMMAND beside this shell, which waits for it and heeds signals: stops the job, or leaves it to itself
# where the terminal is gone. With a trap set it must do nothing else: bash 5.2 fails where a signal
# comes while it reads a `$(...)`, and the trap is lost.
beside() { # COMMAND...
  local code=0
  ps -o ppid= -p "$$" &>/dev/null || fail "ps (procps) is needed on this machine"
  mkdir -p "$FLAG_LOGS"
  end_orphans
  trap interrupted INT TERM
  trap "trap '' INT TERM HUP; exit 129" HUP
  trap leave EXIT
  set -m # a process group of its own, which Ctrl-C does not reach
  "$@" </dev/null &
  set +m
  wait "$!" || code=$?
  trap - INT TERM HUP
  leave
  trap - EXIT
  return "$code"
}

interrupted() {
  local group
  trap - INT TERM HUP
  say "stopping the job on all workers (again to leave it to itself)"
  # The shell beside, then what it left; what ignores that is waited for.
  group=$(running_beside)
  end_beside "$group"
  kill -INT -- "-$group" 2>/dev/null || true
  while lives "$group"; do sleep 0.1; done
  verb_stop || say "some workers could not be told; see: status"
  exit "$STOPPED"
}

# The number of the process beside this one, and of its group; '' where there is none.
running_beside() {
  jobs -pr
  jobs -ps # asks the terminal for something, and waits to be continued
}

end_beside() { # PROCESS, or ''
  if [[ -n $1 ]]; then
    kill "$1" 2>/dev/null || true
    kill -CONT -- "-$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
  fi
}

# Whether a process group has any process, zombies aside: not every system collects orphans.
lives() { # GROUP
  ps -A -o pgid= -o stat= | awk -v group="$1" '$1 == group && $2 !~ /^Z/ {n++} END {exit !n}'
}

# Follow all workers. At the first that ends otherwise than with 0 the others are stopped, and its
# status is the result; $LOST when one of the others cannot be reached any more.
watch_job() {
  local number process code=0 title
  if dry; then
    each attach
    return
  fi
  begin_following || return
  for number in "${!WORKERS[@]}"; do
    title="== worker $number, $(date '+%F %T'): medmoe $(quote "${ARGUMENTS[@]}")"
    echo "$title" >>"$FLAG_LOGS/worker-$number.log"
    follow attach "$number"
    ATTACHED[$!]=$number
  done
  while ((${#ATTACHED[@]} && code == 0)); do
    wait -n -p process "${!ATTACHED[@]}" || code=$?
    number=${ATTACHED[$process]}
    unset "ATTACHED[$process]"
  done
  is_child_of "$$" || return
  if ((code)); then
    report "$number" "$code"
    stop_others || code=$LOST
  fi
  return "$code"
}

# A process's number and when it began: together they name no other process.
born() { echo "$1 $(TZ=UTC0 LC_ALL=C ps -o lstart= -p "$1")"; }

is_child_of() { # PROCESS, as long as it lives
  local self=$BASHPID
  (($(ps -o ppid= -p "$self") == $1))
}

# LOGS/followers.N: the launcher of the number N, then the process groups that work for it. Fails where it
# is gone: its job is left to itself.
begin_following() {
  is_child_of "$$" || return
  WATCHER=$BASHPID
  printf '%s\n' "$(born "$$")" "$(born "$WATCHER")" >"$FLAG_LOGS/followers.$$"
}

# COMMAND in the background, in a process group of its own, so that all of a connection can be ended.
follow() { # COMMAND...
  set -m
  followed "$@" </dev/null &
  set +m
}

# Whoever ends the followers ends the watcher before: one that came too late to be noted sees that.
followed() { # COMMAND...
  born "$BASHPID" >>"$FLAG_LOGS/followers.$$"
  if is_child_of "$WATCHER"; then "$@"; else rm -f "$FLAG_LOGS/followers.$$"; fi
}

# End what follows workers for a launcher that was killed: it would write every line twice.
end_orphans() {
  local file process began
  for file in "$FLAG_LOGS"/followers.*; do
    [[ -e $file ]] || continue
    read -r process began <"$file" || true # empty where the disk was full
    if [[ -z $process || "$(born "$process")" != "$process $began" ]]; then end_followers "$file"; fi
  done
}

end_followers() { # FILE
  local process began
  while read -r process began; do
    if [[ "$(born "$process")" == "$process $began" ]]; then
      kill -- "-$process" 2>/dev/null || true
    fi
  done < <(tail -n +2 "$1")
  rm -f "$1"
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
  return "$lost"
}

# End what follows the workers; their jobs go on.
leave() {
  end_beside "$(running_beside)"
  if [[ -e $FLAG_LOGS/followers.$$ ]]; then end_followers "$FLAG_LOGS/followers.$$"; fi
}

begin_and_watch() {
  trap '' INT # what has not begun cannot be stopped
  start || return
  watch_job
}

# One start of the job; returns its status.
attempt() { if dry; then begin_and_watch; else beside begin_and_watch; fi; }

# What the work directory holds, as one line that changes with every save.
saved() {
  local path
  path=$(workdir)
  if [[ -n $path ]]; then worker 0 saved "$path"; fi
}

# The workers are there, with the code; sets `now` of its caller to what is saved.
make_ready() { backend_ensure && backend_ship && now=$(saved); }

verb_resume() {
  local before='' now='' code=0 ready fruitless=0 starts=0
  if dry; then
    backend_ensure
    backend_ship
    saved
    attempt
    note "and all of it again until the status is 0, 1 or 2 (bad input), or $STOPPED (stopped)," \
      "or $FLAG_MAX_RESTARTS tries in a row saved nothing new"
    return
  fi
  while true; do
    ready=0
    make_ready || ready=$?
    fruitless=$((fruitless + 1))
    if ((ready)); then
      code=$ready
      say "no start: the workers could not be made ready (status $code)"
    elif ((starts == 0)) || [[ $now != "$before" ]]; then
      fruitless=0
    fi
    ((fruitless < FLAG_MAX_RESTARTS)) || break
    if ((ready)); then
      say "the next try is in $FLAG_POLL s"
      sleep "$FLAG_POLL"
      continue
    fi
    before=$now starts=$((starts + 1))
    say "start $starts"
    code=0
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
  say "giving up: $fruitless tries in a row saved nothing new; the last one had status $code"
  return "$code"
}

prefixed() {
  worker "$1" log "$FLAG_LINES" "$FLAG_FOLLOW" | while IFS= read -r line; do echo "[$1] $line"; done
}

verb_run() {
  backend_ship
  attempt
}

verb_status() {
  backend_status
  each worker status | sort --version-sort --stable --key=2,2 # a worker's lines stay in order
}

verb_stop() { each worker stop "$FLAG_GRACE"; }

verb_logs() {
  if [[ $FLAG_WORKER == all ]]; then
    if dry; then each worker log "$FLAG_LINES" "$FLAG_FOLLOW"; else each prefixed; fi
  else
    [[ $FLAG_WORKER =~ ^(0|[1-9][0-9]{0,5})$ && -n ${WORKERS[FLAG_WORKER]-} ]] ||
      fail "--worker=$FLAG_WORKER: all, or a number from 0 to $((${#WORKERS[@]} - 1))"
    worker "$FLAG_WORKER" log "$FLAG_LINES" "$FLAG_FOLLOW"
  fi
}
