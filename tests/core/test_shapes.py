"""The public pure functions refuse arrays that would broadcast into a wrong result, and are the same under jit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from shortcut_jax.core.batch_split import RowGroup, merge_kinds, split_kinds
from shortcut_jax.core.ema import average
from shortcut_jax.core.flow import euler, interpolate, velocity_target
from shortcut_jax.core.latents import patchify, unpatchify
from shortcut_jax.core.rotary import rotary_phases, rotate
from shortcut_jax.core.schedules import interval_times, sampling_grid
from shortcut_jax.core.shortcut import jump_target, scfm_target, squared_error

X = jnp.arange(24.0).reshape(2, 4, 3)
T = jnp.array([0.25, 0.75])
TIMES = jnp.array([[1.0, 0.5, 0.0], [0.5, 0.25, 0.0]])
FIELD = lambda x_BNC, t_B: x_BNC * t_B[:, None, None]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: squared_error(X, X[:, :1]),
        lambda: squared_error(X, X[0]),
        lambda: interpolate(X, X[:1], T),
        lambda: interpolate(X, X, jnp.float32(0.5)),
        lambda: interpolate(X, X, T[:, None]),
        lambda: velocity_target(X, X[..., :1]),
        lambda: jump_target(X, TIMES, [FIELD]),
        lambda: jump_target(X, TIMES[:1], [FIELD, FIELD]),
        lambda: scfm_target(X, TIMES[0], FIELD, FIELD),
        lambda: interval_times(jnp.array([1, 2]), jnp.array([0]), jnp.ones(2), 2),
        lambda: patchify(X),
        lambda: unpatchify(X, 4, 8),
        lambda: euler(lambda x, t, d: x, X, TIMES, 1, None),
        lambda: euler(lambda x, t, d: x, X, TIMES[0], 1, jnp.ones(5)),
        lambda: rotate(X[:, :, None], *rotary_phases(jnp.zeros((3, 3)), (2, 2, 2), 1e4)),
        lambda: rotary_phases(jnp.zeros((4, 2)), (2, 2, 2), 1e4),
        lambda: split_kinds((X, T[:1]), RowGroup(1, 1)),
        lambda: average({"a": X}, {"a": X[0]}, 0.9),
        lambda: average({"a": X}, {"b": X}, 0.9),
    ],
)
def test_arrays_that_do_not_fit_are_refused(wrong):
    with pytest.raises((AssertionError, ValueError)):
        wrong()


class UnderJit(chex.TestCase):
    """What a train step composes under jit gives the same values without it."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        ("interpolate", lambda: interpolate, (X, 2.0 * X, T), lambda: 0.75 * X[0] + 0.25 * 2.0 * X[0]),
        ("squared_error", lambda: squared_error, (X, X + 2.0), lambda: jnp.float32(4.0)),
        (
            "scfm_target",
            lambda: lambda x, times: scfm_target(x, times, FIELD, lambda x, t: 2.0 * x),
            (X, TIMES),
            # Half a step of v = 1.0 x, then half a step of v = 2 x from there.
            lambda: 0.5 * (1.0 + 2.0 * 0.5) * X[0],
        ),
        ("grid", lambda: lambda n: sampling_grid(n, 4, 3.0), (jnp.int32(2),), lambda: jnp.float32(1.0)),
    )
    def test_the_value_is_the_closed_form(self, function, arguments, first):
        chex.assert_trees_all_close(self.variant(function())(*arguments)[0], first(), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_kinds_are_split_and_merged(self):
        tree = {"x": jnp.tile(X, (2, 1, 1)), "t": jnp.arange(4)}
        group = RowGroup(1, 1)
        round_trip = self.variant(lambda tree: merge_kinds(split_kinds(tree, group), group))
        chex.assert_trees_all_equal(round_trip(tree), tree)


def test_the_fast_path_is_traced_once():
    traced = jax.jit(
        chex.assert_max_traces(lambda x, n: euler(lambda x, t, d: -x, x, sampling_grid(n, 8), n, None), n=1)
    )
    values = [float(traced(X, jnp.int32(n))[0, 0, 1]) for n in (1, 2, 8)]
    np.testing.assert_allclose(values, [(1 + 1 / n) ** n for n in (1, 2, 8)], rtol=1e-5)
