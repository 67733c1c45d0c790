import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.rows import RowGroup
from shortcut_jax.core.schedules import FIRST_TIME, ShiftRange, StudentSteps
from shortcut_jax.core.types import Condition
from shortcut_jax.steps.objectives import OBJECTIVES, Averages, ObjectiveSettings, Rows, draw, row_group
from shortcut_jax.steps.train_step import loss_parts

BATCH, SHAPE = 24, (5, 4)
GROUP = RowGroup(self_rows=1, flow_rows=3)
TAUGHT = RowGroup(self_rows=2, flow_rows=1, teacher_rows=1)


def _settings(name, group=GROUP, jumps=2):
    student = StudentSteps((1, 2, 4), jumps=jumps)
    return ObjectiveSettings(name, group, student, ShiftRange(), "uniform", (0.0, 7.5))


def _rows(settings, seed=0):
    """Rows whose condition says which row they are."""
    draws = draw(jax.random.key(seed), BATCH, SHAPE, settings)
    x0_BNC = jax.random.normal(jax.random.key(seed + 100), (BATCH, *SHAPE))
    index_B = jnp.arange(BATCH, dtype=jnp.float32)
    return Rows(x0_BNC, Condition(index_B[:, None, None], index_B[:, None], draws.guidance_B), draws)


class Recorded:
    """Averages of constant fields that write down who is asked what."""

    def __init__(self, **values):
        self.calls = []
        self.averages = Averages(**{name: self._network(name, value) for name, value in values.items()})

    def _network(self, name, value):
        def of(condition):
            def velocity(x_BNC, t_B, d_B):
                self.calls.append((name, np.asarray(condition.vec_BV[:, 0]), np.asarray(t_B), d_B))
                return jnp.full_like(x_BNC, value)

            return velocity

        return of

    def __call__(self, settings, rows):
        self.calls.clear()
        return OBJECTIVES[settings.name](rows, self.averages, settings)


def _places(*places, size=4):
    return np.flatnonzero(np.isin(np.arange(BATCH) % size, places))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_flow_rows_get_the_straight_velocity_at_their_own_time_and_are_told_no_step_size(name):
    settings = _settings(name)
    rows = _rows(settings)
    examples = Recorded(fast=1.0, slow=2.0)(settings, rows)
    flow = np.arange(BATCH) if name == "flow" else _places(1, 2, 3)
    x0, noise, t = (np.asarray(a)[flow] for a in (rows.x0_BNC, rows.draws.noise_BNC, rows.draws.t_B))
    np.testing.assert_array_equal(examples.t_B[flow], t)
    np.testing.assert_array_equal(examples.step_B[flow], 0.0)
    np.testing.assert_array_equal(examples.target_BNC[flow], noise - x0)
    np.testing.assert_allclose(examples.x_BNC[flow], x0 + t[:, None, None] * (noise - x0), rtol=1e-5, atol=1e-6)


def test_flow_and_scfm_share_the_times_of_flow_rows():
    flow, scfm = _settings("flow"), _settings("scfm")
    drawn, mixed = (draw(jax.random.key(7), BATCH, SHAPE, s) for s in (flow, scfm))
    np.testing.assert_array_equal(drawn.t_B, mixed.t_B)
    np.testing.assert_array_equal(drawn.noise_BNC, mixed.noise_BNC)
    asked = [Recorded(fast=1.0, slow=2.0)(s, _rows(s)).t_B[_places(1, 2, 3)] for s in (flow, scfm)]
    np.testing.assert_array_equal(*asked)


def test_self_rows_are_the_first_of_each_group_and_keep_their_conditions_and_intervals():
    settings = _settings("scfm")
    rows, networks = _rows(settings), Recorded(fast=1.0, slow=5.0)
    examples = networks(settings, rows)
    (fast, *first), (slow, *second) = networks.calls
    assert (fast, slow) == ("fast", "slow")
    places, times = _places(0), np.asarray(rows.draws.intervals.times_BJ)
    for j, (index, t, d) in enumerate((first, second)):
        np.testing.assert_array_equal(index, places)
        np.testing.assert_array_equal(t, times[places, j])
        assert d is None
    np.testing.assert_array_equal(examples.t_B[places], times[places, 0])
    np.testing.assert_allclose(examples.step_B[places], times[places, 0] - times[places, 2], rtol=1e-6)
    # Equal jumps but for the first grid point: the mean of both fields.
    np.testing.assert_allclose(examples.target_BNC[places], 3.0, atol=1e-3)


