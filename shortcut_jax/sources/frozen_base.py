"""The frozen base of adapters as it was held in training: whole, and known by its content."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np

from shortcut_jax.core.fingerprint import fingerprint_of
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.errors import ConvertedError
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.init import BASE_DTYPE, FRESH_INPUTS, fresh_embeddings
from shortcut_jax.weights.params import Cast, Params, Spec, shapes_of, spec_of


class Completed(Params):
    """A base with the embeddings that it had not before training, drawn anew.

    Attributes:
      fresh: the names of those embeddings.
    """

    def __init__(self, base: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], network: FluxConfig):
        """Takes a base by path, and the shapes and the geometry of the network that was trained."""
        absent = (path for path in shapes if path not in base and path.startswith(FRESH_INPUTS))
        names = sorted({path.split("/")[0] for path in absent})
        fresh = flat_paths(jax.jit(lambda: fresh_embeddings(network, names))()) if names else {}
        self._base, self._shapes = base, dict(shapes)
        self._drawn = {path: np.array(value) for path, value in fresh.items()}
        self.fresh = " and ".join(names)

    def spec(self, name: str) -> Spec:
        """See `Params`."""
        value = self._drawn.get(name)
        return spec_of(self._base, name) if value is None else Spec(value.dtype, value.shape)

    def __getitem__(self, name: str) -> np.ndarray:
        value = self._drawn.get(name)
        return self._base[name] if value is None else value.copy()  # a reader may change what it is given

    def __iter__(self) -> Iterator[str]:
        return iter((*self._base, *self._drawn))

    def __len__(self) -> int:
        return len(self._base) + len(self._drawn)

    def check(self, path: str, workdir: str, trained: str | None) -> None:
        """Compares it with what adapters were trained on: first shapes, then every value, one tensor at a time.

        Args:
          path: of the base.
          workdir: of the run.
          trained: the `fingerprint` of its base.

        Raises:
          ConvertedError: it is of another geometry, or its content is another.
        """
        found, wanted = shapes_of(self), self._shapes
        if found != wanted:
            first = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            there, asked = (f"of shape {x[first]}" if first in x else "absent" for x in (found, wanted))
            raise ConvertedError(
                f"the base {path} is another network than the one that {workdir} was trained on: {first} is {there}, "
                f"not {asked}: name the right one with --base"
            )
        held = Cast(self, np.dtype(BASE_DTYPE))
        content = fingerprint_of((name, held[name]) for name in held)
        if content != trained:
            raise ConvertedError(
                f"the base {path} has content {content}, but {workdir} was trained on {trained}: it has changed, or is "
                f"another one: name the right one with --base"
            )
