"""The scripts of launch/: what can be known of them without a cluster, and local.sh for real."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from shortcut_jax.runtime.checkpoint import Checkpoints
from shortcut_jax.runtime.device_table import USABLE

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"])


@pytest.fixture
def commands(tmp_path):
    """Writes small programs that stand in for others; returns the variables that let scripts find them."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(**programs):
        for name, text in programs.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (folder / name).chmod(0o755)
        variables = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k != "XLA_FLAGS"}
        return {**variables, "PATH": f"{folder}:{os.environ['PATH']}"}

    return make


def _run(argv, env, **more):
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, cwd=ROOT, **more)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(script):
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    done = subprocess.run([checker, "-x", str(script)], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stdout


def _flags(**variables):
    line = "source launch/gpu_env.sh && env"
    base = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = _run(["bash", "-euc", line], {**base, **variables})
    assert done.returncode == 0, done.stderr
    return dict(text.split("=", 1) for text in done.stdout.splitlines() if "=" in text)


def test_xla_knows_every_flag_for_gpus():
    """XLA aborts where it does not; it reads the flags of all platforms on any of them."""
    variables = _flags()
    names = re.findall(r"--(\w+)=", variables["XLA_FLAGS"])
    assert len(names) == len(set(names)) >= 3
    program = [sys.executable, "-c", "import jax; jax.devices()"]
    known = _run(program, {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": variables["XLA_FLAGS"]})
    assert known.returncode == 0, known.stderr
    unknown = _run(program, {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_no_such_flag=1"})
    assert unknown.returncode != 0 and "Unknown flag" in unknown.stderr


def test_what_a_step_may_need_is_judged_by_the_memory_that_jax_gets():
    assert float(_flags()["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == USABLE


def test_what_is_set_already_stays():
    variables = _flags(XLA_FLAGS="--xla_mine=1", NCCL_DEBUG="INFO")
    assert variables["XLA_FLAGS"].endswith(" --xla_mine=1") and variables["NCCL_DEBUG"] == "INFO"


def test_the_image_runs_its_command_with_the_flags_of_gpus_only_there():
    text = (LAUNCH / "Dockerfile").read_text()
    entry = yaml.safe_load(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1])
    show = ["bash", "-c", 'echo "${XLA_FLAGS:-none} $1"', "show", "a b"]
    base = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    assert "first_collective" in (out := _run([*entry, *show], {**base, "EXTRA": "cuda"}).stdout) and "a b" in out
    assert _run([*entry, *show], {**base, "EXTRA": "tpu"}).stdout == "none a b\n"
    copied = re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)
    assert copied and all((ROOT / name).exists() for line in copied for name in line.split())


# Fields of jobset.x-k8s.io/v1alpha2 and batch/v1, by path; a misspelt one would be refused by the cluster, or ignored.
FIELDS = {
    "": "apiVersion kind metadata spec",
    "metadata": "name namespace labels annotations",
    "spec": "coordinator failurePolicy managedBy network replicatedJobs startupPolicy successPolicy suspend "
    "ttlSecondsAfterFinished volumeClaimPolicies",
    "spec.failurePolicy": "maxRestarts restartStrategy rules",
    "spec.network": "enableDNSHostnames publishNotReadyAddresses subdomain",
    "spec.replicatedJobs": "name groupName replicas template dependsOn",
    "spec.replicatedJobs.template": "metadata spec",
    "spec.replicatedJobs.template.spec": "activeDeadlineSeconds backoffLimit backoffLimitPerIndex completionMode "
    "completions managedBy manualSelector maxFailedIndexes parallelism podFailurePolicy podReplacementPolicy selector "
    "successPolicy suspend template ttlSecondsAfterFinished",
    "spec.replicatedJobs.template.spec.template": "metadata spec",
    "spec.replicatedJobs.template.spec.template.spec": "affinity containers dnsPolicy hostNetwork imagePullSecrets "
    "initContainers nodeSelector priorityClassName restartPolicy serviceAccountName terminationGracePeriodSeconds "
    "tolerations volumes",
    "spec.replicatedJobs.template.spec.template.spec.containers": "args command env envFrom image imagePullPolicy name "
    "ports resources securityContext volumeMounts workingDir",
}


def _check_fields(node, path=""):
    if isinstance(node, list):
        for item in node:
            _check_fields(item, path)
    elif path in FIELDS:
        assert set(node) <= set(FIELDS[path].split()), path
        for key, value in node.items():
            _check_fields(value, f"{path}.{key}".lstrip("."))


@pytest.mark.parametrize("variant", ["gpu", "tpu"])
def test_job_sets_are_what_kubernetes_reads(variant):
    sets = list(yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text()))
    (job_set,) = [s for s in sets if s["metadata"]["labels"]["variant"] == variant]
    _check_fields(job_set)
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = job_set["spec"]
    assert spec["failurePolicy"]["maxRestarts"] > 0 and spec["network"]["enableDNSHostnames"] is True
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    assert container["args"][:3] == ["python", "-m", "shortcut_jax.train"]
    assert (ROOT / container["args"][3].removeprefix("--config=")).is_file()
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    if variant == "gpu":
        env = {e["name"]: e.get("value") for e in container["env"]}
        host = f"{job_set['metadata']['name']}-{replicated['name']}-0-0.{job_set['metadata']['name']}"
        assert env["JAX_COORDINATOR_ADDRESS"] == f"{host}:{container['ports'][0]['containerPort']}"
        assert int(env["JAX_NUM_PROCESSES"]) == job["completions"] * replicated["replicas"]
        assert "JAX_PROCESS_ID" in env


# As the real one, srun kills its tasks when it gets SIGTERM; scancel sends it to the tasks themselves, which save.
TASK = 'trap "kill \\$!; exit 75" TERM; sleep "${SLEEP:-0}" >/dev/null & echo $$ >"$0"; wait $!; exit "${CODE:-0}"'
SRUN = f"""
tasks=$(dirname "$0")/tasks
trap 'kill -s KILL $(cat "$tasks"); exit 137' TERM
bash -c '{TASK}' "$tasks" & task=$!
until [[ -s $tasks ]]; do sleep 0.05; done
echo "srun $*"
wait $task
"""
SCANCEL = 'echo "scancel $*"; kill -s TERM $(cat "$(dirname "$0")/tasks")'
SCONTROL = 'echo "scontrol $*"'


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, "", False),
        (1, "", False),
        (130, "", False),
        (75, "", True),
        (75, "3", True),
        (75, "20", False),
        (134, "", True),
    ],
)
def test_slurm_queues_again_what_may_succeed_the_next_time(commands, code, restarts, requeued):
    env = commands(srun=SRUN, scontrol=SCONTROL) | {"SLURM_JOB_ID": "77", "CODE": str(code)}
    env |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    done = _run(["bash", "launch/slurm.sbatch", "--config=configs/digits.py", "--workdir=a b"], env)
    assert done.returncode == code, done.stderr
    assert "-m shortcut_jax.train --config=configs/digits.py --workdir=a b" in done.stdout
    assert ("scontrol requeue 77" in done.stdout) == requeued


def test_slurm_hands_sigterm_on_to_the_tasks_and_waits_for_what_is_saved(commands):
    env = commands(srun=SRUN, scancel=SCANCEL, scontrol=SCONTROL) | {"SLURM_JOB_ID": "77", "SLEEP": "60"}
    job = subprocess.Popen(["bash", "launch/slurm.sbatch"], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline().startswith("srun ")
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 75 and "scontrol requeue 77" in out
    assert "scancel --signal=TERM 77\n" in out  # no --batch, no --full: it would come back to the script


def test_slurm_runs_in_a_container_if_one_is_named(commands):
    env = commands(srun=SRUN, scontrol=SCONTROL) | {"SLURM_JOB_ID": "77", "CONTAINER": "image.sqsh"}
    assert "--container-image=image.sqsh" in _run(["bash", "launch/slurm.sbatch"], env).stdout


# Stands in for Python: a port, or training that ends with the next word of $CODES of its process.
TRAINER = """
if [[ $1 == -c ]]; then echo 12345; exit; fi
echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $*"
read -ra codes <<<"$(cut -d, -f$((JAX_PROCESS_ID + 1)) <<<"$CODES")"
count=$(cat "$COUNTS/$JAX_PROCESS_ID" 2>/dev/null || echo 0)
echo $((count + 1)) >"$COUNTS/$JAX_PROCESS_ID"
code=${codes[count]}
if ((code > 128)) && ((code != 130)); then kill -s $((code - 128)) $$; fi
exit "$code"
"""


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "attempts"),
    [
        ("0,0", 0, 0, 1),
        ("75,75", 0, 75, 1),
        ("75 0,75 0", 3, 0, 2),
        ("75 75 75,75 75 75", 2, 75, 3),
        ("137 0,75 0", 1, 0, 2),  # one was killed, the other saw it
        ("137,137", 0, 137, 1),
        ("137 0,137 0", 1, 0, 2),
        ("134 134,134 134", 1, 134, 2),
        ("75,1", 5, 1, 1),
        ("75,130", 5, 130, 1),
        ("130,137", 5, 130, 1),
    ],
)
def test_local_restarts_and_its_exit_code(commands, tmp_path, codes, restarts, code, attempts):
    env = commands(trainer=TRAINER) | {"PYTHON": "trainer", "CODES": codes, "COUNTS": str(tmp_path)}
    done = _run(["launch/local.sh", "2", f"--restarts={restarts}", "--config=a b"], env)
    assert done.returncode == code, done.stderr
    assert done.stdout.count("1 of 2 at 127.0.0.1:12345: -m shortcut_jax.train --config=a b\n") == attempts
    assert "process 1: exit code" in done.stderr


