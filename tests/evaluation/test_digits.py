import numpy as np
import pytest

from shortcut_jax.data.records import DataSettings, open_source
from shortcut_jax.data.training import TrainingData
from shortcut_jax.evaluation.digits import (
    Reference,
    Score,
    cell,
    make_reference,
    measures,
    reference_of,
    score,
    table,
    write_report,
)
from shortcut_jax.inference.sheets import grid_captions
from tests.data.prepared import LATENTS, TEXT, write_small_set


@pytest.fixture(scope="module")
def source(data_dir):
    return open_source(DataSettings(dir=data_dir))


@pytest.fixture(scope="module")
def reference(source):
    return make_reference(source)


def test_the_data_judged_as_samples_have_no_distance_and_their_own_captions(source, reference):
    real = np.stack([record["image"] for record in source])
    judged = score(lambda params, captions, steps, seed: real, None, "slow", 4, reference, 0, (0, 1))
    assert judged.images == len(source) == 1797
    np.testing.assert_allclose(judged.distances, [0.0, 0.0], atol=1e-5)
    assert min(judged.accuracies) > 0.99


def test_images_of_the_wrong_digits_keep_their_distance_but_lose_the_captions(source, reference):
    real = np.stack([record["image"] for record in source])
    shuffled = np.random.default_rng(0).permutation(real)
    judged = score(lambda *args, **kwargs: shuffled, None, "slow", 4, reference, 0, (0,))
    assert judged.distances[0] == pytest.approx(0.0, abs=1e-5)
    assert 0.05 < judged.accuracies[0] < 0.15


def test_half_the_brightness_has_the_distance_of_its_closed_form(source, reference):
    # x / 2 halves mean and standard deviations: |m / 2|^2 + tr(S / 4), up to the rounding of the pixels.
    real = np.stack([record["image"] for record in source])
    darker = (real * 0.5).astype(np.uint8)
    judged = score(lambda *args, **kwargs: darker, None, "slow", 4, reference, 0, (0,))
    pixels = real.reshape(len(real), -1) / 127.5
    expected = (np.sum(pixels.mean(0) ** 2) + np.sum(pixels.var(0, ddof=1))) / 4
    assert judged.distances[0] == pytest.approx(expected, rel=0.01)


def test_each_seed_and_an_even_spread_of_captions_reach_the_generator(reference):
    calls = []

    def generate(params, captions, steps, seed):
        calls.append((params, len(captions), steps, seed))
        return np.random.default_rng(seed).integers(0, 255, (len(captions), 8, 8, 1), dtype=np.uint8)

    judged = score(generate, "weights", "fast", 3, reference, 50, (5, 9))
    assert calls == [("weights", 50, 3, 5), ("weights", 50, 3, 9)]
    assert judged.images == 50 and judged.distances[0] != judged.distances[1]


def test_a_table_has_a_row_a_view_and_a_column_a_step_count():
    scores = [
        Score("online", 1, 512, (2.0,), (0.5,)),
        Score("online", 4, 512, (1.0,), (0.75,)),
        Score("slow", 1, 1797, (0.5, 0.7), (0.9, 1.0)),
        Score("slow", 4, 1797, (0.1, 0.1), (1.0, 1.0)),
    ]
    assert table(scores).splitlines() == [
        "| view (images) | 1 step             | 4 steps            |",
        "| ------------- | ------------------ | ------------------ |",
        "| online (512)  | 2.00 / 0.500       | 1.00 / 0.750       |",
        "| slow (1797)   | 0.60 ±0.10 / 0.950 | 0.10 ±0.00 / 1.000 |",
    ]
    assert cell(scores[0]) == "2.00 / 0.500"


def test_grid_captions_are_the_chosen_ones_or_the_first_different_ones():
    assert grid_captions(("a", "b"), ["c"], 3) == ["a", "b", "a"]
    assert grid_captions((), ["x", "x", "y", "z"], 2) == ["x", "y"]


def _unlabelled(folder, store="pixels", counts=(12, 9), **changes):
    write_small_set(folder, store, counts)
    kind = dict(store=store, text_encoder="stored", stride=LATENTS.stride) if store == "latents" else {}
    sizes = dict(height=16, width=16, text_tokens=TEXT.tokens)
    return TrainingData(DataSettings(name=str(folder), **{**sizes, **kind, **changes}))


def test_images_without_labels_are_judged_by_their_distance_alone(tmp_path):
    data = _unlabelled(tmp_path / "set", height=8, width=24)
    reference = reference_of(data)
    assert isinstance(reference, Reference) and reference.classify is None
    assert len(reference.captions) == 9 and all("of bucket 1" in caption for caption in reference.captions)
    real = np.stack([data.sets[0].records[i]["image"] for i in data.places[1][0]])
    judged = score(lambda params, captions, steps, seed: real, None, "slow", 4, reference, 0, (0,))
    assert judged.images == 9 and judged.accuracies == ()
    assert judged.distances[0] == pytest.approx(0.0, abs=1e-3)
    black = score(lambda *args, **kwargs: np.zeros_like(real), None, "slow", 1, reference, 0, (0, 1))
    assert cell(black) == f"{black.distances[0]:.2f} ±0.00" and measures([black]) == "Frechet distance"
    write_report(tmp_path / "report.md", "title", [judged, black], {"objective": "flow"}, "times", ["loss.png"])
    report = (tmp_path / "report.md").read_text()
    assert "| slow (9)" in report and "squared Frechet distance" in report and "![loss.png](loss.png)" in report
    assert "support vector" not in report and " / " not in report


@pytest.mark.parametrize(
    ("store", "changes", "reason"),
    [
        ("latents", {}, "holds latents, not pixels; python -m shortcut_jax.evaluate"),
        ("pixels", {"counts": (1, 9)}, "has 1 images of 16 x 16"),
        ("pixels", {"most": 700}, "images of 768 values are too large"),
    ],
)
def test_what_has_no_distance_in_pixels_says_why_in_the_report(tmp_path, monkeypatch, store, changes, reason):
    monkeypatch.setattr("shortcut_jax.evaluation.digits.MAX_PIXELS", changes.pop("most", 4096))
    told = reference_of(_unlabelled(tmp_path / "set", store, **changes))
    assert isinstance(told, str) and reason in told
    write_report(tmp_path / "report.md", "title", [], {"objective": "flow"}, "times", ["loss.png"], told)
    report = (tmp_path / "report.md").read_text()
    assert f"No table: {told}." in report and "- objective: flow" in report and "|" not in report


def test_a_large_set_is_judged_by_records_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr("shortcut_jax.evaluation.digits.MOST_RECORDS", 5)
    data = _unlabelled(tmp_path / "set", counts=(30,))
    numbers = [int(caption.split()[2]) for caption in reference_of(data).captions]
    assert len(numbers) == 5 and numbers[0] == 0 and numbers[-1] == 29