def test_swapping_fast_and_slow_changes_the_target():
    settings = _settings("scfm")
    rows = _rows(settings)
    field = lambda k: lambda condition: lambda x, t, d: k * x + 1.0
    one, other = (
        OBJECTIVES["scfm"](rows, a, settings) for a in (Averages(field(1), field(3)), Averages(field(3), field(1)))
    )
    change = np.abs(np.asarray(one.target_BNC - other.target_BNC)).max(axis=(1, 2))
    assert (change[_places(0)] > 1e-3).all() and (change[_places(1, 2, 3)] == 0.0).all()


@pytest.mark.parametrize("jumps", [2, 4])
def test_each_kind_of_row_asks_its_own_networks_at_its_own_times(jumps):
    settings = _settings("scfm", TAUGHT, jumps)
    rows, networks = _rows(settings), Recorded(teacher=3.0, fast=5.0, slow=7.0)
    examples = networks(settings, rows)
    half = jumps // 2
    expected = [("teacher", 0)] * half + [("slow", 0)] * half + [("fast", 1)] * half + [("slow", 1)] * half
    assert len(networks.calls) == len(expected)
    kinds = ((_places(0), rows.draws.teacher), (_places(1, 2), rows.draws.intervals))
    for j, ((name, kind), (asked, index, t, _)) in enumerate(zip(expected, networks.calls, strict=True)):
        places, intervals = kinds[kind]
        assert asked == name
        np.testing.assert_array_equal(index, places)
        np.testing.assert_array_equal(t, intervals.times_BJ[places, j % jumps])
    starts = (1.0 - np.asarray(examples.t_B)[_places(0)]) * 32
    np.testing.assert_allclose(starts, np.round(starts / jumps) * jumps, atol=1e-3)
    for places, value in ((_places(0), 5.0), (_places(1, 2), 6.0)):
        np.testing.assert_allclose(examples.target_BNC[places], value, atol=2e-3)
    flow = _places(3)
    np.testing.assert_array_equal(examples.target_BNC[flow], (rows.draws.noise_BNC - rows.x0_BNC)[flow])


def test_a_constant_field_is_the_target_of_teacher_and_self_rows():
    settings = _settings("scfm", dataclasses.replace(TAUGHT, flow_rows=0))
    rows = Rows(*jax.tree.map(lambda x: x[:21], _rows(settings)))
    examples = Recorded(teacher=4.0, fast=4.0, slow=4.0)(settings, rows)
    np.testing.assert_allclose(examples.target_BNC, 4.0, rtol=1e-6)
    assert float(examples.t_B.max()) <= FIRST_TIME


def test_teacher_rows_change_no_other_draw_and_need_a_teacher():
    with_teacher, without = (draw(jax.random.key(1), BATCH, SHAPE, _settings("scfm", g)) for g in (TAUGHT, GROUP))
    assert without.teacher is None and with_teacher.teacher is not None
    assert draw(jax.random.key(1), BATCH, SHAPE, _settings("flow", TAUGHT)).teacher is None
    for a, b in zip(jax.tree.leaves(with_teacher._replace(teacher=None)), jax.tree.leaves(without), strict=True):
        np.testing.assert_array_equal(a, b)
    networks = Recorded(fast=1.0, slow=1.0)
    for name, message in (("scfm", "teacher rows need a teacher"), ("shortcut", "shortcut has no teacher rows")):
        settings = _settings(name, TAUGHT)
        with pytest.raises(ValueError, match=message):
            networks(settings, _rows(settings))


def test_shortcut_rows_ask_the_slow_average_alone_and_tell_their_step_size():
    settings = _settings("shortcut")
    rows, networks = _rows(settings), Recorded(fast=1.0, slow=2.0)
    examples = networks(settings, rows)
    assert [call[0] for call in networks.calls] == ["slow", "slow"]
    places, intervals = _places(0), rows.draws.intervals
    times, taught = np.asarray(intervals.times_BJ)[places], np.asarray(intervals.count_B)[places] < 4
    for j, (_, index, _, d) in enumerate(networks.calls):
        np.testing.assert_array_equal(index, places)
        np.testing.assert_allclose(d, np.where(taught, times[:, j] - times[:, j + 1], 0.0), rtol=1e-6)
    np.testing.assert_allclose(examples.step_B[places], times[:, 0] - times[:, 2], rtol=1e-6)


def test_loss_parts_are_means_over_the_rows_of_a_kind():
    error_B = jnp.arange(8.0)
    assert loss_parts(error_B, TAUGHT) == {"loss/teacher": 2.0, "loss/self": 3.5, "loss/flow": 5.0}
    assert loss_parts(error_B, GROUP) == {"loss/self": 2.0, "loss/flow": 4.0}
    assert loss_parts(error_B, row_group(_settings("flow"))) == {"loss/flow": 3.5}
