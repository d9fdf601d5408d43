# Google Kubernetes Engine: one JobSet, with kubectl, in a cluster that is there. The cluster keeps the
# job, gives it nodes and starts it again, so the verbs of a job are other ones here than in watch.sh:
# nothing of this launcher runs in the cluster.
# shellcheck shell=bash disable=SC2034,SC2153

# shellcheck source=gke_manifest.sh
source "$LAUNCH/backends/gke_manifest.sh"

backend_prepare() {
  local slice index
  read_slice || fail "--accelerator-type: $SLICE_FAULT"
  FLAG_HOSTS=${FLAG_HOSTS:-$SLICE_HOSTS}
  if [[ ! $FLAG_HOSTS =~ ^[1-9][0-9]*$ ]] || ((SLICE_CHIPS % FLAG_HOSTS)); then
    fail "--hosts=$FLAG_HOSTS: nodes share the $SLICE_CHIPS chips of $SLICE_NAME, all alike"
  fi
  if ((SLICE_COUNT > 1 && FLAG_HOSTS == 1)); then
    fail "--accelerator-type=$SLICE_NAME: GKE joins slices of several nodes only"
  fi
  # Kubernetes makes NAME-slice-99-9999-abcde of it, within 63 characters.
  [[ $FLAG_NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ && ${#FLAG_NAME} -le 40 ]] ||
    fail "--name=$FLAG_NAME: Kubernetes wants a DNS label: lower-case letters, digits and hyphens, a" \
      "letter first, no hyphen last, here at most 40 of them"
  for ((slice = 0; slice < SLICE_COUNT; slice++)); do
    for ((index = 0; index < FLAG_HOSTS; index++)); do
      WORKERS+=("$FLAG_NAME-slice-$slice-$index")
    done
  done
  [[ "$FLAG_NAMESPACE,${FLAG_SERVICE_ACCOUNT:-default}" =~ ^[a-z0-9-]+,[a-z0-9.-]+$ ]] ||
    fail "--namespace=$FLAG_NAMESPACE, --service-account=$FLAG_SERVICE_ACCOUNT: lower-case letters," \
      "digits and hyphens"
  check_volumes
  local words="${ARGUMENTS[*]}"
  [[ ${words//[$'\n\t\r']/} != *[[:cntrl:]]* ]] ||
    fail "an argument of medmoe has a control character, which a manifest cannot hold"
  if [[ $VERB =~ ^(ship|run|resume)$ ]]; then check_image; fi
  KUBECTL=(kubectl ${FLAG_CONTEXT:+"--context=$FLAG_CONTEXT"} "--namespace=$FLAG_NAMESPACE")
  LABELS=("app.kubernetes.io/managed-by=$MANAGER" "app.kubernetes.io/instance=$FLAG_NAME")
  OURS=${LABELS[0]},${LABELS[1]}
  dry || check_cluster
}

check_image() {
  [[ -n $FLAG_IMAGE ]] ||
    fail "--backend=gke needs --image=REGISTRY/NAME:TAG, which has medmoe, or REGISTRY/NAME, which is" \
      "built from this checkout"
  [[ $FLAG_IMAGE =~ ^[a-z0-9][A-Za-z0-9._/:@-]*$ ]] ||
    fail "--image=$FLAG_IMAGE is no name of an image"
}

# --volumes as CLAIMS and PATHS; the work directory has to outlive the pods.
check_volumes() {
  local volume path kept=no volumes
  CLAIMS=() PATHS=()
  read -ra volumes <<<"$FLAG_VOLUMES"
  path=$(workdir)
  if [[ -z $path || $path =~ $SCHEME ]]; then kept=yes; fi
  for volume in "${volumes[@]}"; do
    [[ $volume =~ ^([a-z0-9]([a-z0-9.-]*[a-z0-9])?):(/[A-Za-z0-9_./-]+)$ ]] ||
      fail "--volumes: '$volume' is not CLAIM:/PATH"
    CLAIMS+=("${BASH_REMATCH[1]}")
    PATHS+=("${BASH_REMATCH[3]%/}")
    if [[ $path/ == "${PATHS[-1]}"/* ]]; then kept=yes; fi
  done
  [[ $kept == yes ]] ||
    fail "--workdir=$path would be lost with its pod: it has to be on gs://, or on a claim of --volumes"
}

# The cluster answers, whatever the current context becomes later, and knows JobSets.
check_cluster() {
  local context kinds
  command -v kubectl >/dev/null || fail "--backend=gke needs kubectl on this machine"
  if [[ -z $FLAG_CONTEXT ]]; then
    context=$(kubectl config current-context 2>/dev/null) ||
      fail "kubectl has no cluster: gcloud container clusters get-credentials CLUSTER, or --context=NAME"
    KUBECTL=(kubectl "--context=$context" "${KUBECTL[@]:1}")
  fi
  kinds=$("${KUBECTL[@]}" api-resources --api-group=jobset.x-k8s.io --output=name </dev/null) ||
    fail "the cluster of kubectl's context '${FLAG_CONTEXT:-$context}' does not answer"
  [[ $kinds == *jobsets.* ]] ||
    fail "the cluster has no JobSet (0.10 or later is needed): see https://jobset.sigs.k8s.io"
}

kube() { perform "${KUBECTL[@]}" "$@"; }

# Nodes are the cluster's business: they are there, or Autopilot or an autoscaler makes them.
backend_create() {
  local kind found needed
  kind="cloud.google.com/gke-tpu-accelerator=$SLICE_ACCELERATOR"
  kind+=",cloud.google.com/gke-tpu-topology=$SLICE_LAYOUT"
  needed="$SLICE_COUNT node pools of $FLAG_HOSTS machines $SLICE_MACHINE-$((SLICE_CHIPS / FLAG_HOSTS))t"
  needed+=" with the topology $SLICE_LAYOUT"
  found=$(kube get nodes --output=name --selector="$kind") || fail "kubectl does not list the nodes"
  if dry; then
    echo "$found"
    note "$SLICE_NAME takes $needed"
  elif [[ -n $found ]]; then
    say "$SLICE_NAME takes $needed; $(wc -l <<<"$found") such nodes are there"
  else
    say "$SLICE_NAME takes $needed; none is there: the job waits for them, unless the cluster makes them" \
      "(Autopilot, an autoscaler)"
  fi
}

# Sets IMAGE; one that is given without a tag is named by the hash of the tracked files.
name_image() {
  IMAGE=$FLAG_IMAGE
  if [[ ${IMAGE##*/} == *[:@]* ]]; then return; fi
  ARCHIVE=$FLAG_LOGS/ship/code.tar.gz
  if dry; then
    pack_code ''
  else
    mkdir -p "$FLAG_LOGS/ship" || fail "--logs=$FLAG_LOGS cannot be made"
    pack_code "$ARCHIVE"
  fi
  IMAGE=$IMAGE:$CODE
}

# The image of the tracked files, built and sent once for each version of them.
build_image() {
  local build
  if [[ $IMAGE == "$FLAG_IMAGE" ]]; then return; fi
  build=(docker build --platform=linux/amd64 --file=launch/Dockerfile --tag="$IMAGE"
    --build-arg="PYTHON=$FLAG_PYTHON" --build-arg="PACKAGES=$FLAG_PACKAGES" -)
  if dry; then
    note "pack the tracked files of $ROOT into $ARCHIVE: code $CODE"
    echo "$(quote "${build[@]}") <$(quote "$ARCHIVE")"
  else
    command -v docker >/dev/null ||
      fail "docker is needed to build $IMAGE; or name an image that is there, with its tag"
    if docker manifest inspect "$IMAGE" &>/dev/null </dev/null; then return; fi
    "${build[@]}" <"$ARCHIVE" || fail "$IMAGE cannot be built"
  fi
  perform docker push "$IMAGE" || fail "$IMAGE cannot be sent"
}

backend_ship() {
  name_image
  build_image
}

verb_run() { launch_job 0; }

verb_resume() { launch_job "$FLAG_MAX_RESTARTS"; }

# The job, started unless it runs already, and followed to its end. RESTARTS: how often the cluster
# starts it again where it failed for no known reason.
launch_job() { # RESTARTS
  local manager state restarts command
  if dry; then
    name_image
    { build_image && make_secret; } | sed 's/^\([^#]\)/# \1/' # so that the whole is a manifest
    manifest "$1"
    return
  fi
  look || fail "kubectl does not say how the JobSet $FLAG_NAME is"
  case $manager/$state in
    /*) ;;
    "$MANAGER/")
      [[ $command == "${ARGUMENTS[*]@Q}" ]] ||
        fail "another job of this name is there: medmoe $command; stop it first, or give --name"
      say "this job runs already: following it"
      beside watch_pods
      return
      ;;
    "$MANAGER"/*) remove_job ;;
    *) fail "the JobSet $FLAG_NAME was not made by this launcher: give another --name" ;;
  esac
  backend_ship
  beside begin_pods "$1"
}

# Secret first: pods wait for it. What was made is gone again where the rest cannot be.
start_job() { # RESTARTS
  remove_secret
  make_secret || fail "the Secret $FLAG_NAME-env cannot be made: see kubectl's message above"
  manifest "$1" | "${KUBECTL[@]}" create --filename=- >/dev/null || {
    remove_job
    fail "the JobSet $FLAG_NAME cannot be made: see kubectl's message above"
  }
  say "JobSet $FLAG_NAME is made: $SLICE_NAME, $((FLAG_HOSTS * SLICE_COUNT)) pods of $IMAGE"
}

# The file as it is, in a Secret of this launcher's: kubectl reads it, no command line has it.
make_secret() {
  [[ -n $FLAG_ENV_FILE ]] || return 0
  local make label
  make=("${KUBECTL[@]}" create secret generic "$FLAG_NAME-env" --from-file="env=$FLAG_ENV_FILE"
    --dry-run=client --output=json)
  label=("${KUBECTL[@]}" label --local --filename=- --output=json "${LABELS[@]}")
  if dry; then
    echo "$(quote "${make[@]}") | $(quote "${label[@]}") | $(quote "${KUBECTL[@]}" create --filename=-)"
  else
    "${make[@]}" </dev/null | "${label[@]}" | "${KUBECTL[@]}" create --filename=- >/dev/null
  fi
}

remove_secret() {
  "${KUBECTL[@]}" delete secret --selector="$OURS" --ignore-not-found </dev/null >/dev/null ||
    say "the Secret $FLAG_NAME-env cannot be removed; delete does it"
}

# All that this launcher made under this name, once its pods have saved and ended.
remove_job() {
  kube delete jobset,secret --selector="$OURS" --cascade=foreground --timeout="$((FLAG_GRACE + 60))s"
}

# Sets manager, state, restarts and command of its caller, '' where no JobSet is there.
look() {
  local told path
  path='{.metadata.labels.app\.kubernetes\.io/managed-by}|{.status.terminalState}|{.status.restarts}'
  told=$(kube get jobset "$FLAG_NAME" --ignore-not-found \
    --output=jsonpath="$path|{.metadata.annotations.medmoe-jax/job}") || return
  if dry; then echo "$told"; fi
  manager='' state='' restarts='' command=''
  if [[ -n $told ]]; then
    IFS='|' read -r manager state restarts command <<<"$told"
    manager=${manager:-nobody}
  fi
}

# A line a pod, who ended first on top: when it ended, start, slice, index, phase, status, name, what
# it waits for.
list_pods() {
  local path='{range .items[*]}{.status.containerStatuses[0].state.terminated.finishedAt}'
  path+='|{.metadata.labels.jobset\.sigs\.k8s\.io/restart-attempt}'
  path+='|{.metadata.labels.jobset\.sigs\.k8s\.io/job-index}'
  path+='|{.metadata.labels.batch\.kubernetes\.io/job-completion-index}|{.status.phase}'
  path+='|{.status.containerStatuses[0].state.terminated.exitCode}|{.metadata.name}'
  path+='|{.status.containerStatuses[0].state.waiting.reason}'
  path+=' {.status.conditions[?(@.type=="PodScheduled")].message}{"\n"}{end}'
  kube get pods --selector="jobset.sigs.k8s.io/jobset-name=$FLAG_NAME" --output=jsonpath="$path" |
    sed 's/| \+/|/; s/ \+$//' | sort
}

begin_pods() { # RESTARTS
  trap '' INT # what has not begun cannot be stopped
  start_job "$1"
  trap - INT
  watch_pods
}

# Follow the job until the cluster says that it is done, or that it failed for good. Ends with the
# status of the pod that failed first in the last start, with $LOST where none is left to say it.
watch_pods() {
  local manager state restarts command pods code shown=0 waits=''
  declare -A FOLLOWING=() CODES=()
  begin_following || return
  while is_child_of "$$"; do
    if look && pods=$(list_pods); then
      follow_pods
      if ((${restarts:-0} > shown)); then
        shown=$restarts
        say "start $((shown + 1))"
      fi
      if [[ -z $manager || -n $state ]]; then break; fi
    else
      say "kubectl does not answer; the job goes on, and is asked for again"
    fi
    sleep "$FLAG_POLL"
  done
  is_child_of "$$" || return
  if ((${#ATTACHED[@]})); then wait "${!ATTACHED[@]}" || true; fi # the last lines
  case $manager/$state in
    /) code=$STOPPED ;;
    */Completed) code=0 ;;
    *) code=${CODES[$shown]-$LOST} ;;
  esac
  say "JobSet $FLAG_NAME: ${state:-stopped}, starts: $((shown + 1)), status: $code"
  remove_secret
  return "$code"
}

# The lines of `pods` of watch_pods: logs of those that began, the first failure of each start, and
# what a pod waits for.
follow_pods() {
  local ended start slice index phase status pod waiting number
  while IFS='|' read -r ended start slice index phase status pod waiting; do
    [[ -n $pod && -n $slice && -n $index ]] || continue
    number=$((slice * FLAG_HOSTS + index))
    if [[ $phase != Pending ]]; then
      follow_pod "$number" "$pod" "$phase"
    elif [[ -n $waiting && "$number $waiting" != "$waits" && ($number == 0 || -z $waits) ]]; then
      waits="$number $waiting"
      say "worker $number ($pod) waits: $waiting"
    fi
    if [[ -n $status && $status != 0 && -z ${CODES[${start:-0}]-} ]]; then
      CODES[${start:-0}]=$status
      if [[ -n ${FOLLOWING[$pod]-} ]]; then wait "${FOLLOWING[$pod]}" || true; fi
      report "$number" "$status"
    fi
  done <<<"$pods"
}

# A pod's log into LOGS/worker-N.log, worker 0's on the terminal too; again where a connection broke.
follow_pod() { # NUMBER POD PHASE
  local since=()
  if [[ -n ${FOLLOWING[$2]-} ]]; then
    if [[ $3 != Running ]] || kill -0 "${FOLLOWING[$2]}" 2>/dev/null; then return; fi
    since=(--since="$((FLAG_POLL + 1))s")
  else
    echo "== worker $1, $(date '+%F %T'): medmoe $(quote "${ARGUMENTS[@]}")" >>"$FLAG_LOGS/worker-$1.log"
  fi
  follow attach_pod "$1" "$2" "${since[@]}"
  FOLLOWING[$2]=$! ATTACHED[$!]=$1
}

attach_pod() { # NUMBER POD [SINCE]
  local copy=$FLAG_LOGS/worker-$1.log
  if (($1 == 0)); then
    "${KUBECTL[@]}" logs --follow "${@:3}" "$2" 2>&1 | tee -a "$copy"
  else
    "${KUBECTL[@]}" logs --follow "${@:3}" "$2" >>"$copy" 2>&1
  fi
}

verb_status() {
  local manager state restarts command pods ended start slice index phase status pod waiting
  if dry; then
    look
    list_pods
    return
  fi
  look || fail "kubectl does not say how the JobSet $FLAG_NAME is"
  [[ -n $manager ]] || { echo "$FLAG_NAME: no such JobSet" && return; }
  echo "$FLAG_NAME: JobSet ${state:-going on}, start $((${restarts:-0} + 1)): medmoe $command"
  pods=$(list_pods) || fail "kubectl does not list the pods of $FLAG_NAME"
  while IFS='|' read -r ended start slice index phase status pod waiting; do
    [[ -n $pod && -n $slice && -n $index ]] || continue
    echo "worker $((slice * FLAG_HOSTS + index)) ($pod): $phase${status:+, ended with status $status at $ended}${waiting:+ $waiting}"
  done <<<"$pods" | sort --version-sort
}

# What the logs of common.sh ask a worker for.
worker() { # NUMBER log LINES FOLLOW
  kube logs --tail="$3" --follow="$([[ $4 == yes ]] && echo true || echo false)" \
    --selector="jobset.sigs.k8s.io/jobset-name=$FLAG_NAME,jobset.sigs.k8s.io/job-index=$(($1 / FLAG_HOSTS)),batch.kubernetes.io/job-completion-index=$(($1 % FLAG_HOSTS))"
}

verb_stop() { remove_job; }

backend_delete() { remove_job; }
