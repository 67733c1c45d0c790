import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from shortcut_jax.core.paths import CONSISTENCY_STEPS, PATH_STEPS
from shortcut_jax.evaluation.page import table
from shortcut_jax.evaluation.run import Result
from shortcut_jax.evaluation.writing import to_html, write

VOID = {"meta", "img", "br"}


class _Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def _row(label, steps, distance, **more):
    names = ("kid", "kid_std", "precision", "recall", "accuracy", "clip_score")
    empty = dict.fromkeys(names)
    row = {"label": label, "steps": steps, "images": 40, "distance": distance, "few_images": False, **empty, **more}
    return {**row, "images_per_second": 12.5}


@pytest.fixture
def result():
    paths = {"slow": {"change": [0.1] * (PATH_STEPS - 1), "consistency": [0.2] * len(CONSISTENCY_STEPS)}}
    times = np.linspace(0.9, 0.1, PATH_STEPS - 1).tolist()
    rows = [
        _row("slow", 1, 3.0, accuracy=0.5),
        _row("slow", 4, 1.5, accuracy=0.75),
        _row("online", 1, 4.0, few_images=True),
    ]
    sheet, losses = Image.new("RGB", (30, 20), "blue"), {"mlperf loss": 0.5, "mlperf loss/t=0.5": 0.25}
    facts = {"run": "<script>alert(1)</script>"}
    return Result(
        *("a run & more", facts, "Frechet distance (pixels)", rows, paths, times),
        *({"slow": losses}, {"slow": {1: 0.01, 4: 0.04}}, {"slow": sheet}, {"slow": 7}),
    )


def test_the_page_is_whole_alone_and_escapes_what_it_is_told(result):
    text = to_html(result)
    parser = _Balanced()
    parser.feed(text)
    assert not parser.open and "<script" not in text and "a run &amp; more" in text
    outside = [v for _, attrs in parser.seen for k, v in attrs.items() if k in ("src", "href") and v]
    assert outside and all(v.startswith(("data:image/png;base64,", "#")) for v in outside)
    assert not re.search(r"url\(\s*['\"]?http", text)
    # Two curves of quality (distance and accuracy), two of paths.
    assert sum(tag == "svg" for tag, _ in parser.seen) == 4
    for part in ("3 *", "4 *", "fewer pictures than features", "0.750", "40 ms", "t=0.5", "Samples of slow"):
        assert (part in text) == (part != "3 *"), part
    assert "FID" not in text


def test_the_files_say_the_same(result, tmp_path):
    write(result, tmp_path)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert [cell["frechet_distance"] for cell in record["cells"]] == [3.0, 1.5, 4.0]
    assert record["validation"]["slow"]["mlperf loss"] == 0.5
    assert record["latency_seconds"]["slow"] == {"1": 0.01, "4": 0.04}
    assert (tmp_path / "evaluation.html").stat().st_size > 10_000
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    assert b"evaluation/slow/4_steps/frechet_distance" in written and b"evaluation/slow/mlperf_loss" in written


def test_the_best_of_each_column_is_marked():
    text = table(["weights", "1 step", "2 steps"], [["a", "3.0", "1e-3"], ["b", "2.0 *", "-"]], best="min")
    assert re.findall(r"<td class=best>([^<]*)</td>", text) == ["1e-3", "2.0 *"]
    assert "best" not in table(["weights", "1 step"], [["a", "3.0"]], best="min")
    rows = [["a", "3,000"], ["b", "2,000"], ["c", "1"]]
    assert re.findall(r"<td class=best>([^<]*)</td>", table(["weights", "1"], rows, best="min", among=[0, 1])) == [
        "2,000"
    ]
