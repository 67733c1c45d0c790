#!/usr/bin/env bash
# TPU VMs without Kubernetes; on every host of a slice runs the same command, and JAX finds the others by itself.
#   launch/tpu_vm.sh create   NAME        a queued resource (TYPE=v5p-16, RUNTIME=v2-alpha-tpuv5; SPOT=1 for a spot one)
#   launch/tpu_vm.sh install  NAME        copies this repository to all hosts and installs it
#   launch/tpu_vm.sh train    NAME --config=configs/flux_pretrain.py --workdir=DIR   DIR: on a disk that all hosts mount
#   launch/tpu_vm.sh stop     NAME        SIGTERM on all hosts: training saves and exits with 75
#   launch/tpu_vm.sh delete   NAME
# ZONE has to be set. `train` starts again up to RESTARTS times (20) after exit code 75. A spot slice that was taken back
# is gone: delete, create, install and train go on from the last checkpoint.
set -euo pipefail

if (($# < 2)) || [[ -z ${ZONE:-} ]]; then
  sed -n 's/^# //; 2,9p' "$0" >&2
  exit 1
fi
action=$1 name=$2
shift 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

on_all() { gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker=all --command="$1"; }

case $action in
  create)
    kind=()
    [[ -n ${SPOT:-} ]] && kind=(--spot)
    gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$ZONE" \
      --accelerator-type="${TYPE:-v5p-16}" --runtime-version="${RUNTIME:-v2-alpha-tpuv5}" "${kind[@]}"
    ;;
  install)
    git -C "$root" archive --format=tar.gz --prefix=shortcut_jax/ -o /tmp/shortcut_jax.tar.gz HEAD
    gcloud compute tpus tpu-vm scp /tmp/shortcut_jax.tar.gz "$name": --zone="$ZONE" --worker=all
    on_all 'tar xzf shortcut_jax.tar.gz && cd shortcut_jax && python3 -m venv .venv && .venv/bin/pip install -e ".[tpu]"'
    ;;
  train)
    # The loop runs on each host, so that a lost connection of this terminal does not decide anything.
    on_all "cd shortcut_jax && rm -f stop && for attempt in \$(seq 0 ${RESTARTS:-20}); do
      .venv/bin/python -m shortcut_jax.train $(printf '%q ' "$@") & echo \$! > train.pid
      code=0; wait \$! || code=\$?
      [ \$code = 75 ] && ! [ -e stop ] || break
      echo \"exit code 75, attempt \$attempt\"
    done; exit \$code"
    ;;
  stop) on_all "cd shortcut_jax && touch stop && kill -TERM \$(cat train.pid)" ;;
  delete) gcloud compute tpus queued-resources delete "$name" --zone="$ZONE" --force ;;
  *)
    echo "unknown action $action: create, install, train, stop or delete" >&2
    exit 1
    ;;
esac
