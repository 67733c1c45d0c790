"""Letters and digits in the fonts of the machine: here those that come with matplotlib."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from shortcut_jax.data import datasets
from shortcut_jax.data.datasets import glyphs
from shortcut_jax.data.records import DataSettings, open_source
from shortcut_jax.errors import DataError

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SANS, BOLD = FONTS / "DejaVuSans.ttf", FONTS / "DejaVuSans-Bold.ttf"


def test_the_set_has_each_character_of_each_font_once(tmp_path, monkeypatch):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    symbols = FONTS / "STIXSizOneSymReg.ttf"  # without letters
    again = tmp_path / "copy.ttf"  # draws the same
    again.write_bytes(SANS.read_bytes())
    monkeypatch.setattr(glyphs, "find_fonts", lambda: [SANS, BOLD, symbols, again, tmp_path / "broken.ttf"])
    source = open_source(DataSettings(name="glyphs", dir=str(tmp_path / "sets")))
    assert len(source) == 2 * len(glyphs.CHARACTERS)
    assert {record["image"].shape for record in source} == {(16, 16, 1)}
    told = {(r["caption"].decode(), int(r["label"]), r["font"].decode()) for r in source}
    assert ("the capital letter k", glyphs.CHARACTERS.index("K"), "DejaVu Sans Bold") in told
    assert ("the digit seven", glyphs.CHARACTERS.index("7"), "DejaVu Sans Book") in told
    assert {caption for caption, _, _ in told} == set(datasets.captions("glyphs"))
    for record in source:  # bright on dark, with room around
        image = record["image"][..., 0]
        assert image.max() > 100 and not image[0].any() and not image[-1].any()


def test_characters_keep_their_sizes_and_their_line():
    name, drawn = glyphs.draw_font(SANS)
    rows = {c: np.flatnonzero(drawn[c].max(axis=1) > 60) for c in "xXpl"}
    assert name == "DejaVu Sans Book"
    assert len(rows["X"]) > len(rows["x"]) and rows["X"][-1] == rows["x"][-1] < rows["p"][-1]
    columns = np.flatnonzero(drawn["l"].max(axis=0) > 60)
    assert abs(columns.mean() - 7.5) <= 1.0


def test_a_machine_without_fonts_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "find_fonts", lambda: [])
    with pytest.raises(DataError, match="no font of this machine has all letters and digits: install some") as error:
        open_source(DataSettings(name="glyphs", dir=str(tmp_path)))
    assert "\n" not in str(error.value)
