import numpy as np
import pytest

from shortcut_jax.core.stats import fit_gaussian
from shortcut_jax.evaluation import metrics
from shortcut_jax.evaluation.accumulators import add, no_tally
from shortcut_jax.evaluation.features import pixels
from shortcut_jax.evaluation.metrics import Cell, against_teacher, figures, public_names
from shortcut_jax.evaluation.reference import Reference

FEATURES = pixels((2, 2, 1))


def _cell(label, steps, samples, **sums):
    tally = add(no_tally(4), np.arange(len(samples)), samples, {"seconds": 2.0, **sums}, len(samples))
    return Cell(label, steps, len(samples)), tally


def _normal(num, mean, seed=0):
    return np.random.default_rng(seed).normal(mean, 1.0, (num, 4)).astype(np.float32)


REFERENCE = Reference(fit_gaussian(_normal(500, 0.0)), _normal(500, 0.0), "real", 500)


def test_the_same_samples_are_at_no_distance_and_cover_each_other():
    row = figures(*_cell("slow", 4, _normal(500, 0.0)), REFERENCE, FEATURES)
    assert row["distance"] == pytest.approx(0.0, abs=1e-8) and row["precision"] == row["recall"] == 1.0
    assert row["kid"] < 0 and row["images_per_second"] == 250.0 and row["accuracy"] is None
    assert not row["few_images"] and figures(*_cell("slow", 4, _normal(4, 0.0)), REFERENCE, FEATURES)["few_images"]


def test_a_shifted_normal_is_at_the_square_of_the_shift():
    sums = dict(classified=3.0, labelled=4.0, clip=60.0, captioned=3.0)
    cell, tally = _cell("slow", 1, _normal(500, 0.0) + np.float32(2.0), **sums)
    row = figures(cell, tally, REFERENCE, FEATURES)
    assert row["distance"] == pytest.approx(16.0, rel=1e-5) and row["accuracy"] == 0.75 and row["clip_score"] == 20.0


def test_standard_errors_stand_beside_the_figures():
    sums = dict(classified=3.0, labelled=4.0, clip=60.0, clip_squares=1400.0, captioned=3.0)
    few = figures(*_cell("slow", 1, _normal(500, 1.0), **sums), REFERENCE, FEATURES)
    many = figures(*_cell("slow", 1, _normal(2000, 1.0)), REFERENCE, FEATURES)
    assert few["distance_std"] == pytest.approx(2 * many["distance_std"], rel=0.3) and few["distance_std"] > 0
    assert few["clip_score_std"] == pytest.approx(np.std([10.0, 20.0, 30.0], ddof=1) / 3**0.5)
    assert 0.1 < few["accuracy_std"] < 0.3 and many["accuracy_std"] is many["clip_score_std"] is None
    assert 0 < few["precision_std"] < 0.03 and few["kid_std"] > 0
    assert few["kid_error"] is None  # each subset is all samples
    assert figures(*_cell("slow", 1, _normal(4, 1.0)), REFERENCE, FEATURES)["distance_std"] is None
    own, other = _cell("slow", 1, _normal(500, 1.0)), _cell("teacher", 1, _normal(500, 2.0, seed=1))
    teacher = figures(*other, REFERENCE, FEATURES)
    row = against_teacher(figures(*own, REFERENCE, FEATURES), own[1], teacher, other[1])
    assert row["abs_gap_std"] == pytest.approx(np.hypot(row["distance_std"], teacher["distance_std"]))
    assert 0 < row["to_teacher_std"] < 1
    assert public_names(row, "FID")["fid_to_teacher_std"] == row["to_teacher_std"]


@pytest.mark.parametrize("subset", [50, 200])
def test_the_standard_error_of_kid_is_what_another_seed_changes_it_by(subset, monkeypatch):
    monkeypatch.setattr(metrics, "SUBSET", subset)
    rows = [figures(*_cell("slow", 1, _normal(300, 1.0, seed=i)), REFERENCE, FEATURES) for i in range(2, 22)]
    spread = np.std([row["kid"] for row in rows], ddof=1)
    assert spread == pytest.approx(np.mean([row["kid_error"] for row in rows]), rel=0.4)
    assert all(row["kid_error"] != row["kid_std"] > 0 for row in rows)


def test_a_reference_without_features_has_no_kid():
    row = figures(*_cell("slow", 4, _normal(500, 0.0)), REFERENCE._replace(features=None), FEATURES)
    assert row["kid"] is row["kid_error"] is row["precision"] is row["recall"] is None and row["distance"] < 1e-8


def test_the_gap_is_of_distances_and_the_distance_to_the_teacher_is_of_images():
    shifted = lambda by: _normal(500, 0.0) + np.float32(by)
    (cell, student), (_, teacher) = _cell("slow", 1, shifted(2.0)), _cell("teacher", 32, shifted(-1.0))
    rows = [figures(cell, t, REFERENCE, FEATURES) for t in (student, teacher)]
    row = against_teacher(rows[0], student, rows[1], teacher)
    assert row["abs_gap"] == pytest.approx(16.0 - 4.0, rel=1e-5)
    assert row["to_teacher"] == pytest.approx(4 * 9.0, rel=1e-5)


def test_only_inception_makes_it_an_fid():
    row = {"label": "slow", "distance": 1.0, "abs_gap": 2.0, "to_teacher": 3.0}
    assert public_names(row, "FID") == {"label": "slow", "fid": 1.0, "abs_fid_gap": 2.0, "fid_to_teacher": 3.0}
    assert set(public_names(row, FEATURES.name)) == {
        *("label", "frechet_distance", "abs_frechet_gap", "frechet_to_teacher")
    }
