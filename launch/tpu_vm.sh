#!/usr/bin/env bash
# TPU VMs without Kubernetes; on every host of a slice runs the same command, and JAX finds the others by itself.
#   launch/tpu_vm.sh create   NAME        a queued resource (TYPE=v5p-16, RUNTIME=v2-alpha-tpuv5; SPOT=1 for a spot one)
#   launch/tpu_vm.sh install  NAME        copies this repository to all hosts and installs it
#   launch/tpu_vm.sh train    NAME --config=configs/flux_pretrain.py --workdir=DIR   DIR: on a disk that all hosts mount
#   launch/tpu_vm.sh follow   NAME        shows the output again, after the connection was lost
#   launch/tpu_vm.sh stop     NAME        SIGTERM on all hosts: training saves and exits with 75
#   launch/tpu_vm.sh delete   NAME
# ZONE has to be set. `train` starts again up to RESTARTS times (20) after exit code 75, or above 128 but for Ctrl-C's 130
# (killed or aborted). It goes on without this terminal, which only follows train.log of the hosts. A spot slice that was
# taken back is gone: delete, create, install and train go on from the last checkpoint.
set -euo pipefail

if [[ ${1:-} == loop ]]; then # on a host, in the folder of the repository: `train` of there
  restarts=$2
  shift 2
  for ((attempt = 0; ; attempt++)); do
    .venv/bin/python -m shortcut_jax.train "$@" &
    echo $! >train.pid
    [[ ! -e stop ]] || kill -s TERM $! || true # it came before the process was known
    code=0
    wait $! || code=$?
    if [[ -e stop ]] || ((attempt >= restarts || !(code == 75 || (code > 128 && code != 130)))); then
      echo "exit code $code"
      exit "$code"
    fi
    echo "exit code $code: restart $((attempt + 1)) of $restarts"
  done
fi

if (($# < 2)) || [[ -z ${ZONE:-} ]]; then
  sed -n 's/^# //; 2,11p' "$0" >&2
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
    # The Python of the image may be too old.
    on_all "tar xzf shortcut_jax.tar.gz && cd shortcut_jax && python3 -m pip install --user uv &&
      export PATH=~/.local/bin:\$PATH && uv venv --clear --python 3.12 .venv && uv pip install -p .venv -e '.[tpu]'"
    ;;
  train)
    on_all "cd shortcut_jax || exit 1
      if kill -0 \$(cat loop.pid 2>/dev/null) 2>/dev/null; then echo 'training runs already' >&2; exit 1; fi
      rm -f stop; : >train.log
      nohup bash launch/tpu_vm.sh loop ${RESTARTS:-20} $(printf '%q ' "$@") >>train.log 2>&1 </dev/null &
      echo \$! >loop.pid
      tail -n +1 -f --pid=\$! train.log
      wait \$!"
    ;;
  follow) on_all "cd shortcut_jax && tail -n +1 -f --pid=\$(cat loop.pid) train.log" ;;
  stop) on_all "cd shortcut_jax && touch stop && kill -TERM \$(cat train.pid)" ;;
  delete) gcloud compute tpus queued-resources delete "$name" --zone="$ZONE" --force ;;
  *)
    echo "unknown action $action: create, install, train, follow, stop or delete" >&2
    exit 1
    ;;
esac
