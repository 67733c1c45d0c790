#!/usr/bin/env bash
# Several processes on this machine:  launch/local.sh N [--restarts=R] --config=configs/digits.py [flags of training]
# GPUs are divided among them, if there are enough; of other devices each sees all, JAX_NUM_CPU_DEVICES=2 gives each two
# simulated ones. SIGTERM and Ctrl-C go to all of them. With R they start again up to R times after exit code 75 (peers
# were lost) or above 128 (killed or aborted), but not after Ctrl-C or a signal to this script. Exit code: of an error
# before that of Ctrl-C (130), before 75, before that of a signal; 0 if all are well.
set -um # with job control, so that Ctrl-C reaches the processes once, from here

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  sed -n 's/^# //; 2,6p' "$0" >&2
  exit 1
fi
num=$1 restarts=${RESTARTS:-0} python=${PYTHON:-python} stopped=
shift
if [[ ${1:-} == --restarts=* ]]; then
  restarts=${1#--restarts=}
  shift
fi

gpus=()
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU '); then
  for ((index = 0; index < count; index++)); do gpus+=("$index"); done
fi
share=$((${#gpus[@]} / num)) # the same for all; 0 where there are too few

processes=()
stop() {
  stopped=$1
  ((${#processes[@]})) && kill -s "$1" "${processes[@]}" 2>/dev/null
}
trap 'stop TERM' TERM
trap 'stop INT' INT

rank() { # how much an exit code says
  case $1 in 0) echo 0 ;; 75) echo 2 ;; 130) echo 3 ;; *) (($1 > 128)) && echo 1 || echo 4 ;; esac
}

train() { # as process $1
  local index=$1 IFS=,
  shift
  ((share == 0)) || export CUDA_VISIBLE_DEVICES="${gpus[*]:index*share:share}"
  JAX_PROCESS_ID=$index exec "$python" -m shortcut_jax.train "$@"
}

run() { # starts all, waits for all; the exit code is in $result
  local address port code index
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  address=127.0.0.1:$port
  processes=() result=0
  for ((index = 0; index < num; index++)); do
    JAX_COORDINATOR_ADDRESS=$address JAX_NUM_PROCESSES=$num train "$index" "$@" &
    processes+=($!)
  done
  [[ -z $stopped ]] || stop "$stopped" # it came before all were started
  for ((index = 0; index < num; index++)); do
    while kill -0 "${processes[index]}" 2>/dev/null; do
      wait "${processes[index]}" # a trap ends this wait, not the process
    done
    wait "${processes[index]}"
    code=$?
    echo "process $index: exit code $code" >&2
    (($(rank "$code") > $(rank "$result"))) && result=$code
  done
}

for ((attempt = 0; ; attempt++)); do
  run "$@"
  if [[ -n $stopped ]] || ((attempt >= restarts || !(result == 75 || (result > 128 && result != 130)))); then
    exit "$result"
  fi
  echo "exit code $result: restart $((attempt + 1)) of $restarts" >&2
done
