"""The tokenizers of a Flux pipeline, from local folders: prompts to token ids, padded and cut as diffusers does."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shortcut_jax.errors import ConvertedError


class Layout(NamedTuple):
    """What a tokenizer folder of a pipeline holds.

    Attributes:
      name: of the text encoder.
      family: how the name of its class begins.
      complete: sets of files each of which is enough.
    """

    name: str
    family: str
    complete: tuple[tuple[str, ...], ...]


CLIP, T5 = "tokenizer", "tokenizer_2"
LAYOUTS = {
    CLIP: Layout("CLIP", "CLIP", (("tokenizer.json",), ("vocab.json", "merges.txt"))),
    T5: Layout("T5", "T5", (("tokenizer.json",), ("spiece.model",))),
}
"""The folders of a pipeline by name."""

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)
"""Every file that a tokenizer is read from; folders as published hold more, weights among them."""

_ADVICE = "convert again with --tokenizer and --tokenizer_2"


class Tokens(NamedTuple):
    """Prompts as token ids.

    Attributes:
      ids_BM: padded and cut, int32.
      cuts: the text that was cut off each prompt; empty where nothing was.
      length_B: tokens of each prompt, its end token included and padding not.
    """

    ids_BM: np.ndarray
    cuts: tuple[str, ...]
    length_B: np.ndarray


class Tokenizer:
    """One tokenizer of a pipeline.

    Attributes:
      name: of the text encoder it belongs to.
      vocab: one more than its largest id.
      max_tokens: the longest text it is made for.
    """

    def __init__(self, folder: Path, kind: str | None = None):
        """Reads `folder`, which is called as in a pipeline unless `kind` tells: `tokenizer`, or `tokenizer_2`.

        Raises:
          ConvertedError: it is missing, incomplete, unreadable or of another kind.
        """
        import transformers

        kind = kind or folder.name
        self.name = check_tokenizer(folder, kind).name
        cls: Any = transformers.CLIPTokenizer if kind == CLIP else transformers.T5Tokenizer
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # what it cannot read is reported below, in one line
        try:
            self._tokenizer = cls.from_pretrained(folder, local_files_only=True)
            self.vocab = max(self._tokenizer.get_vocab().values()) + 1
        except Exception as error:  # The library, its Rust part and JSON each raise their own kinds.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            if kind == T5 and not (folder / "tokenizer.json").is_file():
                reason = "spiece.model is damaged, or needs the package sentencepiece; FLUX.1 has tokenizer.json too"
            raise ConvertedError(f"{folder} cannot be read ({reason}): {_ADVICE}") from error
        finally:
            transformers.logging.set_verbosity(verbosity)
        _check_merges(folder, kind)
        self.max_tokens: int = self._tokenizer.model_max_length

    def __call__(self, prompts: Sequence[str], length: int) -> Tokens:
        """Token ids of `prompts`, each padded or cut to `length`, the end token kept."""
        # Silent, for what does not fit is reported in `cuts`.
        whole = [self._tokenizer(p, verbose=False).input_ids for p in prompts]
        cuts = tuple(self._tokenizer.decode(ids[length - 1 : -1]) if len(ids) > length else "" for ids in whole)
        padded = self._tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
        length_B = np.asarray([min(len(ids), length) for ids in whole], np.int32)
        return Tokens(np.asarray(padded.input_ids, np.int32), cuts, length_B)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of a tokenizer folder, and none beside them, to `target`, called as in a pipeline.

    Raises:
      ConvertedError: `source` is no tokenizer of that kind.
    """
    check_tokenizer(source, target.name)
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _check_merges(folder: Path, kind: str) -> None:
    """Refuses merges that were cut off: the library reads what is left, and splits words otherwise."""
    if kind != CLIP or (folder / "tokenizer.json").is_file():
        return
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    made = {"".join(line.split()) for line in lines if not line.startswith("#version")}
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    letter = lambda token: len(token.removesuffix("</w>")) <= 1 or token.startswith("<|")
    lost = sum(token not in made and not letter(token) for token in vocab)
    if lost:
        raise ConvertedError(f"{folder}/merges.txt lacks {lost:,} merges of vocab.json, so it was cut off: {_ADVICE}")


def check_vocab(where: Path, tokenizer: Tokenizer, known: int) -> None:
    """Raises ConvertedError where a tokenizer of `where` has more tokens than the `known` ones of its text encoder."""
    if tokenizer.vocab > known:
        raise ConvertedError(
            f"{where}: the tokenizer of {tokenizer.name} has {tokenizer.vocab} tokens, but the model knows "
            f"{known}: they belong to different models"
        )


def check_tokenizer(folder: Path, kind: str) -> Layout:
    """Refuses what the library would read as a tokenizer without words, or as one of the other kind.

    Raises:
      ConvertedError: `folder` is no tokenizer of the kind, a key of `LAYOUTS`.
    """
    layout = LAYOUTS[kind]
    if not folder.is_dir():
        raise ConvertedError(f"there is no tokenizer of {layout.name} in {folder}: {_ADVICE}")
    if not any(all((folder / f).is_file() for f in files) for files in layout.complete):
        needed = ", or ".join(" and ".join(files) for files in layout.complete)
        raise ConvertedError(f"{folder} is no tokenizer of {layout.name}, which needs {needed}: {_ADVICE}")
    config = folder / "tokenizer_config.json"
    try:
        entries = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ConvertedError(f"{config} is not JSON ({error}): {_ADVICE}") from error
    if not isinstance(entries, dict):
        raise ConvertedError(f"{config} is not a JSON object: {_ADVICE}")
    family = str(entries.get("tokenizer_class") or "")
    if family and not family.startswith(layout.family):
        raise ConvertedError(f"{folder} is a {family}, not the tokenizer of {layout.name}: {_ADVICE}")
    return layout
