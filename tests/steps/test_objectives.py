import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shortcut_jax.core.batch_split import RowGroup
from shortcut_jax.core.schedules import FIRST_TIME, AlphaSchedule, ShiftRange, StudentSteps
from shortcut_jax.core.types import Condition
from shortcut_jax.steps.objectives import OBJECTIVES, ObjectiveSettings, Rows, draw, row_group
from shortcut_jax.steps.train_step import loss_parts

BATCH, SHAPE = 24, (5, 4)
GROUP = RowGroup(self_rows=1, flow_rows=3)
TAUGHT = RowGroup(self_rows=3, flow_rows=1)


def _settings(name, group=GROUP, jumps=2, **kwargs):
    student = StudentSteps((1, 2, 4), jumps=jumps)
    return ObjectiveSettings(name, group, student, ShiftRange(), "uniform", (0.0, 7.5), **kwargs)


def _rows(settings, seed=0):
    """Rows whose condition says which row they are."""
    draws = draw(jax.random.key(seed), BATCH, SHAPE, settings)
    x0_BNC = jax.random.normal(jax.random.key(seed + 100), (BATCH, *SHAPE))
    index_B = jnp.arange(BATCH, dtype=jnp.float32)
    return Rows(x0_BNC, Condition(index_B[:, None, None], index_B[:, None], draws.guidance_B), draws)


class Recorded:
    """Networks of constant fields that write down who is asked what; `first` is the teacher where it is one."""

    def __init__(self, fast, slow, teacher=None):
        self.calls, self._values, self._teacher = [], {"fast": fast, "slow": slow}, teacher

    def _network(self, name, condition, teacher_B=None):
        def velocity(x_BNC, t_B, d_B):
            self.calls.append((name, condition.vec_BV[:, 0], t_B, d_B, teacher_B))
            v_BNC = jnp.full_like(x_BNC, self._values[name])
            return v_BNC if teacher_B is None else jnp.where(teacher_B[:, None, None], self._teacher, v_BNC)

        return velocity

    def first(self, condition, teacher_B):
        return self._network("fast", condition, teacher_B)

    def slow(self, condition):
        return self._network("slow", condition)

    def forward(self, condition):
        """A field of which forward mode is asked: the derivative of its time and step size are known."""
        network = self._network("slow", condition)
        return lambda x_BNC, t_B, d_B: network(x_BNC, t_B, d_B) + (2.0 * t_B + d_B)[:, None, None]

    def __call__(self, settings, rows):
        self.calls.clear()
        return OBJECTIVES[settings.name].examples(rows, self, settings)


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
    for j, (index, t, d, _) in enumerate((first, second)):
        np.testing.assert_array_equal(index, places)
        np.testing.assert_array_equal(t, times[places, j])
        assert d is None
    np.testing.assert_array_equal(examples.t_B[places], times[places, 0])
    np.testing.assert_allclose(examples.step_B[places], times[places, 0] - times[places, 2], rtol=1e-6)
    # Equal jumps but for the first grid point: the mean of both fields.
    np.testing.assert_allclose(examples.target_BNC[places], 3.0, atol=1e-3)


@pytest.mark.parametrize("kinds", [TAUGHT, RowGroup(self_rows=0, flow_rows=1, rolled_rows=3)], ids=["self", "rolled"])
def test_each_count_of_steps_and_each_first_jump_begins_at_its_own_time(kinds):
    settings = _settings("scfm", kinds)
    settings = dataclasses.replace(settings, student=dataclasses.replace(settings.student, start=0.98))
    rows, networks = _rows(settings), Recorded(fast=1.0, slow=5.0)
    with jax.disable_jit():  # a rolled row walks in a scan
        examples = networks(settings, rows)
    places, count_B = _places(0, 1, 2), np.asarray(rows.draws.intervals.count_B)
    told_B, at_start = np.asarray(examples.t_B)[places], np.asarray(examples.t_B)[places] > 0.9
    starts = {1: FIRST_TIME, 2: 0.99, 4: 0.985}
    assert set(count_B[places][at_start]) == set(starts)
    np.testing.assert_allclose(told_B[at_start], [starts[n] for n in count_B[places][at_start]], rtol=1e-6)
    *walked, (_, _, first_jump_B, _, _), _ = networks.calls  # a row of m steps jumps as 2 m steps do
    jumps = {1: 0.99, 2: 0.985, 4: 0.9825}
    np.testing.assert_allclose(
        np.asarray(first_jump_B)[at_start], [jumps[n] for n in count_B[places][at_start]], rtol=1e-6
    )
    assert all(np.asarray(t).max() == np.float32(0.985) for _, _, t, _, _ in walked[:1])  # of four rolled steps


