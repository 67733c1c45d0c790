"""Sources of captioned images: a folder in one of several layouts, WebDataset tars, parquet files, or a TFDS set."""

import glob
from collections.abc import Callable
from pathlib import Path

from shortcut_jax.errors import DataError
from shortcut_jax.preparation.inputs.items import Item, Source, SourceOptions
from shortcut_jax.preparation.inputs.layouts import LAYOUTS, NAMES, UNDERSTOOD, recognise
from shortcut_jax.preparation.inputs.parquet import ParquetSource
from shortcut_jax.preparation.inputs.tar_files import ENDINGS
from shortcut_jax.preparation.inputs.tfds import PREFIX, CatalogueSource
from shortcut_jax.preparation.inputs.tree import Tree, walk
from shortcut_jax.preparation.inputs.webdataset import TarSource

__all__ = ["NAMES", "Item", "Source", "SourceOptions", "open_source"]


def open_source(source: str, options: SourceOptions, say: Callable[[str], None] = lambda line: None) -> Source:
    """Opens a source by what it is, and says what that is.

    Args:
      source: `tfds:NAME`, a folder, or files.
      options: how it is read.
      say: takes a line of what was found.

    Raises:
      DataError: it is none of those that can be read, or an option does not go with it.
    """
    opened, lines = _open(source, options)
    for line in (*lines, *opened.notes):
        say(f"source: {line}")
    return opened


def _open(source: str, options: SourceOptions) -> tuple[Source, tuple[str, ...]]:
    path = Path(source).expanduser()
    if source.startswith(PREFIX):
        check_options(options, "tfds")
        return CatalogueSource(source.removeprefix(PREFIX), options), ()
    if "://" in source or source.startswith("pipe:"):
        raise DataError(f"--source={source}: only files can be read; mount or copy it first")
    if path.is_dir():
        tree, layout, notes = recognise(walk(path), options)
        check_options(options, layout.name)
        return layout.open(tree, options), (f"{layout.what} in {tree.folder}", *notes)
    if source.lower().endswith(ENDINGS):
        check_options(options, "tars")
        return TarSource(source, options), ()
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if files and all(name.suffix == ".parquet" for name in files):
        check_options(options, "parquet")
        return ParquetSource(_tree_of(files), options), ()
    state = "is of no kind that can be read" if path.exists() or files else "was not found"
    raise DataError(f"--source={source} {state}. Understood are: {UNDERSTOOD}; or tfds:NAME")


def check_options(options: SourceOptions, name: str) -> None:
    """Raises DataError where an option does not go with a layout."""
    layout = LAYOUTS[NAMES.index(name)]
    for unfit in layout.unfit:
        if getattr(options, unfit):
            raise DataError(f"--{unfit} does not go with {layout.what}")
    if options.layout and options.layout != name:
        raise DataError(f"--layout={options.layout} does not go with {layout.what}")


def _tree_of(files: list[Path]) -> Tree:
    """Files that are named one by one, links among them: who names a link means the file."""
    folder = files[0].parent if len({file.parent for file in files}) == 1 else Path("/")
    return Tree(folder, [str(file.absolute().relative_to(folder.absolute())) for file in files], frozenset(), [], {})
