import jax.numpy as jnp
import pytest

from shortcut_jax.core.loss_spikes import SpikeSettings, init_spikes, is_spike, observe

SETTINGS = SpikeSettings(factor=3.0, after=4, decay=0.9)


def _after(norms):
    memory = init_spikes()
    for norm in norms:
        memory = observe(memory, jnp.float32(norm), SETTINGS)
    return memory


def test_the_running_mean_is_that_of_equal_norms_from_the_start():
    memory = _after([2.0] * 5)
    assert float(memory.mean / (1 - 0.9**5)) == pytest.approx(2.0, rel=1e-5)
    assert int(memory.seen) == 5 and int(memory.spikes) == 0


@pytest.mark.parametrize(("norm", "expected"), [(5.9, False), (6.1, True), (1e30, True)])
def test_a_spike_is_above_factor_times_the_mean(norm, expected):
    assert bool(is_spike(_after([2.0] * 5), jnp.float32(norm), SETTINGS)) is expected


def test_nothing_is_a_spike_before_enough_steps_were_seen():
    assert not is_spike(_after([2.0] * 3), jnp.float32(1e6), SETTINGS)
    assert not is_spike(init_spikes(), jnp.float32(1e6), SETTINGS)
    assert is_spike(_after([2.0] * 4), jnp.float32(1e6), SETTINGS)


def test_the_mean_follows_slow_growth():
    norms = [1.02**k for k in range(200)]
    memory = init_spikes()
    for norm in norms:
        assert not is_spike(memory, jnp.float32(norm), SETTINGS)
        memory = observe(memory, jnp.float32(norm), SETTINGS)