def test_where_all_times_are_scaled_each_jump_is_asked_at_that_of_the_finer_sampler():
    settings = _settings("scfm", TAUGHT)
    settings = dataclasses.replace(settings, student=dataclasses.replace(settings.student, start=0.98, scaled=True))
    rows, networks = _rows(settings), Recorded(fast=1.0, slow=5.0)
    examples = networks(settings, rows)
    places, count_B = _places(0, 1, 2), np.asarray(rows.draws.intervals.count_B)[_places(0, 1, 2)]
    start = lambda n: 1 - 0.02 * (1 - 1 / n)
    *_, (_, _, first_jump_B, _, _), (_, _, second_jump_B, _, _) = networks.calls
    times = np.asarray(rows.draws.intervals.times_BJ)[places]
    for j, asked_B in enumerate((first_jump_B, second_jump_B)):
        np.testing.assert_allclose(asked_B, times[:, j] * start(2 * count_B) / start(count_B), rtol=1e-5)
    uniform = np.asarray(examples.t_B)[places] / start(count_B) * count_B  # of m steps, whole numbers
    np.testing.assert_allclose(uniform, np.round(uniform), atol=1e-3)


def test_swapping_fast_and_slow_changes_the_target():
    settings = _settings("scfm")
    rows = _rows(settings)

    class Fields:
        def __init__(self, fast, slow):
            field = lambda k: lambda x, t, d: k * x + 1.0
            self.first, self.slow = (lambda condition, teacher_B: field(fast)), (lambda condition: field(slow))

    one, other = (OBJECTIVES["scfm"].examples(rows, Fields(*k), settings) for k in ((1, 3), (3, 1)))
    change = np.abs(np.asarray(one.target_BNC - other.target_BNC)).max(axis=(1, 2))
    assert (change[_places(0)] > 1e-3).all() and (change[_places(1, 2, 3)] == 0.0).all()


@pytest.mark.parametrize("jumps", [2, 4])
def test_teacher_rows_take_their_first_jumps_on_the_teachers_grid_with_the_teacher(jumps):
    settings = _settings("scfm", TAUGHT, jumps, teacher_share=0.4)
    rows, networks = _rows(settings), Recorded(teacher=3.0, fast=5.0, slow=7.0)
    examples = networks(settings, rows)
    half, places = jumps // 2, _places(0, 1, 2)
    assert [call[0] for call in networks.calls] == ["fast"] * half + ["slow"] * half
    teacher = np.asarray(rows.draws.teacher_B)
    assert 0 < teacher[places].sum() < len(places)
    times = np.asarray(rows.draws.intervals.times_BJ)
    for j, (_, index, t, _, asked) in enumerate(networks.calls):
        np.testing.assert_array_equal(index, places)
        np.testing.assert_array_equal(t, times[places, j])
        assert (asked is None) == (j >= half) and (asked is None or (asked == teacher[places]).all())
    taught = np.intersect1d(places, np.flatnonzero(teacher))
    starts = (1.0 - times[taught, 0]) * 32
    np.testing.assert_allclose(starts, np.round(starts / jumps) * jumps, atol=1e-3)
    np.testing.assert_allclose(times[taught, 0] - times[taught, -1], jumps / 32, atol=2e-5)
    for kind, value in ((taught, 5.0), (np.setdiff1d(places, taught), 6.0)):
        np.testing.assert_allclose(examples.target_BNC[kind], value, atol=2e-3)
    flow = _places(3)
    np.testing.assert_array_equal(examples.target_BNC[flow], (rows.draws.noise_BNC - rows.x0_BNC)[flow])


def test_a_constant_field_is_the_target_of_teacher_and_self_rows():
    settings = _settings("scfm", RowGroup(1, 0), teacher_share=0.5)
    examples = Recorded(teacher=4.0, fast=4.0, slow=4.0)(settings, _rows(settings))
    np.testing.assert_allclose(examples.target_BNC, 4.0, rtol=1e-6)
    assert float(examples.t_B.max()) <= FIRST_TIME


