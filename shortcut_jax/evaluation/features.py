"""Images and texts as features: InceptionV3, CLIP, and what stands in where their weights are absent.

Everything is computed in float32, on accelerators too: they would round the factors of products by default, and
measures that others compare with are not to depend on the device.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from shortcut_jax.data.records import to_latents
from shortcut_jax.errors import ConvertedError, UsageError
from shortcut_jax.evaluation.random_network import random_features, random_weights
from shortcut_jax.evaluation.resize import RESIZES, for_clip, for_inception, to_rgb
from shortcut_jax.formats.inference_checkpoint import RECORD
from shortcut_jax.formats.tokenizers import CLIP, Tokenizer
from shortcut_jax.inference.encoders import local_mesh, on_mesh, place_on, split_rows
from shortcut_jax.models.clip import ClipPair
from shortcut_jax.models.inception import SIDE, InceptionV3
from shortcut_jax.sources.models import Model, open_models

MAX_PIXELS = 4096
"""Values of an image whose pixels serve as features: their covariance has the square of that."""

ROWS_AT_ONCE = 32
"""Images or texts that one device takes together."""

_SOURCES = {
    "inception": ("the InceptionV3 of FID", "pt_inception-2015-12-05-6726825d.safetensors"),
    "clip_score": ("both towers of CLIP", "clip-vit-large-patch14"),
}
"""What a network is called, and what it is converted from."""


class Features(NamedTuple):
    """A function from images, uint8 [B, h, w, 3] or [B, h, w, 1], to features [B, size], float32.

    Attributes:
      name: what the Frechet distance on them is called: `FID` for InceptionV3 alone.
      size: features of an image.
      function: computes them.
      weights: which weights of that name compute them, where there are several; of what is kept, not of reports.
    """

    name: str
    size: int
    function: Callable[[np.ndarray], np.ndarray]
    weights: str = ""

    @property
    def identity(self) -> str:
        """By what numbers that were made with them are known."""
        return f"{self.name} {self.weights}".strip()

    def __call__(self, images_BhwC: np.ndarray) -> np.ndarray:
        """The features of images."""
        return self.function(images_BhwC)


def inception(folder: str | Path, resize: str = "clean") -> Features:
    """The features of FID; pooled features, [B, 2048]."""
    model = _open(Path(folder), "inception")
    if resize not in RESIZES:
        raise UsageError(f"resize is {resize!r}, but must be one of {', '.join(RESIZES)}")
    name = "FID" if model.config.divisor == 1 else f"Frechet distance (InceptionV3 of 1/{model.config.divisor} width)"
    name = name if resize == "clean" else f"{name} ({resize} resizing)"
    return Features(name, model.config.features, _inception(model, resize))


def pixels(shape: Sequence[int]) -> Features:
    """Pixels in [-1, 1] of images of one shape [h, w, C].

    Raises:
      UsageError: an image has more than `MAX_PIXELS` values.
    """
    height, width, channels = shape
    size = height * width * channels
    if size > MAX_PIXELS:
        raise UsageError(
            f"images of {height} x {width} x {channels} have {size} values, but pixels serve as features up to "
            f"{MAX_PIXELS}: take a random network, or convert InceptionV3"
        )

    def flat(images_BhwC: np.ndarray) -> np.ndarray:
        if images_BhwC.shape[1:] != tuple(shape):
            raise ValueError(f"images are {list(images_BhwC.shape[1:])}, not {list(shape)}")
        return to_latents(images_BhwC).reshape(len(images_BhwC), size)

    return Features("Frechet distance (pixels)", size, flat)


def random_network(seed: int = 0, size: int = 128) -> Features:
    """The channel means of a small convolutional network with random weights; see `evaluation/random_network.py`."""
    mesh, _ = local_mesh()
    weights = random_weights(seed, size)
    network = jax.jit(lambda x_BhwC: random_features(weights, to_latents(x_BhwC)))
    return Features(f"Frechet distance (random network, seed {seed})", size, _by_rows(mesh, to_rgb, network))


class ClipEmbeddings:
    """Images and texts in the joint space of CLIP, on a mesh.

    Attributes:
      size: E.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, mesh: Mesh):
        """Takes an opened `clip_score` model that is on the mesh (`on_mesh`), and reads its weights.

        Raises:
          ConvertedError: they cannot be read.
        """
        self._config, self._tokenizer = model.config, tokenizer
        self.size = model.config.joint
        params, pair = place_on(mesh, model), ClipPair(model.config)
        apply = lambda method: jax.jit(lambda weights, x: pair.apply({"params": weights}, x, method=method))
        images, texts = apply("images"), apply("texts")
        self._images = _by_rows(mesh, lambda x: for_clip(x, self._config.side), lambda x: images(params, x))
        self._texts = _by_rows(mesh, lambda x: self._tokens(x).ids_BM, lambda x: texts(params, x))

    def _tokens(self, texts: Sequence[str]) -> Any:
        return self._tokenizer(list(texts), min(self._tokenizer.max_tokens, self._config.max_tokens))

    def images(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Images [h, w, 3 or 1], uint8, of any sizes -> [B, E], float32, not normalised."""
        return self._images(images)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> [B, E], float32, not normalised; what is beyond 77 tokens is cut off."""
        return self._texts(texts)

    def cuts(self, texts: Sequence[str]) -> list[str]:
        """What is cut off each text; empty where nothing is."""
        return list(self._tokens(texts).cuts)


def load_clip(folder: str | Path) -> ClipEmbeddings:
    """CLIP for scores of images against texts.

    Args:
      folder: converted from a whole CLIP, with its tokenizer.

    Raises:
      ConvertedError, ConversionError, SafetensorsError: there is none, or it cannot be read.
    """
    model = _open(Path(folder), "clip_score")
    if not (Path(folder) / RECORD).is_file():
        raise ConvertedError(f"{folder} is not converted: {_advice('clip_score')}")
    tokenizer = Tokenizer(Path(folder) / CLIP)
    if tokenizer.vocab > model.config.vocab:
        raise ConvertedError(
            f"{folder}: the tokenizer has {tokenizer.vocab} tokens, but CLIP knows {model.config.vocab}: they belong "
            f"to different models"
        )
    mesh, _ = local_mesh()
    return ClipEmbeddings(on_mesh(model, mesh, "float32"), tokenizer, mesh)


def _advice(kind: str) -> str:
    return f"make it with python -m shortcut_jax.convert --from={_SOURCES[kind][1]} --to=converted/{kind}"


def _open(folder: Path, kind: str) -> Model:
    name = _SOURCES[kind][0]
    if not folder.exists():
        raise ConvertedError(f"{folder}, {name}, is not found: {_advice(kind)}")
    model = next((m for m in open_models(folder) if m.kind == kind), None)
    if model is None:
        raise ConvertedError(f"{folder} does not hold {name}: {_advice(kind)}")
    return model


def _inception(model: Model, resize: str) -> Callable[[np.ndarray], np.ndarray]:
    mesh, _ = local_mesh()
    model = on_mesh(model, mesh, "float32")
    params, network = place_on(mesh, model), InceptionV3(model.config)
    apply = jax.jit(lambda weights, x_BhwC: network.apply({"params": weights}, x_BhwC))
    return _by_rows(mesh, lambda x: for_inception(x, SIDE, resize), lambda x_BhwC: apply(params, x_BhwC))


def _by_rows(mesh: Mesh, prepare: Callable[[Any], np.ndarray], network: Callable[[Any], Any]) -> Callable[..., Any]:
    """Any number of rows through a network, some at once, split over the devices.

    Numbers of rows are rounded up to few sizes (by repeating the last), for each size is compiled once. The host
    prepares rows while the devices are at those before.
    """
    devices = mesh.devices.size

    def run(rows: Any) -> np.ndarray:
        if not len(rows):
            raise ValueError("there are no rows to compute features of")
        parts, most = [], devices * ROWS_AT_ONCE
        for first in range(0, len(rows), most):
            ready = prepare(rows[first : first + most])
            size = devices * 2 ** (-(-len(ready) // devices) - 1).bit_length()
            padded = ready[np.minimum(np.arange(size), len(ready) - 1)]
            with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
                parts.append((network(split_rows(mesh, padded)), len(ready)))
        return np.concatenate([np.asarray(part)[:num] for part, num in parts])

    return run
