#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One run of scripts/train.py on a cluster that xpk manages (pip install xpk; xpk cluster create).
#
#   export PROJECT=... ZONE=... CLUSTER=... NAME=my-run IMAGE=... DEVICE=v5p-64 STORAGE=jaxlm
#   tpu/xpk.sh apply configs/quickstart.py run.steps=1000 mesh.data=1 mesh.fsdp=-1
#   tpu/xpk.sh status
#   tpu/xpk.sh delete            # SIGTERM, the save; `apply` with the same words goes on
#
# STORAGE is a storage of the cluster (xpk storage create) that is mounted at MOUNT, read and write.
# --dry-run anywhere, or DRY_RUN=1, prints the command instead. docs/pods.md explains each step.

set -euo pipefail

PROJECT=${PROJECT:-}            # Google Cloud project
ZONE=${ZONE:-}                  # of the cluster
CLUSTER=${CLUSTER:-}            # xpk's
NAME=${NAME:-}                  # of the workload and of the run
IMAGE=${IMAGE:-}                # built from tpu/Dockerfile
STORAGE=${STORAGE:-}            # xpk's name of the shared storage
DEVICE=${DEVICE:-v5litepod-8}   # v5litepod-8, v5p-64, h100-80gb-8: what xpk calls them
NUM=${NUM:-1}                   # slices of a TPU, nodes of GPUs
MOUNT=${MOUNT:-/storage}        # where xpk mounts STORAGE
GRACE=${GRACE:-300}             # seconds from SIGTERM to SIGKILL: longer than a save takes
SAVE_EVERY=${SAVE_EVERY:-100}   # updates between two saves
DRY_RUN=${DRY_RUN:-}
CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

SELF=tpu/xpk.sh
# shellcheck source=tpu/command.bash
source "$CODE/tpu/command.bash"

apply() {
  need NAME IMAGE STORAGE
  [[ $# -gt 0 && -f $CODE/$1 ]] || fail "apply needs a config under $CODE, such as configs/quickstart.py"
  local train platform count=() before=
  case $DEVICE in
    h100-*)
      platform=cuda
      count=(--num-nodes="$NUM")
      # xpk tells a GPU node its rank under names of its own.
      # shellcheck disable=SC2016  # expanded on the node
      before='export JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT '
      # shellcheck disable=SC2016
      before+='JAX_NUM_PROCESSES=$NNODES JAX_PROCESS_ID=$NODE_RANK; '
      ;;
    *)
      platform=tpu
      count=(--num-slices="$NUM")
      ;;
  esac
  # exec, because xpk's wrapper sends SIGTERM to the shell that runs this and not to its children.
  printf -v train '%q ' exec python3 scripts/train.py "$1" run.directory="$MOUNT/runs/$NAME" \
    run.save_every="$SAVE_EVERY" run.bad_checkpoint=previous "${@:2}"
  call xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
    --device-type="$DEVICE" "${count[@]}" --docker-image="$IMAGE" --storage="$STORAGE" \
    --env=JAX_PLATFORMS="$platform,cpu" --env=JAX_COMPILATION_CACHE_DIR="$MOUNT/compile_cache" \
    --env=PYTHONUNBUFFERED=1 --max-restarts=100 --restart-on-exit-codes=75 \
    --termination-grace-period-seconds="$GRACE" --command="$before${train% }"
}

take_words "$@"
set -- ${words[@]+"${words[@]}"}  # an empty array is unset in bash 3
command=${1:-}
shift || true
need PROJECT ZONE CLUSTER
case $command in
  apply) apply "$@" ;;
  status) call xpk workload list --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" ;;
  delete)
    need NAME
    call xpk workload delete --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME"
    ;;
  *) fail "unknown command '$command'; there are apply, status, delete" ;;
esac