@pytest.mark.parametrize(
    ("number", "visible", "shares"),
    [
        (4, None, {"0,1", "2,3"}),
        (5, None, {"0,1", "2,3"}),
        (2, None, {"0", "1"}),
        (1, None, {"all"}),
        (0, None, {"all"}),
        (4, "5,7", {"5", "7"}),
        (4, "", {""}),
    ],
)
def test_local_divides_gpus_among_the_processes(commands, number, visible, shares):
    smi = f'for ((i = 0; i < {number}; i++)); do echo "GPU $i: NVIDIA H100"; done'
    trainer = '[[ $1 == -c ]] && echo 12345 || echo "share ${CUDA_VISIBLE_DEVICES-all}"'
    env = commands(**{"nvidia-smi": smi, "trainer": trainer}) | {"PYTHON": "trainer"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    done = _run(["launch/local.sh", "2"], env | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and set(lines) == {f"share {share}" for share in shares}


# Runs the command on a host whose home is $HOST, of which the terminal sees the output.
GCLOUD = 'for word; do case $word in --command=*) cd "$HOST" && exec bash -c "${word#--command=}" ;; esac; done'


@pytest.fixture
def host(commands, tmp_path):
    """The variables for tpu_vm.sh, and the folder of the repository on the host, where TRAINER is Python."""
    env = commands(gcloud=GCLOUD)
    folder = tmp_path / "home" / "shortcut_jax"
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(LAUNCH, folder / "launch")
    variables = {"ZONE": "z", "HOST": str(folder.parent), "COUNTS": str(tmp_path), "JAX_PROCESS_ID": "0"}

    def make(python):
        (folder / ".venv" / "bin" / "python").write_text(f"#!/usr/bin/env bash\n{python}\n")
        (folder / ".venv" / "bin" / "python").chmod(0o755)
        return env | variables, folder

    return make


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "attempts"),
    [("0", 3, 0, 1), ("75 137 134 0", 3, 0, 4), ("75 75", 1, 75, 2), ("1", 3, 1, 1), ("130", 3, 130, 1)],
)
def test_tpu_vm_restarts_and_its_exit_code(host, codes, restarts, code, attempts):
    env, folder = host(TRAINER)
    argv = ["bash", "launch/tpu_vm.sh", "train", "name", "--config=a b"]
    done = _run(argv, env | {"CODES": codes, "RESTARTS": str(restarts)})
    assert done.returncode == code, done.stderr
    assert done.stdout.count("-m shortcut_jax.train --config=a b\n") == attempts
    assert done.stdout.endswith(f"exit code {code}\n") and (folder / "train.log").read_text() == done.stdout


