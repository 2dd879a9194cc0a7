#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One run of scripts/train.py on all workers of a Cloud TPU slice, without Kubernetes.
#
#   export PROJECT=... ZONE=us-west4-a NAME=my-run STORAGE=gs://my-bucket ACCELERATOR=v5litepod-8 CAPACITY=spot
#   tpu/pod.sh create
#   tpu/pod.sh install
#   tpu/pod.sh run configs/quickstart.py run.steps=1000 mesh.data=1 mesh.fsdp=-1
#   tpu/pod.sh status | logs [--follow] | stop
#   tpu/pod.sh resume configs/quickstart.py run.steps=1000 mesh.data=1 mesh.fsdp=-1     # after a stop or a preemption
#   tpu/pod.sh delete
#
# --dry-run anywhere, or DRY_RUN=1, prints the commands instead. docs/pods.md explains each step.

set -euo pipefail

PROJECT=${PROJECT:-}                       # Google Cloud project
ZONE=${ZONE:-}                             # one that has the accelerator
NAME=${NAME:-}                             # of the slice and of the run
STORAGE=${STORAGE:-}                       # gs://BUCKET or nfs://SERVER/SHARE, where the run directory lives
ACCELERATOR=${ACCELERATOR:-v5litepod-8}    # v5litepod-N: N chips; v5p-N: N TensorCores, N/2 chips
RUNTIME=${RUNTIME:-}                       # the VM image; empty: the one for the accelerator
CAPACITY=${CAPACITY:-on-demand}            # on-demand, spot or reserved
REQUEST=${REQUEST:-queued}                 # queued: wait in line for the slice; direct: now or not at all
GRACE=${GRACE:-300}                        # seconds a stop waits for the save
SAVE_EVERY=${SAVE_EVERY:-100}              # updates between two saves
POLL=${POLL:-30}                           # seconds between two looks at the queue
DRY_RUN=${DRY_RUN:-}
CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

SELF=tpu/pod.sh
# shellcheck source=tpu/command.bash
source "$CODE/tpu/command.bash"

tpus() { call gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }

runtime() {
  if [[ -n $RUNTIME ]]; then
    echo "$RUNTIME"
    return
  fi
  case $ACCELERATOR in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "no VM image is known for ACCELERATOR=$ACCELERATOR: set RUNTIME (gcloud compute tpus versions list)" ;;
  esac
}

# The state of the slice, empty when there is none.
state() {
  if [[ $REQUEST == queued ]]; then
    gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
      --format='value(state.state)' 2> /dev/null || true
  else
    gcloud compute tpus tpu-vm describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
      --format='value(state)' 2> /dev/null || true
  fi
}

create() {
  local image capacity=()
  image=$(runtime)
  case $CAPACITY in
    on-demand) ;;
    spot | reserved) capacity=("--$CAPACITY") ;;
    *) fail "CAPACITY must be on-demand, spot or reserved, got '$CAPACITY'" ;;
  esac
  case $REQUEST in
    queued)
      tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" \
        --runtime-version="$image" ${capacity[@]+"${capacity[@]}"}
      wait_for_slice
      ;;
    direct)
      tpus tpu-vm create "$NAME" --accelerator-type="$ACCELERATOR" --version="$image" ${capacity[@]+"${capacity[@]}"}
      ;;
    *) fail "REQUEST must be queued or direct, got '$REQUEST'" ;;
  esac
}

wait_for_slice() {
  if [[ -n $DRY_RUN ]]; then
    tpus queued-resources describe "$NAME" --format='value(state.state)'
    return
  fi
  local now last=
  while true; do
    now=$(state)
    if [[ $now != "$last" ]]; then echo "$NAME: ${now:-no answer}"; fi
    last=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED)
        fail "the request is $now; tpu/pod.sh delete, then ask again, in another ZONE or with another CAPACITY" ;;
    esac
    sleep "$POLL"
  done
}

# `worker WHICH COMMAND...`: tpu/worker.sh on one worker or on all.
worker() {
  local which=$1 line
  shift
  printf -v line '%q ' env NAME="$NAME" STORAGE="$STORAGE" GRACE="$GRACE" SAVE_EVERY="$SAVE_EVERY" \
    bash jaxlm/tpu/worker.sh "$@"
  tpus tpu-vm ssh "$NAME" --worker="$which" --command="$line"
}

# All workers get one commit, so that no two of them can run different code.
install() {
  need STORAGE
  local archive
  archive=$(mktemp -d)/jaxlm.tar.gz
  if [[ -z $DRY_RUN && -n $(git -C "$CODE" status --porcelain --untracked-files=no) ]]; then
    fail "the working tree has changes that are not committed: the workers get the last commit, so commit them first"
  fi
  call git -C "$CODE" archive --format=tar.gz --output="$archive" HEAD
  tpus tpu-vm scp "$archive" "$NAME:jaxlm.tar.gz" --worker=all
  tpus tpu-vm ssh "$NAME" --worker=all \
    --command='rm -rf jaxlm && mkdir jaxlm && tar --extract --gzip --file=jaxlm.tar.gz --directory=jaxlm'
  worker all install
  rm -rf "$(dirname "$archive")"
}

run() {
  [[ $# -gt 0 ]] || fail "run and resume need a config, such as configs/quickstart.py"
  [[ -f $CODE/$1 ]] || fail "no config $1 under $CODE"
  worker all start "$@"
}

delete() {
  if [[ $REQUEST == queued ]]; then
    tpus queued-resources delete "$NAME" --force --quiet
  else
    tpus tpu-vm delete "$NAME" --quiet
  fi
}

# A spot slice that was taken away never comes back: it is deleted and asked for again. The run directory has the rest.
resume() {
  need STORAGE
  [[ $# -gt 0 && -f $CODE/$1 ]] || fail "resume needs the config and fields of the run that it goes on with"
  local now=unknown
  if [[ -z $DRY_RUN ]]; then now=$(state); fi
  case $now in
    ACTIVE | READY) ;;
    ACCEPTED | PROVISIONING | CREATING | WAITING_FOR_RESOURCES)
      wait_for_slice
      install
      ;;
    *)
      if [[ -n $now ]]; then delete; fi
      create
      install
      ;;
  esac
  run "$@"
}

take_words "$@"
set -- ${words[@]+"${words[@]}"}  # an empty array is unset in bash 3
command=${1:-}
shift || true
need PROJECT ZONE NAME
case $command in
  create) create ;;
  install) install ;;
  run) run "$@" ;;
  status)
    if [[ -z $DRY_RUN ]]; then echo "$NAME: $(state)"; fi
    worker all status
    ;;
  logs) worker "${WORKER:-0}" logs "$@" ;;
  stop) worker all stop ;;
  resume) resume "$@" ;;
  delete) delete ;;
  *) fail "unknown command '$command'; there are create, install, run, status, logs, stop, resume, delete" ;;
esac
