#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What one TPU VM does; tpu/pod.sh calls it on every worker of a slice.
#
#   STORAGE=gs://BUCKET bash tpu/worker.sh install
#   NAME=RUN bash tpu/worker.sh start configs/quickstart.py run.steps=1000
#   bash tpu/worker.sh status | stop | logs [--follow]
#
# The run is a systemd unit, not a child of the ssh session. When the machine is taken away systemd sends the unit
# SIGTERM before it unmounts the storage and takes the network down, so that the run can still save.
# --dry-run anywhere, or DRY_RUN=1, prints the commands instead.

set -euo pipefail

GRACE=${GRACE:-300}               # seconds from SIGTERM to SIGKILL: longer than a save takes
SAVE_EVERY=${SAVE_EVERY:-100}     # updates between two saves: what a machine that just dies may lose
STORAGE=${STORAGE:-}              # gs://BUCKET or nfs://SERVER/SHARE, the same on all workers
MOUNT=${MOUNT:-/mnt/jaxlm}        # where it is mounted; runs and the compile cache live there
PYTHON=${PYTHON:-3.12}            # jaxlm needs 3.11; the images' own may be older
DRY_RUN=${DRY_RUN:-}
UNIT=jaxlm                        # one run a machine: a TPU has one owner
CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$HOME/jaxlm-venv}

SELF=tpu/worker.sh
# shellcheck source=tpu/command.bash
source "$CODE/tpu/command.bash"

mount_storage() {
  if mountpoint --quiet "$MOUNT"; then return; fi
  call sudo mkdir -p "$MOUNT"
  case $STORAGE in
    gs://*)
      if [[ -z $DRY_RUN ]] && ! command -v gcsfuse > /dev/null; then
        fail "STORAGE=$STORAGE needs gcsfuse, which this image has not: install Cloud Storage FUSE, or use nfs://"
      fi
      call sudo chown "$(id -u):$(id -g)" "$MOUNT"
      call gcsfuse --implicit-dirs "${STORAGE#gs://}" "$MOUNT"
      ;;
    nfs://*/*)
      local share=${STORAGE#nfs://}
      call sudo apt-get install --yes nfs-common
      call sudo mount -t nfs -o hard "${share%%/*}:/${share#*/}" "$MOUNT"
      ;;
    *) fail "STORAGE must be gs://BUCKET or nfs://SERVER/SHARE, got '$STORAGE': all workers write one run directory" ;;
  esac
}

install() {
  mount_storage
  call mkdir -p "$MOUNT/runs" "$MOUNT/compile_cache"
  call python3 -m pip install --user --quiet --upgrade uv
  call python3 -m uv venv --quiet --allow-existing --python "$PYTHON" "$VENV"
  call python3 -m uv pip install --quiet --python "$VENV/bin/python" --editable "${CODE}[tpu]"
  call "$VENV/bin/python" "$CODE/scripts/train.py" --help
}

# What systemd knows: running, exited (code 0), failed, dead (never started).
substate() { systemctl show "$UNIT" --property=SubState --value; }

start() {
  [[ -n ${NAME:-} ]] || fail "NAME is not set: the run's directory is $MOUNT/runs/NAME"
  [[ $# -gt 0 ]] || fail "start needs a config, such as configs/quickstart.py"
  [[ -f $CODE/$1 ]] || fail "no config $1 in $CODE: commit it, then tpu/pod.sh install"
  if [[ -z $DRY_RUN ]]; then
    mountpoint --quiet "$MOUNT" || fail "nothing is mounted on $MOUNT: tpu/pod.sh install mounts STORAGE"
    case $(substate) in
      running | stop-*) fail "a run is going on here; tpu/pod.sh stop saves and ends it" ;;
      exited) sudo systemctl stop "$UNIT" ;;
      failed) sudo systemctl reset-failed "$UNIT" ;;
    esac
  fi
  call sudo systemd-run --unit="$UNIT" --remain-after-exit \
    --uid="$(id -u)" --gid="$(id -g)" --working-directory="$CODE" \
    --property=KillSignal=SIGTERM --property=KillMode=mixed --property=TimeoutStopSec="$GRACE" \
    --property=After=network-online.target --property=RequiresMountsFor="$MOUNT" \
    --setenv=HOME="$HOME" --setenv=PYTHONUNBUFFERED=1 --setenv=JAX_PLATFORMS=tpu,cpu \
    --setenv=JAX_COMPILATION_CACHE_DIR="$MOUNT/compile_cache" \
    "$VENV/bin/python" scripts/train.py "$1" \
    run.directory="$MOUNT/runs/$NAME" run.save_every="$SAVE_EVERY" run.bad_checkpoint=previous "${@:2}"
}

status() {
  if [[ -n $DRY_RUN ]]; then
    call systemctl show "$UNIT" --property=SubState,Result,ExecMainStatus
    return
  fi
  local state code
  state=$(substate)
  code=$(systemctl show "$UNIT" --property=ExecMainStatus --value)
  case $state:$code in
    running:*) echo "running" ;;
    stop-*) echo "stopping: the save may take $GRACE s" ;;
    exited:0) echo "finished" ;;
    dead:*) echo "not started" ;;
    *:75) echo "saved after SIGTERM, exit code 75: tpu/pod.sh resume goes on" ;;
    *) echo "failed, exit code $code: tpu/pod.sh logs says why" ;;
  esac
}

take_words "$@"
set -- ${words[@]+"${words[@]}"}  # an empty array is unset in bash 3
command=${1:-}
shift || true
case $command in
  install) install ;;
  start) start "$@" ;;
  status) status ;;
  stop) call sudo systemctl stop "$UNIT" ;; # waits for the save, at most GRACE seconds
  logs) call sudo journalctl --unit="$UNIT" --no-pager --lines=200 "$@" ;;
  *) fail "unknown command '$command'; there are install, start, status, stop, logs" ;;
esac
