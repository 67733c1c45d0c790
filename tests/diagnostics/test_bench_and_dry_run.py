import dataclasses
import functools
import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from shortcut_jax import bench, cli, train
from shortcut_jax.config.checks import from_config
from shortcut_jax.config.vary import variants
from shortcut_jax.diagnostics import compiled_step, dry_run
from shortcut_jax.diagnostics.roofline import Efficiencies
from shortcut_jax.diagnostics.sampling_times import Timed, share
from shortcut_jax.errors import TargetError
from shortcut_jax.runtime.device_table import DEVICES
from tests.helpers import BOTH_BLOCKS, tiny_config

TINY = [
    "--config=configs/digits.py",
    "--config.model.preset=tiny",
    "--config.model.double_blocks=0",
    "--config.batch_size=32",
    "--config.mesh.data=1",
    "--config.student_weights=()",
    "--config.student_steps=(1,2,4)",
]


@pytest.mark.slow
def test_bench_times_two_values_in_turn_and_prints_their_ratio(one_device, capsys):
    assert bench.main(["bench", *TINY, "--vary=objective=flow,scfm", "--steps=4", "--stretch=2"]) == 0
    _, flow, scfm = capsys.readouterr().out.strip().splitlines()
    pattern = r"objective=\w+: [\d.]+ ms a step, [\d.]+ images/s, [\d.e+]+ FLOP a step, [\d.e+-]+ TFLOP/s"
    assert re.match(pattern, flow) and re.match(pattern, scfm)
    assert re.search(r"[\d.]+ x the time of objective=flow", scfm)


def test_sampling_is_timed_at_every_batch_and_step_count(one_device, capsys):
    assert bench.main(["bench", *TINY, "--sample", "--batches=1,3", "--counts=1,2", "--turns=2"]) == 0
    _, _, head, _, one, three = capsys.readouterr().out.strip().splitlines()
    assert re.search(r"1 step +\| 2 steps +\| \(time - fixed\) / share of 2 steps", head)
    pattern = r" +\| [\d.]+ s +\| [\d.e+-]+ ms +(\| [\d.e+]+ ms, [\d.e+]+/s +){2}\| 1: -?[\d.]+ x"
    assert re.match(r"\| 1" + pattern, one) and re.match(r"\| 3" + pattern, three)


def test_a_step_is_judged_by_its_share_of_many_beside_the_fixed_part():
    seconds = {n: [0.5 + n * s for s in (1.0, 2.0, 3.0)] for n in (4, 32)}
    timed = Timed(1, 0.0, seconds, [0.5] * 3)
    assert share(timed, 4, 32) == pytest.approx(8.0 / (64.5 / 8))


@pytest.mark.parametrize(
    ("vary", "expected"),
    [
        ("ema.warmup=true,False", [True, False]),
        ("student_steps=(1,2),[1,2,4]", [(1, 2), (1, 2, 4)]),
        ("optimizer.learning_rate=1,2e-3", [1.0, 2e-3]),
        ("model.width=None,32", [None, 32]),
        ("optimizer.decay_paths=.*,7", [".*", "7"]),
        ("steps=3,4", [3, 4]),
    ],
)
def test_values_of_every_type_can_be_varied(vary, expected):
    options = SimpleNamespace(config=tiny_config(), vs=None, vary=vary)
    key = vary.split("=")[0].split(".")
    read = lambda settings: functools.reduce(getattr, key, settings)
    assert [read(settings) for _, settings in bench._variants(options)] == expected