def test_a_teacher_changes_no_draw_but_the_intervals_of_its_rows():
    with_teacher, without = (
        draw(jax.random.key(1), BATCH, SHAPE, _settings("scfm", TAUGHT, teacher_share=p)) for p in (0.4, 0.0)
    )
    assert without.teacher_B is None
    own = ~np.asarray(with_teacher.teacher_B)
    np.testing.assert_array_equal(with_teacher.intervals.times_BJ[own], without.intervals.times_BJ[own])
    for name in ("noise_BNC", "t_B", "guidance_B"):
        np.testing.assert_array_equal(getattr(with_teacher, name), getattr(without, name))


@pytest.mark.slow
def test_the_share_of_teacher_rows_is_drawn_anew_each_step():
    settings = _settings("scfm", RowGroup(1, 0), teacher_share=0.4)
    drawn = np.array([draw(jax.random.key(k), 8, SHAPE, settings).teacher_B for k in range(500)])
    assert abs(drawn.mean() - 0.4) < 0.03
    assert set(drawn.sum(axis=1)) >= {1, 2, 3, 4, 5, 6}


def test_flow_rows_are_not_guided():
    told, guided = (
        draw(jax.random.key(2), BATCH, SHAPE, _settings("scfm", guidance_mode=g)) for g in ("embedded", "cfg")
    )
    np.testing.assert_array_equal(guided.guidance_B[_places(1, 2, 3)], 1.0)
    np.testing.assert_array_equal(guided.guidance_B[_places(0)], told.guidance_B[_places(0)])


def test_a_step_that_the_teacher_teaches_is_not_untaught():
    settings = _settings("scfm", TAUGHT)
    assert settings.unsupervised_counts == (4,)
    assert dataclasses.replace(settings, teacher_share=0.4, teacher_grid=16).unsupervised_counts == ()
    assert dataclasses.replace(settings, teacher_share=0.4, teacher_grid=32).unsupervised_counts == (4,)


def test_shortcut_rows_ask_the_slow_average_alone_and_tell_their_step_size():
    settings = _settings("shortcut")
    rows, networks = _rows(settings), Recorded(fast=1.0, slow=2.0)
    examples = networks(settings, rows)
    assert [call[0] for call in networks.calls] == ["slow", "slow"]
    places, intervals = _places(0), rows.draws.intervals
    times, taught = np.asarray(intervals.times_BJ)[places], np.asarray(intervals.count_B)[places] < 4
    for j, (_, index, _, d, _) in enumerate(networks.calls):
        np.testing.assert_array_equal(index, places)
        np.testing.assert_allclose(d, np.where(taught, times[:, j] - times[:, j + 1], 0.0), rtol=1e-6)
    np.testing.assert_allclose(examples.step_B[places], times[:, 0] - times[:, 2], rtol=1e-6)


