"""`evaluation.html`: tables, curves and images in one file that needs neither network nor JavaScript."""

import base64
import html
import io
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from PIL import Image

from shortcut_jax.core.straightness import CONSISTENCY_STEPS
from shortcut_jax.core.text import count_label

STYLE = """
:root { color-scheme: light dark; --line: #d8dce3; --soft: #667085; --page: #f6f7f9; --card: #fff; --ink: #1c2430;
  --best: #e3f4e8; --shade: #0003; }
@media (prefers-color-scheme: dark) { :root { --line: #333b47; --soft: #98a2b3; --page: #14181e; --card: #1c222b;
  --ink: #e6eaf0; --best: #1e3d2a; --shade: #000b; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.3rem;
  margin-top: 1.1rem; min-width: 0; }
.wide { overflow-x: auto; max-width: 100%; border-radius: 4px; background:
  linear-gradient(to left, var(--card) 40%, transparent) right / 48px 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / 16px 100% no-repeat scroll, var(--card); }
.wide:focus-visible { outline: 2px solid var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .2rem 0 .4rem; }
h3 { font-size: 1rem; margin: .5rem 0 .3rem; } .table { max-width: 100%; min-width: 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card);
  border-right: 1px solid var(--line); }
@media (max-width: 700px) { th:first-child, td:first-child { min-width: 6rem; max-width: 42vw; white-space: normal;
  overflow-wrap: anywhere; } }
th { color: var(--soft); font-weight: 600; }
td.best { background: var(--best); font-weight: 600; }
td small { color: var(--soft); font-weight: 400; }
p, li, dd { color: var(--soft); margin: .2rem 0; max-width: 75ch; }
dl { display: grid; grid-template-columns: fit-content(40%) minmax(0, 1fr); overflow-wrap: anywhere;
  gap: .1rem 1rem; margin: .6rem 0 0; }
dt { font-weight: 600; } dd { margin: 0; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; } .plot { background: #fff; border-radius: 8px; padding: .4rem; }
.plot svg, img { max-width: 100%; height: auto; } img { border-radius: 6px; image-rendering: pixelated; }
.warn { color: #b54708; } @media (prefers-color-scheme: dark) { .warn { color: #fdb022; } }
"""

ABSENT = "-"
"""In a table, for what is not known."""


class Metric(NamedTuple):
    """A figure of a cell.

    Attributes:
      key: in a row; see `error_key`.
      title: of its table.
      digits: after the point; None for as many as the numbers of a column need.
      best: min or max, whichever is better; empty for neither.
    """

    key: str
    title: str
    digits: int | None = None
    best: str = ""


def metrics_of(distance: str) -> tuple[Metric, ...]:
    """The figures of a cell in the order of the page; `distance` is what the Frechet distance is called."""
    return (
        Metric("distance", f"{distance} (lower is better)", None, "min"),
        Metric("pixel_distance", "Frechet distance (pixels) (lower is better)", None, "min"),
        Metric("accuracy", "Caption accuracy", 3, "max"),
        Metric("clip_score", "CLIP score", 2, "max"),
        Metric("kid", "KID (unbiased)", None, "min"),
        Metric("precision", "Precision", 3, "max"),
        Metric("recall", "Recall", 3, "max"),
        Metric("abs_gap", f"Gap to the teacher: |difference of {distance}|", None, "min"),
        Metric("to_teacher", f"{distance} to the teacher's own images", None, "min"),
        Metric("images_per_second", "Images a second, in batches"),
    )


def error_key(metric: Metric) -> str:
    """The entry of a row with the standard error of a figure; `kid_std` is a deviation, as the field reports it."""
    return "kid_error" if metric.key == "kid" else f"{metric.key}_std"


Pivot = dict[str, dict[int, Any]]
"""label -> steps -> value."""


