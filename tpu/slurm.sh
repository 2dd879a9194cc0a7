#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# One run of scripts/train.py on nodes of 8 GPUs under Slurm; it goes back into the queue until it is finished.
#
#   export NAME=my-run STORAGE=/shared/jaxlm VENV=/shared/jaxlm-venv
#   sbatch --job-name=$NAME --nodes=2 tpu/slurm.sh configs/quickstart.py run.steps=1000 mesh.data=2 mesh.fsdp=8
#   scancel --batch --signal=TERM JOBID          # saves, and queues again
#   touch $STORAGE/runs/my-run/stop              # makes that the last round
#
# Submit from the repository. On a machine without Slurm, DRY_RUN=1 or --dry-run prints the commands.
#
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

NAME=${NAME:-}                  # of the run
STORAGE=${STORAGE:-}            # a folder that all nodes see, for the run directory and the compile cache
VENV=${VENV:-}                  # a virtual environment that all nodes see, with jaxlm[cuda]
GPUS=${GPUS:-8}                 # of a node
GRACE=300                       # seconds that the other tasks get once one is done; the lead of --signal above
SAVE_EVERY=${SAVE_EVERY:-100}   # updates between two saves: what a node that just dies may lose
MAX_ROUNDS=${MAX_ROUNDS:-100}   # then something is wrong
TRY_AGAIN=75                    # scripts/train.py saved after SIGTERM; the same command goes on
DRY_RUN=${DRY_RUN:-}
CODE=${SLURM_SUBMIT_DIR:-$PWD}  # sbatch runs a copy of this file elsewhere

SELF=tpu/slurm.sh
# shellcheck source=tpu/command.bash
source "$CODE/tpu/command.bash"

take_words "$@"
set -- ${words[@]+"${words[@]}"}  # an empty array is unset in bash 3
for name in NAME STORAGE VENV; do
  [[ -n ${!name} ]] || fail "$name is not set: export $name=... (the top of this file says what it is)"
done
[[ $STORAGE == /* ]] || fail "STORAGE must be an absolute path, got '$STORAGE'"
[[ $# -gt 0 ]] || fail "no config: sbatch tpu/slurm.sh configs/quickstart.py"
[[ -f $CODE/$1 ]] || fail "no config $1 in $CODE: submit from the repository"

# Given one task a node, jax would take one GPU a task: it counts on a task for each.
JAX_LOCAL_DEVICE_IDS=$(seq --separator=, 0 $((GPUS - 1)))
export JAX_LOCAL_DEVICE_IDS JAX_PLATFORMS=cuda,cpu PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=$STORAGE/compile_cache

cd "$CODE"
run=$STORAGE/runs/$NAME
# The tasks that are still saving when the first one is done get GRACE seconds; a site's KillOnBadExit would give none.
step=(srun --kill-on-bad-exit=0 --wait="$GRACE" "$VENV/bin/python" scripts/train.py "$1"
  run.directory="$run" run.save_every="$SAVE_EVERY" run.bad_checkpoint=previous "${@:2}")
if [[ -n $DRY_RUN ]]; then
  call "${step[@]}"
  call scontrol requeue "${SLURM_JOB_ID:-JOBID}"
  exit 0
fi

mkdir -p "$run"
[[ ${SLURM_RESTART_COUNT:-0} -gt 0 ]] || rm -f "$run/stop" # of an earlier submission
"${step[@]}" &
child=$!
trap 'kill -TERM "$child"' TERM # srun passes it to every task
while kill -0 "$child" 2> /dev/null; do
  wait "$child" || true # the trap ends a wait early, with srun still there
done
code=0
wait "$child" || code=$?
round=${SLURM_RESTART_COUNT:-0}
if [[ $code -eq $TRY_AGAIN && ! -e $run/stop && $round -lt $MAX_ROUNDS ]]; then
  echo "saved after SIGTERM; into the queue again, round $((round + 1))"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
