"""The layouts of folders that captioned images come in, recognised by their files."""

from collections.abc import Callable
from typing import NamedTuple

from shortcut_jax.errors import DataError
from shortcut_jax.preparation.inputs.files import ClassSource, SidecarSource, has_sidecars, is_img2dataset
from shortcut_jax.preparation.inputs.folder import FolderSource
from shortcut_jax.preparation.inputs.items import Source, SourceOptions
from shortcut_jax.preparation.inputs.parquet import SPLITS, ParquetSource, data_files
from shortcut_jax.preparation.inputs.tables import Csv, JsonLines, ParquetTable, Table
from shortcut_jax.preparation.inputs.tar_files import is_tar_name
from shortcut_jax.preparation.inputs.tfds import DATASET_INFO, CatalogueSource
from shortcut_jax.preparation.inputs.tree import Tree, is_image
from shortcut_jax.preparation.inputs.webdataset import TarSource


class Layout(NamedTuple):
    """A way to lay out captioned images.

    Attributes:
      name: for `--layout`.
      what: it is, in words.
      found: whether a folder has it.
      open: reads it.
      unfit: options that do not go with it.
    """

    name: str
    what: str
    found: Callable[[Tree, SourceOptions], bool]
    open: Callable[[Tree, SourceOptions], Source]
    unfit: tuple[str, ...] = ()


def _tars(tree: Tree) -> set[str]:
    return {name for name in [*tree.files, *tree.unread] if "/" not in name and is_tar_name(name)}


def _table(name: str, what: str, make: Callable[..., Table]) -> Layout:
    found = lambda tree, options: name in tree.files
    return Layout(
        name, what, found, lambda tree, options: FolderSource(tree, make(tree.folder / name), options), ("template",)
    )


LAYOUTS = (
    Layout(
        "tfds",
        "a TFDS set (dataset_info.json)",
        lambda tree, options: DATASET_INFO in tree.files,
        lambda tree, options: CatalogueSource(str(tree.folder), options),
        ("where",),
    ),
    _table("metadata.jsonl", "metadata.jsonl (file_name and prompt, caption or text)", JsonLines),
    _table("metadata.csv", "metadata.csv (the same columns)", Csv),
    _table("metadata.parquet", "metadata.parquet (the same columns)", ParquetTable),
    Layout(
        "tars",
        "WebDataset tar files",
        lambda tree, options: bool(_tars(tree)),
        lambda tree, options: TarSource(str(tree.folder), options, tree.rest(_tars(tree))),
        ("where", "template"),
    ),
    Layout(
        "parquet",
        "parquet files with a column of images",
        lambda tree, options: bool(data_files(tree)),
        lambda tree, options: ParquetSource(tree, options),
        ("where",),
    ),
    Layout(
        "img2dataset",
        "files of img2dataset (00000/000000000.jpg, .txt, .json)",
        lambda tree, options: is_img2dataset(tree),
        lambda tree, options: SidecarSource(tree, options),
        ("where", "template"),
    ),
    Layout(
        "sidecars",
        "images with a .txt or .caption of the same name beside each",
        lambda tree, options: has_sidecars(tree) and not is_img2dataset(tree),
        lambda tree, options: SidecarSource(tree, options),
        ("where", "template"),
    ),
    Layout(
        "classes",
        'folders named after classes (cat/1.jpg) with --template="a photo of a {label}"',
        lambda tree, options: bool(options.template) and any("/" in name for name in tree.images()),
        lambda tree, options: ClassSource(tree, options),
        ("where", "caption_field"),
    ),
)

_FIRST = ("metadata.jsonl", "tars")
"""Layouts that are read, and the others named, where a folder has several; in the order of `LAYOUTS`."""

NAMES = tuple(layout.name for layout in LAYOUTS)
UNDERSTOOD = "; ".join(layout.what for layout in LAYOUTS)


def recognise(tree: Tree, options: SourceOptions) -> tuple[Tree, Layout, tuple[str, ...]]:
    """The layout of a folder: the part of it that is read, its layout, and what is to be said.

    Raises:
      DataError: it has none or several, or not the one that the options name.
    """
    _check_foreign(tree)
    part, notes = _training_part(tree)
    found = [layout for layout in LAYOUTS if layout.found(part, options)]
    if options.layout:
        wanted = LAYOUTS[NAMES.index(options.layout)]
        if wanted not in found:
            held = f": it has {', '.join(x.name for x in found)}" if found else ""
            raise DataError(f"--source={tree.folder} is not laid out as {wanted.what}{held}")
        left = [layout.name for layout in found if layout is not wanted]
        return part, wanted, (*notes, *((f"not read: {', '.join(left)}",) if left else ()))
    first = next((layout for layout in found if layout.name in _FIRST), None)
    if first and len(found) > 1:
        left = [layout.name for layout in found if layout is not first]
        return part, first, (*notes, f"not read: {', '.join(left)} (--layout={left[0]} does)")
    if len(found) > 1:
        choices = " or ".join(f"--layout={layout.name}" for layout in found)
        raise DataError(
            f"--source={tree.folder} can be read in {len(found)} ways ({'; '.join(x.what for x in found)}): choose "
            f"with {choices}"
        )
    if not found:
        raise DataError(f"--source={tree.folder} {_what_lies_in(tree)}. Understood are: {UNDERSTOOD}; or tfds:NAME")
    return part, found[0], notes


def _training_part(tree: Tree) -> tuple[Tree, tuple[str, ...]]:
    """A folder whose only folders are splits is read in its `train`."""
    tops = tree.tops()
    at_top = [name for name in tree.files if "/" not in name]
    own = any(name.startswith(("metadata.", DATASET_INFO)) or name.endswith(".parquet") for name in at_top)
    if own or _tars(tree) or "train" not in tops or not tops <= {*SPLITS} or any(map(is_image, at_top)):
        return tree, ()
    part = tree.below("train")
    others = [f"{split} ({n:,} file{'s' * (n > 1)})" for split, n in part.splits.items()]
    told = f"; not the split{'s' * (len(others) > 1)} {', '.join(others)}" if others else ""
    return part, (f"reads {part.folder}{told}",)


def _check_foreign(tree: Tree) -> None:
    """Raises DataError for folders that are known, but not read."""
    if "dataset_dict.json" in tree.files or {"state.json", DATASET_INFO} <= {*tree.files}:
        raise DataError(
            f"--source={tree.folder} was written by save_to_disk of datasets: write it as parquet, "
            f"load_from_disk(FOLDER)['train'].to_parquet('train.parquet')"
        )
    if {"blobs", "snapshots"} <= tree.tops():
        revisions = sorted({name.split("/")[1] for name in tree.files if name.startswith("snapshots/")})
        raise DataError(
            f"--source={tree.folder} is a cache of the Hugging Face Hub: give the snapshot in it, "
            f"{tree.folder / 'snapshots' / revisions[-1]}"
        )


def _what_lies_in(tree: Tree) -> str:
    images, num = len(tree.images()), len(tree.files)
    listed = [f"{name}, {why}" for name, why in sorted(tree.folders.items())]
    followed = f"; folders ({'; '.join(listed[:3])}) are not followed" if listed else ""
    if images:
        return f"has {images:,} image{'s' * (images > 1)}, but no captions that are understood{followed}"
    return f"has no captioned images ({num:,} file{'s' * (num != 1)}){followed}"
