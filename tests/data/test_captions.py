"""Captions alone: of a text file, or of a set whose images are not looked at."""

import dataclasses

import numpy as np
import pytest

from shortcut_jax.config.checks import from_config
from shortcut_jax.data.pipeline import BatchReader
from shortcut_jax.data.records import DataSettings, check_available, stride_of, with_images
from shortcut_jax.data.training import TrainingData
from shortcut_jax.errors import ConfigError, DataError
from shortcut_jax.evaluation.digits import reference_of
from tests.data.prepared import TEXT, write_small_set
from tests.helpers import tiny_config

ALONE = {
    "data__store": "captions",
    "rows__self_rows": 0,
    "rows__flow_rows": 0,
    "rows__rolled_rows": 1,
    "init_from": "x",
}


def _settings(folder, name, **changes):
    return DataSettings(name=name, dir=str(folder), store="captions", caption_dropout=0.0, **changes)


def _rows(settings, encode=None):
    return BatchReader(TrainingData(settings), encode, np.arange(4), 4, seed=0, channels=3)(0)


def _letters(caption):
    return np.full((1, 1), len(caption)), np.array([ord(caption[0])])


def test_a_text_file_has_a_caption_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa\n\n  bb \nccc\ndddd", encoding="utf-8")
    settings = _settings(tmp_path, "prompts.txt")
    check_available(settings)
    data = TrainingData(settings)
    assert data.captions(3) == ["a", "bb", "ccc"] and data.num_records == 4
    batch = _rows(settings, _letters)
    assert batch.latents_BhwC.shape == (4, 8, 8, 3) and not batch.latents_BhwC.any()
    assert sorted(batch.vec_BV[:, 0]) == sorted(map(ord, "abcd"))
    assert with_images(settings) is None and "captions alone" in reference_of(data)


@pytest.mark.parametrize(
    ("content", "changes", "line"),
    [
        (b"\n \n", {}, r"prompts\.txt has no caption: write one a line"),
        (b"\xff\xfe\x00", {}, "is not UTF-8: byte 0 is 0xff"),
        (b"a", {"text_encoder": "stored"}, "no stored text states: set data.text_encoder=words"),
    ],
)
def test_a_text_file_that_cannot_be_used_is_one_line(tmp_path, content, changes, line):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(DataError, match=line):
        TrainingData(_settings(tmp_path, "prompts.txt", **changes))


def test_captions_that_are_not_there_are_one_line(tmp_path):
    with pytest.raises(DataError, match=r"is not found\. Write a text file with a caption a line"):
        check_available(_settings(tmp_path, "prompts.txt"))


def test_the_images_of_a_set_are_not_looked_at(tmp_path):
    for store in ("pixels", "latents"):
        write_small_set(tmp_path / store, store, [3, 2])
    settings = _settings(tmp_path, "pixels", height=12, width=20)
    batch = _rows(settings, _letters)
    assert batch.latents_BhwC.shape == (4, 12, 20, 3) and not batch.latents_BhwC.any()
    assert with_images(settings) == dataclasses.replace(settings, store="pixels")
    stored = _settings(tmp_path, "latents", text_encoder="stored", text_tokens=TEXT.tokens, height=16, width=16)
    assert stride_of(stored) == 8 and with_images(stored).store == "latents"
    batch = _rows(stored)
    assert batch.latents_BhwC.shape == (4, 2, 2, 3) and not batch.latents_BhwC.any()
    own = TrainingData(stored).sets[0].prepared.records("train")
    assert any(np.array_equal(batch.vec_BV[0], record["vec"]) for record in own)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rows__flow_rows": 1}, r"no images for self and flow rows: set objective=scfm, .*rows\.rolled_rows=1"),
        ({"rows__self_rows": 1}, "no images for self and flow rows"),
        ({"objective": "flow"}, "no images for self and flow rows"),
        ({"validation__every": 2}, r"a validation loss needs images: set validation\.every=0"),
        ({"data__flip": 0.5}, "captions cannot be mirrored"),
        ({"init_from": None}, "rolled rows alone distil a model that is there already, not random weights: set init_"),
    ],
)
def test_rows_that_need_images_are_refused(changes, line):
    from_config(tiny_config(**ALONE))
    with pytest.raises(ConfigError, match=line):
        from_config(tiny_config(**{**ALONE, **changes}))