def test_two_configs_can_be_compared_and_exactly_the_steps_asked_for_are_timed(
    one_device, tmp_path, monkeypatch, capsys
):
    other = tmp_path / "other.py"
    other.write_text(
        "from tests.helpers import tiny_config\n\n\ndef get_config():\n    return tiny_config(objective='flow')\n"
    )
    stretches = []
    real = bench.Contender.run
    monkeypatch.setattr(
        bench.Contender, "run", lambda c, n, count=True: stretches.append((c.name, n, count)) or real(c, n, count)
    )
    assert bench.main(["bench", *TINY, f"--vs={other}", "--steps=5", "--stretch=3"]) == 0
    assert [s for s in stretches if s[2]] == [
        ("config", 3, True),
        ("vs", 3, True),
        ("config", 2, True),
        ("vs", 2, True),
    ]
    _, first, second = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("config: ") and second.startswith("vs: ") and "x the time of config" in second


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        (["--vary=nothing=1,2"], "'nothing' cannot be set to '1'"),
        (["--vary=steps=few"], "steps is 'few', but must be int"),
        (["--vary=ema.warmup=true,2"], "ema.warmup is 2, but must be bool"),
        (["--vary=model=1,2"], "'model' cannot be set to '1'"),
        (["--vs=configs/digits.py", "--vary=seed=0,1"], "give --vs or --vary, not both"),
        (["--steps=0"], "must be at least 1"),
        (["--sample", "--counts=0"], "--counts=0, but must be whole numbers"),
        (["--sample", "--turns=0"], "--turns is 0"),
        (["--vary=objective=flow,magic"], "objective is 'magic'"),
    ],
)
def test_bench_refuses_in_one_line(extra, pattern, one_device, capfd):
    with pytest.raises(SystemExit) as stop:
        cli.run(bench.main, ["bench", *TINY, *extra])
    assert stop.value.code == 1
    assert pattern in capfd.readouterr().err


@pytest.mark.slow
def test_a_dry_run_prints_what_a_run_needs_and_judges_memory(capsys, monkeypatch):
    settings = from_config(tiny_config(**BOTH_BLOCKS, mesh__fsdp=8, batch_size=64))
    assert dry_run.run(settings, None, 1.0) == 0
    out = capsys.readouterr().out
    for part in ("parameters", "124,164", "model FLOPs a step", "arguments a device", "temporaries a device"):
        assert part in out
    assert re.search(r"collectives +\d+ all-gather, \d+ all-reduce.* \(right after partitioning\)", out)
    assert "fits" in out
    assert "step time" not in out
    # As if the program were of devices whose figures are known.
    monkeypatch.setattr(compiled_step, "device_spec", lambda device: DEVICES[0])
    assert dry_run.run(settings, None, 1e-6, explained=True) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out and re.search(r"step time +[\d.]+ ms, MFU [\d.]+%, \S+ samples/s a device", out)
    assert re.search(r"\n\| all  .*\n\nthe update reads and writes \d+ bytes a parameter\n\n\| collective ", out)
    # Nothing is computed twice at this size, and each product is found: the program executes what the model has.
    assert float(re.search(r"executed +([\d.]+) x the model FLOPs", out)[1]) == pytest.approx(1, abs=0.03)


def test_programs_are_compared_side_by_side(capsys, monkeypatch, one_device):
    config = tiny_config(objective="flow")
    pair = variants(config, "compare", "batch_size=32,64")
    assert dry_run.compare(pair, None, None, None) == 0
    *lines, _, said = capsys.readouterr().out.splitlines()[2:]
    assert said == "step times are not known: cpu is not in the table of devices (see --target)"
    head, one, two = (re.split(r"  +", line) for line in lines)
    assert (one[0], two[0]) == ("batch_size=32", "batch_size=64") and one[1:6] == ["-"] * 5 and len(one) == len(head)
    monkeypatch.setattr(compiled_step, "device_spec", lambda device: DEVICES[0])
    assert dry_run.compare(pair[:1], None, 1e-6, Efficiencies(gemm=0.1)) == 1
    (line,) = capsys.readouterr().out.splitlines()[3:]
    assert "%" in line and line.endswith("does not fit 1e-06 GB")
    # Of a TPU nothing is said that is not known.
    monkeypatch.setattr(compiled_step, "device_spec", lambda device: DEVICES[-1])
    monkeypatch.setattr(compiled_step.CompiledStep, "kind", "TPU v6 lite")
    assert dry_run.compare(pair[:1], None, None, None) == 0
    assert "not known: programs of TPU v6 lite are not read that far" in capsys.readouterr().out


