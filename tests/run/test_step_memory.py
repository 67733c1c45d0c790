"""What a step needs of a device, and the rematerialisation that `model.remat=auto` chooses by it."""

from types import SimpleNamespace

import jax
import pytest

from shortcut_jax.config.checks import from_config
from shortcut_jax.run import step_memory
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.step_memory import AUTO_POLICIES, FILLED, Needs, choose_remat, compiled_needs, needs_of
from shortcut_jax.runtime.device_table import USABLE, usable_memory
from tests.helpers import tiny_assembly, tiny_config

AUTO = Assembly(from_config(tiny_config(model__remat="auto")), jax.devices()[:1])
OF_POLICIES = {"none": 900, "branch_mlp": 600, "branch": 400, "full": 300}
"""Bytes, as a compiler might find them."""


@pytest.fixture
def nothing_by_arithmetic(monkeypatch):
    monkeypatch.setattr(step_memory, "local_bytes", lambda _: 0)
    monkeypatch.setattr(step_memory, "expected_temporaries", lambda _: {})


def _choose(limit, made_again=()):
    """The chosen policy, and those that were compiled."""
    compiled = []

    def needs(assembly):
        compiled.append(assembly.model.remat)
        return Needs(OF_POLICIES[compiled[-1]], 3 * (compiled[-1] in made_again))

    return choose_remat(AUTO, limit, needs).model.remat, compiled


@pytest.mark.usefixtures("nothing_by_arithmetic")
@pytest.mark.parametrize(
    ("limit", "chosen"), [(1000, "none"), (900 / FILLED, "none"), (900, "branch_mlp"), (500, "branch"), (320, "full")]
)
def test_the_first_policy_that_fits_is_taken_and_no_further_one_is_compiled(limit, chosen, capfd):
    assert _choose(limit) == (chosen, list(AUTO_POLICIES[: AUTO_POLICIES.index(chosen) + 1]))
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"model.remat=auto: remat={chosen} needs 0.0 GB of 0.0 GB")


@pytest.mark.usefixtures("nothing_by_arithmetic")
def test_a_policy_for_which_xla_computes_again_by_itself_is_passed_over(capfd):
    assert _choose(1000, made_again=("none", "branch_mlp"))[0] == "branch"
    assert "XLA computes 3 results again by itself" in capfd.readouterr().err


@pytest.mark.usefixtures("nothing_by_arithmetic")
def test_where_none_fits_that_is_said_and_the_least_is_taken(capfd):
    assert _choose(200) == ("full", list(AUTO_POLICIES))
    assert "no policy fits the memory of a device; taking full" in capfd.readouterr().err


def test_what_arithmetic_rules_out_is_not_compiled(capfd):
    assert _choose(1000) == ("full", [])
    assert "remat=branch needs at least 0.0 GB" in capfd.readouterr().err


@pytest.mark.usefixtures("nothing_by_arithmetic")
def test_several_processes_choose_by_the_smallest_of_their_devices(monkeypatch):
    monkeypatch.setattr(step_memory.key_value, "num_processes", lambda: 2)
    monkeypatch.setattr(step_memory.key_value, "gather", lambda _, text: {0: text, 1: "500.0"})
    assert _choose(1000)[0] == "branch"


def test_another_policy_stays_and_nothing_is_compiled():
    given = Assembly(from_config(tiny_config(model__remat="branch")), jax.devices()[:1])
    assert choose_remat(given, 1.0, lambda _: pytest.fail("compiled")) is given


@pytest.mark.slow
def test_the_choice_is_by_the_compiled_step(one_device):
    of = lambda remat: Assembly(from_config(tiny_config(model__remat=remat, batch_size=256)))
    none, full = compiled_needs(of("none")), compiled_needs(of("full"))
    assert full.bytes < none.bytes and not none.made_again
    assert choose_remat(of("auto"), none.bytes / FILLED).settings.model.remat == "none"
    chosen = choose_remat(of("auto"), full.bytes / FILLED)
    assert chosen.settings.model.remat != "none" and compiled_needs(chosen).bytes <= full.bytes


def test_what_xla_computes_again_by_itself_is_counted_and_what_we_asked_for_is_not():
    memory = SimpleNamespace(argument_size_in_bytes=5, temp_size_in_bytes=7)
    text = """
  %fusion.3.remat = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
  %fusion.3.remat2 = f32[8]{0} fusion(%fusion.3.remat), kind=kLoop, calls=%fused
  ROOT add.7.remat.1 = f32[8]{0} add(%p, %fusion.3.remat2)
  %dot.1 = f32[8]{0} dot(%p, %p), metadata={op_name="jit(train_step)/rematted_computation/dot.remat = "}
"""
    assert needs_of(memory, text) == Needs(12, 3)


def _device(kind, stats):
    def memory_stats():
        if stats is None:
            raise jax.errors.JaxRuntimeError("only supported for addressable devices")
        return stats

    return SimpleNamespace(device_kind=kind, memory_stats=memory_stats, platform="gpu")


def test_usable_memory_is_what_jax_may_take_or_a_share_of_the_data_sheets():
    assert usable_memory(_device("NVIDIA H100 80GB HBM3", {"bytes_limit": 60})) == 60
    assert usable_memory(_device("NVIDIA H100 80GB HBM3", None)) == USABLE * 85e9
    assert usable_memory(_device("unheard of", {})) is None
    cpu = jax.devices()[0]
    assert usable_memory(cpu) * jax.local_device_count() > 1e9


def test_float8_kernels_are_gathered_in_one_byte():
    changes = dict(model__preset="flux-30m", model__compute_dtype="bfloat16", model__double_blocks=0)
    wide, narrow = (
        step_memory.expected_temporaries(tiny_assembly(**changes, model__matmul_dtype=dtype))["a gathered block"]
        for dtype in (None, "float8")
    )
    d = 384  # qkv, attention's output, and both layers of the MLP: 12 D^2 of a block
    assert wide - narrow == 12 * d**2