def test_tpu_vm_installs_a_python_that_is_new_enough(commands, host):
    env, folder = host("")
    commands(git="", tar="", python3='echo "python3 $*"', uv='echo "uv $PWD $*"')
    done = _run(["bash", "launch/tpu_vm.sh", "install", "name"], env)
    assert done.returncode == 0, done.stderr
    pip, venv, package = done.stdout.splitlines()
    assert pip == "python3 -m pip install --user uv" and venv == f"uv {folder} venv --clear --python 3.12 .venv"
    assert package == f"uv {folder} pip install -p .venv -e .[tpu]"


def test_tpu_vm_goes_on_without_its_terminal_until_it_is_stopped(host):
    env, _ = host('trap "kill \\$!; echo saved; exit 75" TERM; sleep 60 & echo started; wait $!')
    argv = ["bash", "launch/tpu_vm.sh"]
    terminal = subprocess.Popen(
        [*argv, "train", "name"],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the suite itself may run under nohup
    )
    assert terminal.stdout.readline() == "started\n"
    os.killpg(terminal.pid, signal.SIGHUP)
    terminal.wait(timeout=30)
    again = _run([*argv, "train", "name"], env)
    assert again.returncode == 1 and again.stderr == "training runs already\n"
    follower = subprocess.Popen([*argv, "follow", "name"], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert follower.stdout.readline() == "started\n"
    assert _run([*argv, "stop", "name"], env).returncode == 0
    assert follower.communicate(timeout=30)[0] == "saved\nexit code 75\n"


def test_local_needs_a_number(commands):
    done = _run(["launch/local.sh", "--config=configs/digits.py"], commands())
    assert done.returncode == 1 and done.stderr.startswith("Several processes on this machine")


@pytest.mark.slow
def test_two_local_processes_save_at_sigterm_and_go_on(tmp_path, arguments):
    workdir = tmp_path / "run"
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COORD")}
    env |= {"XLA_FLAGS": env["XLA_FLAGS"].replace("device_count=8", "device_count=2"), "PYTHON": sys.executable}

    def start(*extra):
        mesh = dict(objective="flow", mesh__data=2, mesh__fsdp=2, eval__views="()", eval__images="()")
        line = [str(LAUNCH / "local.sh"), "2", *arguments(workdir, *extra, **mesh, steps=1_000_000)[1:]]
        return subprocess.Popen(line, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    first = start()
    until = time.monotonic() + 400
    while not (workdir / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=200)
    assert first.returncode == 75 and err.count(": exit code 75") == 2, err
    (step,) = Checkpoints(workdir / "checkpoints", read_only=True).steps()
    assert step > 1 and f"saved step {step} in {workdir / 'checkpoints'}" in err
    assert json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["step"] == step
    second = start(f"--stop_at={step + 1}")
    _, err = second.communicate(timeout=400)
    assert second.returncode == 0 and err.count(": exit code 0") == 2, err
    assert f"resuming at step {step}" in err
    assert re.search("1 program compiled in .* s, 1 of them kept from before", err)
    assert Checkpoints(workdir / "checkpoints", read_only=True).steps()[-1] == step + 1
