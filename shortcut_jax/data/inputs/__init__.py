"""Sources of captioned pictures: a folder, WebDataset shards, or a TFDS set."""

import glob
from pathlib import Path

from shortcut_jax.data.format import DataError
from shortcut_jax.data.inputs.catalogue import PREFIX, CatalogueSource, is_tfds_folder
from shortcut_jax.data.inputs.folder import METADATA, FolderSource
from shortcut_jax.data.inputs.items import HasUnused, Item, Source, SourceOptions
from shortcut_jax.data.inputs.tar_files import ENDINGS, is_tar_name
from shortcut_jax.data.inputs.webdataset import TarSource

__all__ = ["HasUnused", "Item", "Source", "SourceOptions", "open_source"]


def open_source(source: str, options: SourceOptions) -> Source:
    """Opens a source by what it is.

    Raises:
      DataError: it is none of those that can be read, or an option does not go with it.
    """
    path = Path(source).expanduser()
    folder = path.is_dir()
    if source.startswith(PREFIX) or (folder and is_tfds_folder(path)):
        _check_options(options, "a TFDS set", "where")
        return CatalogueSource(source.removeprefix(PREFIX), options)
    if "://" in source or source.startswith("pipe:"):
        raise DataError(f"--source={source}: only files can be read; mount or copy it first")
    if folder and (path / METADATA).is_file():
        _check_options(options, "a folder of pictures", "template")
        return FolderSource(path, options)
    if source.lower().endswith(ENDINGS) or (folder and any(is_tar_name(p.name) for p in path.iterdir())):
        _check_options(options, "tar files", "where", "template")
        return TarSource(source, options)
    exists = path.exists() or bool(glob.glob(str(path)))
    state = "is of no kind that can be read" if exists else "is not there"
    if folder:
        state = f"has neither {METADATA} nor *.tar nor a TFDS set"
    raise DataError(
        f"--source={source} {state}: give a folder with {METADATA}, WebDataset tar files (data-{{000..123}}.tar), "
        f"or tfds:NAME"
    )


def _check_options(options: SourceOptions, kind: str, *unfit: str) -> None:
    for name in unfit:
        if getattr(options, name):
            raise DataError(f"--{name} does not go with {kind}")