def test_alpha_rows_weigh_what_their_targets_lack_and_alpha_falls_during_the_run():
    settings = _settings("alpha", alpha=AlphaSchedule(first=1.0, last=0.2, until=0.5))
    drawn = [float(draw(jax.random.key(0), BATCH, SHAPE, settings, p).alpha_B[0]) for p in (0.0, 0.25, 0.5, 1.0)]
    np.testing.assert_allclose(drawn, [1.0, 0.6, 0.2, 0.2], rtol=1e-6)
    rows = _rows(settings)
    rows = rows._replace(draws=rows.draws._replace(alpha_B=jnp.full(BATCH, 0.25)))
    networks = Recorded(fast=1.0, slow=2.0)
    examples = networks(settings, rows)
    own, v = _places(0), np.asarray(rows.draws.noise_BNC - rows.x0_BNC)
    ((name, index, t, d, _),) = networks.calls
    assert name == "slow"
    np.testing.assert_array_equal(index, own)
    start, end = np.asarray(rows.draws.intervals.times_BJ)[own].T
    np.testing.assert_allclose(t, start - 0.25 * (start - end), rtol=1e-6)
    np.testing.assert_allclose(d, 0.75 * (start - end), rtol=1e-5)
    np.testing.assert_allclose(examples.target_BNC[own], 0.25 * v[own] + 0.75 * 2.0, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(examples.weight_B, np.where(np.isin(np.arange(BATCH), own), 4.0, 1.0))


def test_meanflow_rows_learn_the_velocity_less_what_the_average_changes_by():
    settings = _settings("meanflow")
    rows = _rows(settings)
    examples = Recorded(fast=1.0, slow=2.0)(settings, rows)
    own, v = _places(0), np.asarray(rows.draws.noise_BNC - rows.x0_BNC)
    d = np.asarray(examples.step_B)[own]
    assert (d > 0).all()
    np.testing.assert_allclose(examples.target_BNC[own], v[own] - 3.0 * d[:, None, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["alpha", "meanflow"])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_intervals_between_any_times_go_from_noise_to_data(name, kind):
    drawn = draw(jax.random.key(3), 500, SHAPE, dataclasses.replace(_settings(name), timestep=kind))
    start, end = np.asarray(drawn.intervals.times_BJ).T
    assert (start >= end).all() and (end > 0).all() and (start <= FIRST_TIME).all()
    mean = {"uniform": (2 / 3, 1 / 3), "logit_normal": (0.616, 0.384)}[kind]
    np.testing.assert_allclose((start.mean(), end.mean()), mean, atol=0.03)


def test_rolled_rows_begin_where_the_slow_average_arrives_from_noise_and_see_no_image():
    settings = _settings("scfm", RowGroup(0, 0, rolled_rows=1), rolled_steps=3)
    rows, networks = _rows(settings), Recorded(fast=3.0, slow=5.0)
    examples, other = networks(settings, rows), networks(settings, rows._replace(x0_BNC=rows.x0_BNC + 1.0))
    for one, same in zip(jax.tree.leaves(examples), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one, same)
    start = np.asarray(rows.draws.intervals.times_BJ)[:, 0]
    expected = np.asarray(rows.draws.noise_BNC) - 5.0 * (1.0 - start)[:, None, None]
    np.testing.assert_allclose(examples.x_BNC, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(examples.target_BNC, 4.0, atol=1e-3)
    np.testing.assert_array_equal(examples.t_B, start)


def test_rolled_rows_stand_between_self_and_flow_rows_and_may_learn_from_the_teacher():
    group = RowGroup(1, 1, rolled_rows=2)
    settings = _settings("scfm", group, teacher_share=0.5)
    rows, networks = _rows(settings), Recorded(teacher=3.0, fast=5.0, slow=7.0)
    examples = networks(settings, rows)
    taught = np.isin(np.arange(BATCH) % 4, (0, 1, 2)) & np.asarray(rows.draws.teacher_B)
    assert taught[_places(1, 2)].any() and taught[_places(0)].any()
    np.testing.assert_allclose(examples.target_BNC[taught], 5.0, atol=2e-3)
    np.testing.assert_allclose(examples.target_BNC[~taught & ~np.isin(np.arange(BATCH) % 4, 3)], 6.0, atol=2e-3)
    noised = rows.x0_BNC + examples.t_B[:, None, None] * (rows.draws.noise_BNC - rows.x0_BNC)
    same = np.isclose(examples.x_BNC, noised, rtol=1e-5, atol=1e-5).all(axis=(1, 2))
    assert same[_places(0, 3)].all() and not same[_places(1, 2)].all()


def test_loss_parts_are_sums_and_shares_of_the_rows_of_a_kind():
    error_B, teacher_B = jnp.arange(8.0), jnp.array([1, 0, 0, 1, 0, 1, 1, 1], bool)
    mean = lambda parts: {kind: (pytest.approx(float(a / b)), float(b)) for kind, (a, b) in parts.items()}
    assert mean(loss_parts(error_B, None, GROUP)) == {"self": (2.0, 0.25), "flow": (4.0, 0.75)}
    assert mean(loss_parts(error_B, None, row_group(_settings("flow")))) == {"flow": (3.5, 1.0)}
    parts = mean(loss_parts(error_B, teacher_B, TAUGHT))
    assert parts == {"teacher": (11 / 3, 3 / 8), "self": (7 / 3, 3 / 8), "flow": (5.0, 0.25)}
    parts = mean(loss_parts(error_B, teacher_B, RowGroup(1, 1, rolled_rows=2)))
    assert parts == {"teacher": (11 / 3, 3 / 8), "self": (4.0, 1 / 8), "rolled": (1.5, 1 / 4), "flow": (5.0, 0.25)}
    none = loss_parts(error_B, jnp.zeros(8, bool), TAUGHT)
    assert none["teacher"] == (0.0, 0.0)  # no loss: 0 / 0