def test_targets_are_checked(capfd):
    for argv, pattern in (
        (["--dry_run", "--target=gpu:8"], "must be cpu:N"),
        (["--dry_run", "--target=cpu:0"], "must be cpu:N"),
        (["--dry_run", "--target=gpu:h100:1"], "gpu:a100|b200|h100|h200:NODESxGPUS"),
        (["--target=cpu:8"], "go with --dry_run"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.run(train.main, ["train", "--config=configs/digits.py", *argv])
        assert stop.value.code == 1
        assert pattern in capfd.readouterr().err


@pytest.mark.slow
def test_a_dry_run_for_other_devices_exits_by_their_memory():
    argv = [sys.executable, "-m", "shortcut_jax.train", *TINY, "--config.mesh.fsdp=2", "--dry_run", "--target=cpu:2"]
    done = subprocess.run([*argv, "--device_memory_gb=0.001"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "mesh data 1 x fsdp 2 x tensor 1 on cpu" in done.stdout
    assert "of 0.001 GB a device: does not fit" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="the plugin is there")
def test_a_gpu_target_says_what_to_install():
    with pytest.raises(TargetError, match=r"pip install '\.\[cuda\]' \(no GPU is needed\)"):
        dry_run.run(from_config(tiny_config()), "gpu:h100:1x8", None)


@pytest.mark.slow
def test_distillation_of_flux_tells_its_bytes_by_kind(capsys, one_device):
    settings = from_config(_config("flux_distill"))
    shallow = dataclasses.replace(settings.model, double_blocks=1, single_blocks=1)
    settings = _with_remat(dataclasses.replace(settings, model=shallow), "full")
    dry_run.run(settings, None, None)
    out = capsys.readouterr().out
    size = lambda name: float(re.search(rf"{name} +([\d.]+) GB", out)[1])
    count = lambda name: int(re.search(rf"{name} +([\d,]+)", out)[1].replace(",", ""))
    parameters, adapters = count("parameters"), count("adapters")
    assert size("frozen base") == pytest.approx(2 * parameters / 1e9, abs=0.01)
    assert size("trained weights") == pytest.approx(4 * adapters / 1e9, abs=0.01)
    assert size("moments") == size("fast and slow EMA") == pytest.approx(8 * adapters / 1e9, abs=0.01)


def _with_remat(settings, policy):
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, remat=policy))


def _config(name):
    return runpy.run_path(f"configs/{name}.py")["get_config"]()


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_can_be_resolved(path):
    from_config(_config(path.stem))


def test_distillation_of_flux_is_the_published_recipe():
    for name, limit, warmup in (
        ("flux_distill_published", 0, False),
        ("flux_distill", 0, True),
        ("flux_fewshot", 10, True),
    ):
        s = from_config(_config(name))
        assert (s.optimizer.learning_rate, s.optimizer.schedule, s.optimizer.clip_norm) == (2e-5, "constant", 10.0)
        assert (s.batch_size, s.lora.rank, s.lora.alpha, s.lora.paths) == (8, 64, 64.0, ".*")
        assert (s.teacher_share, s.teacher_grid, s.jumps, s.student_steps) == (0.4, 32, 2, (1, 2, 4, 8))
        assert (s.rows.self_rows, s.rows.flow_rows) == (1, 0)
        assert (s.guidance, s.guidance_mode) == ((0.0, 7.5), "embedded")
        assert (s.shift.low, s.shift.high, s.shift.dynamic) == (2.5, 4.5, 0.1)
        assert (s.data.height, s.data.width, s.data.text_tokens, s.data.limit) == (512, 512, 256, limit)
        assert (s.ema.fast, s.ema.slow, s.ema.warmup) == (0.99, 0.999, warmup)


@pytest.mark.slow
def test_the_pod_config_compiles_for_eight_devices_at_twenty_bytes_a_parameter(capsys):
    settings = _with_remat(from_config(_config("flux_pretrain")), "full")  # what fits on CPUs, too
    assert dry_run.run(settings, None, 80.0) == 0
    out = capsys.readouterr().out
    assert "11,891,178,560" in out
    arguments = float(re.search(r"arguments a device +([\d.]+) GB", out)[1])
    assert arguments == pytest.approx(11_891_178_560 * 20 / 8 / 1e9, rel=0.01)
