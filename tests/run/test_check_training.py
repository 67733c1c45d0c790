"""What can be computed but not trained."""

import dataclasses
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from shortcut_jax import bench, cli, train
from shortcut_jax.config.checks import from_config
from shortcut_jax.diagnostics import dry_run
from shortcut_jax.errors import ConfigError
from shortcut_jax.run.check_training import assemble_training, check_training, decay_notice
from tests.helpers import POST_TRAINING, tiny_assembly, tiny_config


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model__param_dtype": "bfloat16"}, r"model\.param_dtype=bfloat16 with train=all loses updates .* set model"),
        ({"model__param_dtype": "float16"}, r"model\.param_dtype=float16 with train=all loses updates"),
        ({"model__compute_dtype": "float16"}, r"model\.compute_dtype=float16 needs loss scaling, .*dtype=bfloat16"),
        ({**POST_TRAINING, "model__compute_dtype": "float16"}, r"model\.compute_dtype=float16 needs loss scaling"),
        ({"grad_reduce_dtype": "float16"}, r"^grad_reduce_dtype=float16 needs loss scaling"),
        ({"ema__slow": 0.9}, r"ema\.slow=0\.9 must be greater than ema\.fast=0\.99"),
        ({"ema__slow": 0.99}, r"ema\.slow=0\.99 must be greater than ema\.fast=0\.99"),
    ],
)
def test_what_trains_badly_is_refused_with_the_reason(changes, line):
    settings = from_config(tiny_config(**changes))  # as a stored config it can still be read
    with pytest.raises(ConfigError, match=line) as refused:
        check_training(settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__compute_dtype": "bfloat16", "grad_reduce_dtype": "bfloat16"},
        {**POST_TRAINING, "model__param_dtype": "bfloat16"},  # the base is bfloat16 anyway, the adapters are float32
    ],
)
def test_what_trains_well_is_not_refused(changes):
    check_training(from_config(tiny_config(**changes)))


def test_an_update_below_the_resolution_of_bfloat16_is_lost():
    """Why `param_dtype=bfloat16` is refused: a weight of 0.05 stays where an update of 2e-4 / 2 would move it."""
    weight = jnp.asarray(0.05, jnp.bfloat16)
    assert weight - jnp.asarray(1e-4, jnp.bfloat16) == weight
    assert jnp.float32(0.05) - jnp.float32(1e-4) != jnp.float32(0.05)


@pytest.mark.parametrize("changes", [{}, {"model__compute_dtype": "bfloat16"}, POST_TRAINING])
def test_weights_moments_and_averages_are_float32(changes):
    state = tiny_assembly(**changes).state_shapes
    trained = (state.params, state.opt_state, state.ema)
    dtypes = {x.dtype for x in jax.tree.leaves(trained) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert dtypes == {jnp.dtype("float32")}


@pytest.mark.parametrize("changes", [{}, POST_TRAINING])
def test_a_decay_pattern_that_matches_nothing_is_refused_with_paths(changes):
    settings = from_config(tiny_config(**changes, optimizer__decay_paths="kernel"))
    with pytest.raises(ConfigError, match=r"decay_paths='kernel' matches no parameter: .* such as \w+/[\w/]+ or \w+"):
        assemble_training(settings, jax.devices()[:1])


def test_decay_that_applies_to_no_adapter_is_noticed():
    assembly = tiny_assembly(**POST_TRAINING)
    (line,) = decay_notice(assembly)
    assert line.startswith("optimizer.weight_decay=0.1 applies to no parameter: optimizer.decay_paths='.*/kernel'")
    for changes in ({"weight_decay": 0.0}, {"decay_paths": ".*/[ab]"}):
        optimizer = dataclasses.replace(assembly.settings.optimizer, **changes)
        changed = SimpleNamespace(
            settings=dataclasses.replace(assembly.settings, optimizer=optimizer), state_shapes=assembly.state_shapes
        )
        assert decay_notice(changed) == []
    assert decay_notice(tiny_assembly()) == []


@pytest.mark.parametrize("extra", [[], ["--dry_run"]])
def test_training_and_dry_runs_refuse_before_anything_is_compiled(extra, one_device, tmp_path, data_dir):
    argv = ["train", "--config=configs/digits.py", f"--config.data.dir={data_dir}", *extra]
    argv += [] if extra else [f"--workdir={tmp_path}/run"]
    with pytest.raises(ConfigError, match="loses updates"):
        train.main([*argv, "--config.model.param_dtype=bfloat16"])
    with pytest.raises(ConfigError, match="matches no parameter"):
        train.main([*argv, "--config.optimizer.decay_paths=x"])
    assert not (tmp_path / "run").exists()


def test_bench_refuses_alike(one_device):
    with pytest.raises(ConfigError, match="needs loss scaling"):
        bench.main(["bench", "--config=configs/digits.py", "--config.model.compute_dtype=float16"])


def test_a_dry_run_says_what_is_unused(one_device, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "_print_row", lambda *row: sys.exit("enough"))  # before anything is compiled
    with pytest.raises(SystemExit, match="enough"):
        dry_run.run(from_config(tiny_config(objective="flow", jumps=4)), None, None)
    assert "unused with objective=flow: student_steps, jumps" in capsys.readouterr().out


def test_commands_print_one_line(capsys):
    with pytest.raises(SystemExit):
        cli.run(bench.main, ["bench", "--config=configs/digits.py", "--config.ema.slow=0.5"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ema.slow=0.5 must be greater than ema.fast=0.99")


def test_float8_is_refused_on_devices_without_it(monkeypatch):
    asked = []
    monkeypatch.setattr("shortcut_jax.run.check_training.require_float8", lambda *args: asked.append(args))
    assemble_training(from_config(tiny_config(model__matmul_dtype="float8")), jax.devices()[:1])
    assert asked == [(jax.devices()[0], "model.matmul_dtype", "float8")]
