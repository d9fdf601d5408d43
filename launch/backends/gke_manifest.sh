# The JobSet of a job, as YAML: jobset.sigs.k8s.io and
# cloud.google.com/kubernetes-engine/docs/how-to/tpus.
# shellcheck shell=bash disable=SC2153

# On every object that this launcher makes; it removes none without it.
MANAGER=medmoe-tpu-run
# Where a pod has the Secret.
SECRETS=/run/medmoe

# A YAML string in double quotes; other control characters than these were refused.
yaml() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  text=${text//$'\r'/\\r}
  printf '"%s"' "$text"
}

# The lines of standard input, further to the right.
indented() { sed "s/^/$(printf "%$1s" '')/"; }

# Status 1 and 2 are bad input, 75 is what medmoe ends with when it has saved after a notice, and a
# disruption is a node that was taken away: these restarts are not counted. Any other failure is.
failure_policy() { # RESTARTS
  echo "maxRestarts: $1"
  (($1)) || return 0 # of `run`, which starts once
  cat <<YAML
rules:
  - name: badInput
    action: FailJobSet
    onJobFailureReasons: [PodFailurePolicy]
    onJobFailureMessagePatterns: ["exit code [12] matching"]
  - name: takenAway
    action: RestartJobSetAndIgnoreMaxRestarts
    onJobFailureReasons: [PodFailurePolicy]
YAML
}

labels() {
  cat <<YAML
app.kubernetes.io/name: medmoe
app.kubernetes.io/instance: $FLAG_NAME
app.kubernetes.io/managed-by: $MANAGER
YAML
}

manifest() { # RESTARTS
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $FLAG_NAME
  namespace: $FLAG_NAMESPACE
  labels:
$(labels | indented 4)
  annotations:
    medmoe-jax/job: $(yaml "${ARGUMENTS[*]@Q}")
YAML
  # A slice of several hosts is a node pool of its own, and no pool serves two of them.
  if ((FLAG_HOSTS > 1)); then
    echo "    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
  fi
  cat <<YAML
spec:
  network:
    enableDNSHostnames: true
    publishNotReadyAddresses: true
  failurePolicy:
$(failure_policy "$1" | indented 4)
  replicatedJobs:
    - name: slice
      replicas: $SLICE_COUNT
      template:
        metadata:
          labels:
$(labels | indented 12)
        spec:
          parallelism: $FLAG_HOSTS
          completions: $FLAG_HOSTS
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
              - action: FailJob
                onExitCodes: {containerName: medmoe, operator: In, values: [1, 2, 75]}
          template:
            metadata:
              labels:
$(labels | indented 16)
            spec:
$(pod | indented 14)
YAML
}

pod() {
  local number
  cat <<YAML
restartPolicy: Never
terminationGracePeriodSeconds: $FLAG_GRACE
nodeSelector:
  cloud.google.com/gke-tpu-accelerator: $SLICE_ACCELERATOR
  cloud.google.com/gke-tpu-topology: $SLICE_LAYOUT
YAML
  if [[ $FLAG_SPOT == yes ]]; then
    echo '  cloud.google.com/gke-spot: "true"'
    echo 'tolerations:'
    echo '  - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
  fi
  if [[ -n $FLAG_SERVICE_ACCOUNT ]]; then echo "serviceAccountName: $FLAG_SERVICE_ACCOUNT"; fi
  # The network between slices is the nodes' own, without a layer on top.
  if ((SLICE_COUNT > 1)); then
    printf '%s\n' 'hostNetwork: true' 'dnsPolicy: ClusterFirstWithHostNet'
  fi
  printf '%s\n' 'containers:' '  - name: medmoe' "    image: $IMAGE"
  container | indented 4
  if [[ -n $FLAG_ENV_FILE || ${#CLAIMS[@]} -gt 0 ]]; then echo 'volumes:'; fi
  if [[ -n $FLAG_ENV_FILE ]]; then
    echo "  - {name: env, secret: {secretName: $FLAG_NAME-env, defaultMode: 0400}}"
  fi
  for number in "${!CLAIMS[@]}"; do
    echo "  - {name: volume-$number, persistentVolumeClaim: {claimName: ${CLAIMS[number]}}}"
  done
}

# The file of variables is read by a shell, as on the other back ends; Kubernetes puts variables of
# its own in place of $(NAME), and takes $$ for a dollar.
container() {
  local argument number
  echo 'command:'
  # shellcheck disable=SC2016
  printf '  - %s\n' sh -c "$(yaml 'if [ -e "$0" ]; then set -a; . "$0"; set +a; fi; exec medmoe "$@"')" \
    "$SECRETS/env"
  echo 'args:'
  for argument in "${ARGUMENTS[@]}"; do echo "  - $(yaml "${argument//\$/\$\$}")"; done
  # GKE tells every pod which of its slice's it is, and JAX asks there.
  if ((FLAG_HOSTS * SLICE_COUNT > 1)); then
    printf '%s\n' 'env:' '  - {name: MEDMOE_COORDINATOR, value: auto}'
  fi
  echo 'resources:'
  echo "  limits: {google.com/tpu: $((SLICE_CHIPS / FLAG_HOSTS))}"
  if [[ -n $FLAG_ENV_FILE || ${#CLAIMS[@]} -gt 0 ]]; then echo 'volumeMounts:'; fi
  if [[ -n $FLAG_ENV_FILE ]]; then echo "  - {name: env, mountPath: $SECRETS, readOnly: true}"; fi
  for number in "${!CLAIMS[@]}"; do
    echo "  - {name: volume-$number, mountPath: ${PATHS[number]}}"
  done
}
