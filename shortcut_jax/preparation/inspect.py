"""Looking at a prepared set: what is in it, in numbers and as a sheet of images with their captions."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shortcut_jax.cluster.shared_folder import check_place
from shortcut_jax.data.format import VAE, PreparedSet, SetInfo, num_bytes
from shortcut_jax.errors import UsageError

SAMPLE = {"pixels": 20_000, "latents": 1_000, "captions": 1_000}
"""Records that histograms are made of: those of latents are about 2 MB each."""
SHEET_BUCKETS, SHEET_COLUMNS, TILE = 12, 4, 192
_BARS = 8


class Sample(NamedTuple):
    """Of some records.

    Attributes:
      words: of each caption.
      sizes: height and width of each original; none of captions alone.
      tokens: stored text states of each caption; None where all have the same number.
      of: records that they were drawn from.
    """

    words: list[int]
    sizes: list[tuple[int, int]]
    tokens: list[int] | None
    of: int


def inspect(folder: Path, out: Path | None) -> list[str]:
    """Writes the sheet of a set with images, and returns what is to be said of it, a line each.

    Args:
      folder: of the set.
      out: the PNG; `NAME-inspect.png` in the current folder by default.

    Raises:
      DataError: there is no set, or it is damaged.
      UsageError: the PNG cannot be written there, or there is nothing to show in it.
    """
    png = out or Path(f"{folder.expanduser().resolve().name}-inspect.png")
    if png.suffix.lower() != ".png" or not png.absolute().parent.is_dir():
        raise UsageError(f"--out={png}: name a .png in a folder that is there")
    check_place(png, "--out", folder=False)
    prepared = PreparedSet(folder)
    images = prepared.info.store != "captions"
    if out and not images:
        raise UsageError(f"--out={out}: {folder} is a set of captions alone, which has no images to show")
    lines = statistics(prepared.info, draw_sample(prepared), num_bytes(prepared.folder))
    if not images:
        return lines
    sheet(prepared).save(png)
    return [*lines, f"images: {png}"]


def draw_sample(prepared: PreparedSet, most: int | None = None, seed: int = 0) -> Sample:
    """Captions and sizes of records of the largest split, of a random choice where there are more than `most`."""
    info = prepared.info
    split = max(info.counts, key=info.num_records)
    records, total = prepared.records(split, decode=False), info.num_records(split)
    most = most or SAMPLE[info.store]
    chosen = np.arange(total)
    if total > most:
        chosen = np.sort(np.random.default_rng(seed).choice(total, most, replace=False))
    words, sizes, tokens = [], [], []
    for record in _read(records, chosen):
        words.append(len(_text(record["caption"]).split()))
        if info.store != "captions":
            sizes.append((int(record["height"]), int(record["width"])))
        tokens.append(len(record["txt"]) if "txt" in record else 0)
    trimmed = info.text is not None and info.text.states == "trimmed"
    return Sample(words, sizes, tokens if trimmed else None, total)


def statistics(info: SetInfo, sample: Sample, size: int) -> list[str]:
    """What a set of `size` bytes holds, in lines."""
    lines = [f"store: {info.store}"]
    lines += [f"{split}: {info.num_records(split):,} records" for split in info.counts]
    for i, (h, w) in enumerate(info.buckets if sample.sizes else ()):
        count = sum(numbers[i] for numbers in info.counts.values())
        lines.append(f"  {h}x{w}: {count:,} ({count / info.total:.1%})")
    drawn = len(sample.words)
    if drawn < sample.of:
        lines.append(f"of {drawn:,} records, drawn from {sample.of:,} at random:")
    for name, values in zip(("height", "width"), zip(*sample.sizes, strict=True), strict=False):
        lines.append(f"{name} of originals: {min(values)} to {max(values)}, median {np.median(values):g}")
    lines += histogram("words of captions", sample.words)
    lines += histogram("tokens of captions", sample.tokens) if sample.tokens else []
    if info.enlarged:
        lines.append(f"enlarged: {info.enlarged:,}, smaller than their bucket")
    lines += [f"skipped: {count:,} {reason}" for reason, count in info.skipped.items()]
    lines += [f"not used: {what} ({count:,})" for what, count in info.unused.items()]
    if info.text:
        t = info.text
        error = f", rounding error {t.error:.2%}" if t.error else ""
        cut = f", {t.cut:,} captions cut" if t.cut else ""
        lines.append(f"text: {t.tokens} tokens of {t.width}, {t.states} states in {t.dtype}{error}{cut}")
    if info.latents:
        z = info.latents
        lines.append(f"latents: {z.channels} channels, {z.stride} pixels each, scale {z.scale:g}, shift {z.shift:g}")
    lines += [f"made with {kind}: {told['origin']}, content {told['content']}" for kind, told in info.encoders.items()]
    each = size / info.total
    lines.append(f"disk: {size / 1e6:,.1f} MB, {each:,.0f} bytes a record, {each / 1e3:,.1f} GB a million records")
    return lines


def histogram(name: str, values: Sequence[int]) -> list[str]:
    """A few ranges of equal width with the number of values in each, and bars."""
    low, high = min(values), max(values)
    step = -(-(high - low + 1) // _BARS)
    counts = np.bincount((np.asarray(values) - low) // step)
    lines = [f"{name}: {low} to {high}, median {np.median(values):g}"]
    for i, count in enumerate(counts):
        first = low + i * step
        bar = "#" * int(np.ceil(40 * count / counts.max()))
        lines.append(f"  {first:4d} to {first + step - 1:4d} {count:9,} {bar}")
    return lines


def sheet(prepared: PreparedSet) -> Image.Image:
    """A few images of each of the fullest buckets, a row a bucket, with their captions."""
    info = prepared.info
    split = max(info.counts, key=info.num_records)
    records, buckets = prepared.records(split), prepared.buckets(split)
    fullest = sorted(np.unique(buckets), key=lambda b: -info.counts[split][b])[:SHEET_BUCKETS]
    rows, decode = [], None
    for bucket in fullest:
        places = np.flatnonzero(buckets == bucket)
        chosen = places[np.unique(np.linspace(0, len(places) - 1, SHEET_COLUMNS).astype(int))]
        held = list(_read(records, chosen))
        if info.latents:
            if decode is None:
                from shortcut_jax.inference.encoders import load_decoder

                decode = load_decoder(prepared.folder / VAE)
            mean_BhwC = np.stack([r["mean"] for r in held]).astype(np.float32)
            images = list(decode((mean_BhwC - info.latents.shift) * info.latents.scale))
        else:
            images = [r["image"] for r in held]
        rows.append([(np.asarray(p), _text(r["caption"])) for p, r in zip(images, held, strict=True)])
    return _laid_out(rows, [f"{h}x{w}" for h, w in (info.buckets[b] for b in fullest)])


def _laid_out(rows: Sequence[Sequence[tuple[np.ndarray, str]]], labels: Sequence[str]) -> Image.Image:
    font, gap, text = ImageFont.load_default(), 8, 48
    left = 72
    fits = lambda image: TILE / max(image.shape[:2])
    heights = [max(round(image.shape[0] * fits(image)) for image, _ in row) + text for row in rows]
    size = left + SHEET_COLUMNS * (TILE + gap), gap + sum(h + gap for h in heights)
    page = Image.new("RGB", size, "white")
    pen, y = ImageDraw.Draw(page), gap
    for row, label, height in zip(rows, labels, heights, strict=True):
        pen.text((gap, y), label, fill="black", font=font)
        for j, (image, caption) in enumerate(row):
            h, w = (max(round(side * fits(image)), 1) for side in image.shape[:2])
            how = Image.Resampling.NEAREST if fits(image) > 1 else Image.Resampling.BICUBIC
            x = left + j * (TILE + gap)
            page.paste(Image.fromarray(image).resize((w, h), how), (x, y))
            lines = textwrap.wrap(caption, 30, max_lines=3, placeholder=" ...")
            pen.multiline_text((x, y + h + 2), "\n".join(lines), fill="black", font=font)
        y += height + gap
    return page


def _read(records: Any, places: Sequence[int] | np.ndarray) -> Iterator[Mapping[str, Any]]:
    for first in range(0, len(places), 32):
        yield from records.__getitems__([int(i) for i in places[first : first + 32]])


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
