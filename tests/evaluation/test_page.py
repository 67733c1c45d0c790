import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from shortcut_jax.core.straightness import CONSISTENCY_STEPS, PATH_STEPS
from shortcut_jax.evaluation.page import Metric, best_rows, column, metric_table, table
from shortcut_jax.evaluation.run import Result
from shortcut_jax.evaluation.writing import to_html, write
from tests.helpers import CHROMIUM, read_events

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
    names = ("kid", "kid_std", "kid_error", "precision", "recall", "accuracy", "clip_score")
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
    for part in ("3.00 *", "4.00 *", "fewer images than features", "0.750", "40.0 ms", "t=0.5", "Samples of slow"):
        assert (part in text) == (part != "3.00 *"), part
    assert "FID" not in text


def test_the_files_say_the_same(result, tmp_path):
    write(result, tmp_path)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert [cell["frechet_distance"] for cell in record["cells"]] == [3.0, 1.5, 4.0]
    assert record["validation"]["slow"]["mlperf loss"] == 0.5
    assert record["latency_seconds"]["slow"] == {"1": 0.01, "4": 0.04}
    assert (tmp_path / "evaluation.html").stat().st_size > 10_000
    runs = {path.parent.name: path for path in (tmp_path / "tensorboard").glob("*/events.out.tfevents.*")}
    assert set(runs) == {"slow", "online"}
    scalars, rest = read_events(runs["slow"])
    assert scalars["evaluation/frechet_distance"] == {1: 3.0, 4: 1.5}  # the steps are x, not part of the tag
    assert scalars["evaluation/accuracy"] == {1: 0.5, 4: 0.75} and "few_images" not in str(scalars)
    assert scalars["evaluation/mlperf_loss"] == {7: 0.5}
    assert (
        "| run | <script>" in rest["evaluation/text_summary"]
        and "| training step | 7 |" in rest["evaluation/text_summary"]
    )
    assert "training step" in rest["_hparams_/session_start_info"]
    assert "evaluation/frechet_distance" in rest["_hparams_/experiment"]
    write(result, tmp_path)
    assert len(list((tmp_path / "tensorboard").glob("slow/*"))) == 1


def _marked(text):
    return [text.strip() for text in re.findall(r"<td class=best>([^<]*)", text)]


def test_only_what_may_be_the_best_is_marked():
    assert best_rows([3.0, 2.0, 2.1], [0.1, 0.1, 0.1], "min") == {1, 2}
    assert best_rows([3.0, 2.0, 2.1], [0.1, 0.1, 0.1], "max") == {0}
    assert best_rows([3.0, 2.0, None], [0.1, 0.1, None], "min") == {1}
    for values, errors, best in (
        ([2.05, 2.0, 2.1], [0.1, 0.1, 0.1], "min"),  # any of them
        ([3.0, 2.0], [None, None], "min"),
        ([3.0, 2.0], [0.0, 0.0], "min"),
        ([3.0, None], [0.1, None], "min"),
        ([3.0, 2.0], [0.1, 0.1], ""),
    ):
        assert best_rows(values, errors, best) == set(), values


def test_cells_show_their_standard_error_and_columns_have_the_same_digits():
    rows = [
        _row("slow", 1, 30.0, kid=0.01234, kid_std=0.005, kid_error=0.0005),
        _row("online", 1, 30.0, kid=0.2, kid_std=0.11, kid_error=0.011),
        {**_row("fast", 1, 30.0, kid=0.00001, kid_std=0.002, kid_error=0.0002), "images": 20},
    ]
    text = metric_table(rows, Metric("kid", "KID", None, "min"))
    assert _marked(text) == ["0.01234"]  # the third one has fewer images
    cells = re.findall(r"<td[^>]*>([^<]*) <small>(± [\d.]+)</small>", text)
    assert cells == [("0.01234", "± 0.00050"), ("0.20000", "± 0.01100"), ("0.00001", "± 0.00020")]


@pytest.mark.parametrize(
    "values, texts",
    [
        ([3.0, 1.5], ["3.00", "1.50"]),
        ([15.2, 0.0312], ["15.200", "0.031"]),
        ([1234.5, 1.0, None], ["1,234.5", "1.0", "-"]),
        ([123456.0, 2.0], ["123,456", "2"]),
        ([0.5, -0.25], ["0.500", "-0.250"]),
        ([0.0, None], ["0", "-"]),
        ([float("nan"), 1.0], ["nan", "1.00"]),
    ],
)
def test_a_column_has_the_same_digits(values, texts):
    assert column(values) == texts


def test_tables_scroll_by_themselves_and_keep_their_labels():
    text = table(["weights", "1 step"], [["a", "3.0 ± 0.1"]], "x < y", {(0, 1)})
    assert "<h3>x &lt; y</h3><div class=wide tabindex=0 role=region" in text
    assert "<td class=best>3.0 <small>± 0.1</small></td>" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_wide_table_scrolls_inside_a_narrow_screen(result, tmp_path):
    from playwright.sync_api import sync_playwright

    rows = [_row(label, n, 3.0 / n, accuracy=0.5) for label in ("a-run/slow", "a-run/online") for n in (1, 2, 4, 8, 32)]
    (tmp_path / "page.html").write_text(to_html(result._replace(rows=rows)), "utf-8")
    arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto(f"file://{tmp_path}/page.html")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        wide, label = page.locator(".wide").first, page.locator(".wide td").first
        assert wide.evaluate("x => x.scrollWidth > x.clientWidth")
        before = label.bounding_box()["x"]
        wide.evaluate("x => { x.scrollLeft = 1000 }")
        assert wide.evaluate("x => x.scrollLeft") > 0 and label.bounding_box()["x"] == before
        browser.close()