def pivot(rows: Sequence[dict[str, Any]], key: str) -> Pivot:
    """The values of a figure by label and steps; None where it is not known."""
    result: Pivot = {}
    for row in rows:
        result.setdefault(row["label"], {})[row["steps"]] = row.get(key)
    return result


def known(rows: Sequence[dict[str, Any]], key: str) -> bool:
    """Whether any row has the figure."""
    return any(row.get(key) is not None for row in rows)


def table(
    head: Sequence[str], body: Sequence[Sequence[str]], caption: str = "", marked: Collection[tuple[int, int]] = ()
) -> str:
    """An HTML table that scrolls where it is too wide; cells (row, column) of `marked` are the best.

    What stands behind a " ± " is set smaller.
    """

    def cell(i: int, j: int, text: str) -> str:
        value, sign, error = text.partition(" ± ")
        small = f" <small>± {html.escape(error)}</small>" if sign else ""
        return f"<td{' class=best' if (i, j) in marked else ''}>{html.escape(value)}{small}</td>"

    lines = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
    lines += ["<tr>" + "".join(cell(i, j, text) for j, text in enumerate(row)) + "</tr>" for i, row in enumerate(body)]
    name = html.escape(caption or head[0], quote=True)
    title = f"<h3>{html.escape(caption)}</h3>" if caption else ""
    scrolled = f'<div class=wide tabindex=0 role=region aria-label="{name}"><table>{"".join(lines)}</table></div>'
    return f"<div class=table>{title}{scrolled}</div>"


def digits_of(values: Sequence[float], most: int = 6) -> int:
    """Digits after the point for numbers of one column: three that count of the least, five at most of the largest."""
    sizes = [abs(v) for v in values if v and math.isfinite(v)]
    if not sizes:
        return 0
    place = lambda size: math.floor(math.log10(size))
    return min(max(2 - place(min(sizes)), 0), max(4 - place(max(sizes)), 0), most)


def column(values: Sequence[float | None], digits: int | None = None, unit: str = "") -> list[str]:
    """Numbers as texts with the same digits after the point; `ABSENT` for None."""
    digits = digits_of([v for v in values if v is not None]) if digits is None else digits
    return [ABSENT if v is None else f"{v:,.{digits}f}{unit}" for v in values]


def best_rows(values: Sequence[float | None], errors: Sequence[float | None], best: str) -> set[int]:
    """The rows that may be the best: those within two standard errors of the difference to it.

    None where an error is not known or is 0, where only one row has a value,
    or where all of them may be it.
    """
    rows = [(v, e, i) for i, (v, e) in enumerate(zip(values, errors, strict=True)) if v is not None]
    if len(rows) < 2 or not best:
        return set()
    top, error, _ = (min if best == "min" else max)(rows, key=lambda row: row[0])
    if not all(e for _, e, _ in rows) or error is None:
        return set()
    near = {i for v, e, i in rows if abs(v - top) <= 2.0 * math.hypot(error, e or 0.0)}
    return near if len(near) < len(rows) else set()


def metric_table(rows: Sequence[dict[str, Any]], metric: Metric) -> str:
    """Rows are labels, columns step counts. `*` marks images too few for the features.

    The best is marked among the rows of most images: those of fewer do not compare with them.
    """
    values, steps = pivot(rows, metric.key), sorted({row["steps"] for row in rows})
    errors = pivot(rows, error_key(metric))
    few = {(row["label"], row["steps"]) for row in rows if row["few_images"]}
    images = {row["label"]: row["images"] for row in rows}
    labels = [label for label in values if any(v is not None for v in values[label].values())]
    most = max(images[label] for label in labels)
    among = [i for i, label in enumerate(labels) if images[label] == most]
    starred = metric.key in ("distance", "abs_gap", "to_teacher")
    body, marked = [[f"{label} ({images[label]:,})"] for label in labels], set[tuple[int, int]]()
    for j, n in enumerate(steps):
        found = [values[label].get(n) for label in labels]
        spread = [errors[label].get(n) for label in labels]
        digits = digits_of([v for v in found if v is not None]) if metric.digits is None else metric.digits
        for i, text in enumerate(column(found, digits)):
            error = "" if spread[i] is None or found[i] is None else f" ± {spread[i]:.{digits}f}"
            body[i].append(text + (" *" if starred and found[i] is not None and (labels[i], n) in few else "") + error)
        best = best_rows([found[i] for i in among], [spread[i] for i in among], metric.best)
        marked |= {(among[i], j + 1) for i in best}
    return table(["weights (images)", *map(count_label, steps)], body, metric.title, marked)


