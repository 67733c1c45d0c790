"""Scalars and images: TensorBoard, a JSON-lines record, contact sheets and curves."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shortcut_jax.cluster.json_lines import append_line, read_lines
from shortcut_jax.cluster.timing import Stopwatch


class Meter:
    """Time of training steps, and images and FLOPs a second in it; the first step of a process is left out."""

    def __init__(self, rows: int, flops: int, peak: float | None, watch: Stopwatch):
        """Takes rows and FLOPs of a step, FLOP/s of all devices where they are known, and the stopwatch of the loop."""
        self._rows, self._flops, self._peak, self._watch = rows, flops, peak, watch
        self._step: int | None = None
        self._seconds: dict[str, float] = {}

    def seen(self, step: int) -> bool:
        """Starts the clock when the first step is known to be done; tells whether this was it."""
        first = self._step is None
        if first:
            self._step, self._seconds = step, self._step_seconds()
        return first

    def rates(self, step: int) -> dict[str, float]:
        """Means since the last call: images a second, model FLOP/s, MFU where the peak is known, seconds of a step.

        `time/data`, `time/host` (saving included) and `time/device` add up to the wall time of a step, see
        `timing.STEP_KINDS`. Compiling, validating, sampling and profiling are no part of it, nor of the rates.
        """
        if self._step is None or step == self._step:
            return {}
        now = self._step_seconds()
        parts = {kind: (now[kind] - self._seconds[kind]) / (step - self._step) for kind in now}
        self._step, self._seconds = step, now
        seconds = sum(parts.values())
        flops = self._flops / seconds
        rates = {"images_per_second": self._rows / seconds, "model_flops_per_second": flops}
        rates |= {"mfu": flops / self._peak} if self._peak else {}
        return rates | {f"time/{kind}": value for kind, value in parts.items()}

    def _step_seconds(self) -> dict[str, float]:
        steps = self._watch.step_seconds()
        return {**steps, "host": steps["host"] + self._watch.seconds().get("saving", 0.0)}


class MetricLog:
    """Writes scalars to TensorBoard and `metrics.jsonl`, and images to TensorBoard. Only process 0 writes."""

    def __init__(self, workdir: Path):
        self._writer: Any = None
        self._path: Path | None = None
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            self._path = workdir / "metrics.jsonl"
            self._writer = SummaryWriter(str(workdir / "tensorboard"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records one value a name."""
        if self._path is None:
            return
        try:
            append_line(self._path, {"step": step, **values})
        except OSError as error:  # a full disk takes no line, but stops no run
            print(f"the metrics of step {step} are not written: {error}", file=sys.stderr, flush=True)
        for name, value in values.items():
            self._tensorboard(functools.partial(_add_scalar, name=name, value=value, step=step))

    def config(self, step: int, values: dict[str, Any], shown: Sequence[str] = ("loss",)) -> None:
        """Records what a run is made by, as text and as hyperparameters; their table shows the scalars `shown`."""
        self._tensorboard(lambda writer: add_config(writer, "config", values, shown, step))

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Records an image."""
        pixels = np.asarray(image.convert("RGB"))
        self._tensorboard(lambda writer: writer.add_image(name, pixels, step, dataformats="HWC"))
        self._tensorboard(lambda writer: writer.flush())

    def close(self) -> None:
        """Flushes and closes."""
        self._tensorboard(lambda writer: writer.close())

    def _tensorboard(self, act: Callable[[Any], None]) -> None:
        """Does something with TensorBoard's writer, unless storage has failed it: it would block for ever then."""
        if self._writer is None:
            return
        try:
            if not self._writer.file_writer.event_writer._worker.is_alive():
                raise OSError("its file could not be written")
            act(self._writer)
        except OSError as error:
            print(f"TensorBoard gets no more of this run: {error}", file=sys.stderr, flush=True)
            self._writer = None


def add_config(writer: Any, tag: str, values: dict[str, Any], shown: Sequence[str], step: int = 0) -> None:
    """Settings, nested or flat, for TensorBoard's tabs TEXT and HPARAMS, which compares runs by the `shown` tags."""
    from tensorboardX.summary import hparams

    flat = dict(_flat("", values))
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in flat.items()]
    writer.add_text(tag, "\n".join(["| name | value |", "| --- | --- |", *lines]), step)
    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flat.items() if v is not None}
    for summary in hparams(plain, dict.fromkeys(shown, 0.0)):
        writer.file_writer.add_summary(summary)


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield prefix + name, value


def _add_scalar(writer: Any, name: str, value: float, step: int) -> None:
    writer.add_scalar(name, value, step)


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """The values of each step in a `metrics.jsonl`; of what a resumed run has written twice, the last."""
    rows: dict[int, dict[str, float]] = {}
    for row in read_lines(path):
        rows.setdefault(row["step"], {}).update(row)
    return dict(sorted(rows.items()))


def contact_sheet(
    rows: Sequence[np.ndarray], labels: Sequence[str], columns: Sequence[str] = (), cell: int = 48
) -> Image.Image:
    """A labelled grid of images.

    Args:
      rows: for each row an array [columns, h, w, c] of uint8, c 1 or 3.
      labels: one a row, at its left.
      columns: one a column, at its top; none by default.
      cell: pixels of an image's longer side; images are enlarged by whole factors where they are smaller.
    """
    font = ImageFont.load_default()
    measure = lambda text: int(font.getlength(text))
    left = max(measure(label) for label in labels) + 12
    h, w = rows[0].shape[1:3]
    factor = max(cell // max(h, w), 1)
    h, w, gap = h * factor, w * factor, 3
    widest = max((measure(c) for c in columns), default=0)
    step_x = max(w, widest) + gap
    top = 18 if columns else gap
    count = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + count * step_x, top + len(rows) * (h + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for j, text in enumerate(columns):
        pen.text((left + j * step_x + (w - measure(text)) // 2, 3), text, fill="black", font=font)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + i * (h + gap)
        pen.text((6, y + h // 2 - 6), label, fill="black", font=font)
        for j, pixels in enumerate(row):
            image = Image.fromarray(np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels)
            sheet.paste(image.resize((w, h), Image.Resampling.NEAREST), (left + j * step_x, y))
    return sheet


def save_curves(path: Path, records: dict[int, dict[str, float]], names: Sequence[str]) -> None:
    """Draws scalars over steps, each name a line, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name in names:
        points = [(step, row[name]) for step, row in records.items() if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axes.set(xlabel="step", yscale="log")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
