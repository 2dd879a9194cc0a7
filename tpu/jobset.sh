#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One run of scripts/train.py as a Kubernetes JobSet; tpu/jobset/ has a manifest a size.
#
#   export NAME=my-run IMAGE=... CLAIM=jaxlm
#   tpu/jobset.sh apply tpu/jobset/storage.yaml                      # once: the claim
#   tpu/jobset.sh apply tpu/jobset/v5e-8.yaml configs/quickstart.py run.steps=1000
#   tpu/jobset.sh status | logs [--follow]
#   tpu/jobset.sh stop                                               # saves, keeps the JobSet
#   tpu/jobset.sh resume
#   tpu/jobset.sh delete                                             # the run directory stays
#
# `render` in place of `apply` prints the manifest; --dry-run anywhere, or DRY_RUN=1, prints the commands as well.
# Needs kubectl and a cluster with JobSet 0.10 or newer. docs/pods.md explains each step.

# shellcheck disable=SC2016  # '${NAME}' is the manifests' placeholder, not ours to expand
set -euo pipefail

NAME=${NAME:-}       # of the JobSet and of the run: lower-case letters, digits and dashes, at most 40
IMAGE=${IMAGE:-}     # built from tpu/Dockerfile, where the cluster can pull it
CLAIM=${CLAIM:-}     # a PersistentVolumeClaim that many nodes may write
DRY_RUN=${DRY_RUN:-}
CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

SELF=tpu/jobset.sh
# shellcheck source=tpu/command.bash
source "$CODE/tpu/command.bash"

# `render MANIFEST [CONFIG FIELD=VALUE...]`: a later field wins over the same one in the manifest.
render() {
  local manifest=${1:-} config=${2:-} line field
  [[ -f $manifest ]] || fail "no manifest '$manifest'; there are $(cd "$CODE" && echo tpu/jobset/*.yaml)"
  if grep --quiet '\${IMAGE}' "$manifest"; then
    need NAME IMAGE
    [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
      fail "NAME must be 1 to 40 lower-case letters, digits and dashes, beginning with a letter, got '$NAME'"
    [[ -n $config ]] || fail "$manifest needs a config, such as configs/quickstart.py"
    [[ -f $CODE/$config ]] || fail "no config $config under $CODE, where the image was built"
  fi
  need CLAIM
  while IFS= read -r line; do
    if [[ $line == *'# ${FIELDS}' ]]; then
      for field in "${@:3}"; do
        printf "%s- '%s'\n" "${line%%#*}" "${field//\'/\'\'}"
      done
      continue
    fi
    if [[ $line != '#'* ]]; then
      line=${line//'${NAME}'/"$NAME"}
      line=${line//'${IMAGE}'/"$IMAGE"}
      line=${line//'${CLAIM}'/"$CLAIM"}
      line=${line//'${CONFIG}'/"$config"}
    fi
    printf '%s\n' "$line"
  done < "$manifest"
}

take_words "$@"
set -- ${words[@]+"${words[@]}"}  # an empty array is unset in bash 3
command=${1:-}
shift || true
case $command in
  render) render "$@" ;;
  apply)
    manifest=$(render "$@")
    if [[ -n $DRY_RUN ]]; then printf '%s\n# ' "$manifest"; fi
    call kubectl apply --filename=- <<< "$manifest"
    ;;
  status | logs | stop | resume | delete)
    need NAME
    mine=jobset.sigs.k8s.io/jobset-name=$NAME
    case $command in
      status)
        call kubectl get jobset "$NAME"
        call kubectl get pods --selector="$mine" --output=wide
        ;;
      logs) call kubectl logs --selector="$mine" --prefix --tail=200 --max-log-requests=100 "$@" ;;
      # Suspending deletes the pods: SIGTERM, the save, at most the manifest's grace period.
      stop) call kubectl patch jobset "$NAME" --type=merge --patch='{"spec":{"suspend":true}}' ;;
      resume) call kubectl patch jobset "$NAME" --type=merge --patch='{"spec":{"suspend":false}}' ;;
      delete) call kubectl delete jobset "$NAME" ;;
    esac
    ;;
  *) fail "unknown command '$command'; there are render, apply, status, logs, stop, resume, delete" ;;
esac
