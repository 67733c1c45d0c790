"""A TFDS set that was generated as ArrayRecord: `tfds:NAME[:SPLIT]`, or the folder of one."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shortcut_jax.data.arrays import first_line
from shortcut_jax.data.datasets import EMBEDDED, register
from shortcut_jax.data.stored import open_records
from shortcut_jax.errors import DataError
from shortcut_jax.preparation.inputs.items import CAPTION_FIELDS, Item, SourceOptions, captioned, consecutive
from shortcut_jax.preparation.inputs.template import fill
from shortcut_jax.preparation.units import Skip, Unit

PREFIX = "tfds:"
DATASET_INFO = "dataset_info.json"


class CatalogueSource:
    """See the module; captions are a text field, or a template filled in with the other fields.

    Attributes:
      units: consecutive records.
      num_items: records of the split.
      fingerprint: of the set's name, version and shards.
      notes: none.
      unused: none.
    """

    notes: tuple[str, ...] = ()
    unused: Mapping[str, int] = {}

    def __init__(self, name: str, options: SourceOptions):
        """Opens a set.

        Args:
          name: `NAME[/CONFIG][:VERSION][:SPLIT]` or `FOLDER[:SPLIT]`; the split is `train` by default.
          options: where sets lie and what the captions are.

        Raises:
          DataError: it is not found, is not stored as ArrayRecord, or has no images or no such captions.
        """
        import tensorflow_datasets as tfds

        name, split = _parse_name(name)
        builder = _open(name, options.tfds_dir)
        self._template, self._field = options.template, options.caption_field
        self._features = builder.info.features
        images = [k for k, f in self._features.items() if type(f) is tfds.features.Image]
        if not images:
            raise DataError(f"the TFDS set {name!r} has no images: its fields are {', '.join(self._features)}")
        self._image = images[0]
        if not self._template and not self._field:
            self._field = self._find_caption(name)
        if split not in builder.info.splits:
            raise DataError(f"the TFDS set {name!r} has no split {split!r}: it has {', '.join(builder.info.splits)}")
        info = builder.info.splits[split]
        self._split, self.num_items = split, info.num_examples
        stated = f"{builder.info.full_name} {split} {info.shard_lengths} {info.num_bytes}"
        self.fingerprint = hashlib.sha256(stated.encode()).hexdigest()
        self._records = open_records(builder, split, {self._image: tfds.decode.SkipDecoding()})
        self._unit = options.unit
        self.units = consecutive(self.num_items, options.unit, "records")
        if self.num_items:
            self._caption(self._records[0])  # a field that is not found is reported now

    def items(self, unit: Unit) -> Iterator[Item | Skip]:
        """The records of a unit."""
        start = unit.index * self._unit
        for index in range(start, start + (unit.size or 0)):
            record = self._records[index]
            yield captioned(f"{self._split}/{index:08d}", bytes(record[self._image]), self._caption(record))

    def _find_caption(self, name: str) -> str:
        import tensorflow_datasets as tfds

        texts = [k for k, f in self._features.items() if isinstance(f, tfds.features.Text)]
        for field in CAPTION_FIELDS:
            if field in texts:
                return field
        raise DataError(
            f"the TFDS set {name!r} has no {', '.join(CAPTION_FIELDS)}: say what the captions are with "
            f'--caption_field=FIELD or --template="a photo of a {{label}}"; its fields are {", ".join(self._features)}'
        )

    def _caption(self, record: Mapping[str, Any]) -> Any:
        if self._template:
            fields = {k: self._word(k, v) for k, v in record.items() if k != self._image}
            return fill(self._template, fields)
        assert self._field
        value: Any = record
        for part in self._field.split("/"):
            if not isinstance(value, Mapping) or part not in value:
                raise DataError(f"--caption_field={self._field} is not found: the fields are {', '.join(record)}")
            value = value[part]
        return value

    def _word(self, name: str, value: Any) -> Any:
        import tensorflow_datasets as tfds

        feature = self._features[name]
        if isinstance(feature, tfds.features.ClassLabel):
            return feature.int2str(int(value)).replace("_", " ")
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def is_tfds_folder(path: Path) -> bool:
    """Whether a folder is that of a TFDS set."""
    return (path / DATASET_INFO).is_file()


def _parse_name(text: str) -> tuple[str, str]:
    """Name (with a version) and split."""
    head, _, tail = text.rpartition(":")
    if head and re.fullmatch(r"[A-Za-z_]\w*", tail):
        return head, tail
    return text, "train"


def _open(name: str, tfds_dir: str) -> Any:
    import tensorflow_datasets as tfds

    tfds.display_progress_bar(False)
    folder = Path(name).expanduser()
    try:
        if not is_tfds_folder(folder) and name in EMBEDDED:
            register(name)
            builder = tfds.builder(name, data_dir=os.path.expanduser(tfds_dir), file_format="array_record")
            builder.download_and_prepare()
            return builder
        folder = folder if is_tfds_folder(folder) else _find(name, Path(tfds_dir).expanduser())
        builder = tfds.builder_from_directory(folder)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot open the TFDS set {name!r}: {first_line(error)}") from error
    form = builder.info.file_format
    if form is None or form.value != "array_record":
        raise DataError(
            f"{folder} is stored as {form.value if form else 'nothing known'}, which only TensorFlow reads: generate "
            f"it with `tfds build {name} --file_format=array_record`"
        )
    return builder


def _find(name: str, tfds_dir: Path) -> Path:
    """The folder of a set that was generated: TFDS itself would go to the network for one that was not."""
    base, _, version = name.partition(":")
    path = tfds_dir / base
    found = sorted(
        (p.parent for depth in ("", "*/", "*/*/") for p in path.glob(depth + DATASET_INFO)),
        key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)],
    )
    found = [p for p in found if not version or p.name == version]
    if len({p.parent for p in found}) > 1:
        configs = ", ".join(sorted({str(p.parent.relative_to(tfds_dir)) for p in found}))
        raise DataError(f"the TFDS set {name!r} has several configs, {configs}: name one of them")
    if not found:
        raise DataError(
            f"the TFDS set {name!r} is not prepared: {path} is not found or holds none. Generate it (TensorFlow is "
            f"needed for that) with `tfds build {base} --file_format=array_record --data_dir={tfds_dir}`"
        )
    return found[-1]