def plot(draw: Callable[[Any], None], size: tuple[float, float] = (5.0, 3.2)) -> str:
    """An SVG that `draw(axes)` makes, inline."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "shortcut_jax", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        lines = len(axes.get_legend_handles_labels()[0])
        if lines:
            beside: dict[str, Any] = (
                {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "fontsize": 7} if lines > 4 else {}
            )
            axes.legend(frameon=False, **beside)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    return f'<div class="plot">{svg[svg.index("<svg") :]}</div>'


def quality_plot(rows: Sequence[dict[str, Any]], metric: Metric) -> str:
    """A figure against steps, a line a label."""
    from matplotlib.ticker import LogLocator, NullFormatter

    def draw(axes: Any) -> None:
        steps = sorted({row["steps"] for row in rows})
        for label, values in pivot(rows, metric.key).items():
            points = [(n, v) for n, v in sorted(values.items()) if v is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [str(n) for n in steps])
        axes.minorticks_off()
        if metric.key in ("distance", "to_teacher", "abs_gap"):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # 0.3, not 3 x 10^-1
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="sampling steps", title=metric.title)

    return plot(draw)


def path_section(paths: dict[str, Any], times: Sequence[float]) -> str:
    """How straight the fields are: curves of change, and the self-consistency error by step size."""

    def change(axes: Any) -> None:
        for label, measured in paths.items():
            axes.plot(times, measured["change"], linewidth=1.4, label=label)
        axes.invert_xaxis()
        axes.set(xlabel="t (1 is noise)", yscale="log", title="relative change of velocity along the path")

    def consistency(axes: Any) -> None:
        for label, measured in paths.items():
            axes.plot(CONSISTENCY_STEPS, measured["consistency"], marker="o", markersize=3.5, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(CONSISTENCY_STEPS, [f"1/{m}" if m > 1 else "1" for m in CONSISTENCY_STEPS])
        axes.minorticks_off()
        axes.set(xlabel="step size", yscale="log", title="one step against two of half its size")

    head = ["weights", "mean change", *(f"step 1/{m}" if m > 1 else "step 1" for m in CONSISTENCY_STEPS)]
    means = [[sum(m["change"]) / len(m["change"]), *m["consistency"]] for m in paths.values()]
    columns = [column(found) for found in zip(*means, strict=True)]
    body = [[label, *row] for label, row in zip(paths, zip(*columns, strict=True), strict=True)]
    text = (
        f"Euler's path from noise in {len(times) + 1} steps. Change: |v_k - v_(k-1)| / |v_(k-1)|. Self-consistency: "
        "where one step ends against where two of half its size end, over the length of the two; this is what SCFM "
        "minimises."
    )
    return f"<p>{html.escape(text)}</p><div class=pair>{plot(change)}{plot(consistency)}</div>" + table(head, body)


def embedded_image(image: Image.Image, alt: str) -> str:
    """An image inside the page."""
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


def definitions(told: dict[str, str]) -> str:
    """Names and what they stand for, a row each."""
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in told.items()) + "</dl>"


def section(title: str, *parts: str) -> str:
    """A card of the page."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def page(title: str, subtitle: str, facts: dict[str, str], sections: Sequence[str]) -> str:
    """The whole document."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p>{definitions(facts)}"
        f"{''.join(sections)}</main></body></html>\n"
    )
