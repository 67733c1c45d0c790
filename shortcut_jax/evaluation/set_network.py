"""A small convolutional network that learns the classes of a set: features to measure distances in, and a classifier.

It is trained on the real images alone, always in the same way, so that its features belong to the set and to nobody's
model. Where a set has no labels, its captions are the classes.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from shortcut_jax.cluster.distributed import say
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.core.types import Array
from shortcut_jax.data.records import to_latents
from shortcut_jax.errors import UsageError
from shortcut_jax.evaluation.captions import CaptionedSet
from shortcut_jax.evaluation.features import Features
from shortcut_jax.weights.rules import nest

FEATURES = 64
MOST_CLASSES, MOST_IMAGES = 1000, 20_000
STEPS, BATCH, LEARNING_RATE = 1500, 128, 2e-3
SIDE = 16
"""Positions of the first convolution along the shorter side."""
VERSION = 2
"""Part of what a file of weights is known by."""
ROWS_AT_ONCE = 512

Weights = dict[str, np.ndarray]


class SetNetwork(nn.Module):
    """Images [B, h, w, c] in [-1, 1] -> features [B, F] and logits [B, classes].

    Two convolutions of 3 x 3 at each of two resolutions, then a linear layer to the features. The first one has a
    stride that leaves about 16 x 16 positions, so that images of 32 pixels cost little more than those of 16.
    """

    classes: int

    @nn.compact
    def __call__(self, x_BhwC: Array) -> tuple[Array, Array]:
        """See the class."""
        stride = max(1, min(x_BhwC.shape[1:3]) // SIDE)
        for width in (32, 64):
            for _ in range(2):
                x_BhwC, stride = nn.relu(nn.Conv(width, (3, 3), stride)(x_BhwC)), 1
            x_BhwC = nn.avg_pool(x_BhwC, (2, 2), (2, 2))
        features_BF = nn.Dense(FEATURES)(x_BhwC.reshape(len(x_BhwC), -1))
        return features_BF, nn.Dense(self.classes)(nn.relu(features_BF))


def train_network(images: np.ndarray, labels: np.ndarray, classes: int, seed: int = 0) -> Weights:
    """The weights after `STEPS` steps of Adam on the cross-entropy, the same for the same arguments.

    Args:
      images: uint8 [S, h, w, c].
      labels: whole numbers below `classes`, [S].
      classes: how many there are.
      seed: of first weights and batches.
    """
    network, optimizer = SetNetwork(classes), optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, STEPS))
    pixels, targets = jnp.asarray(images), jnp.asarray(labels)
    key_init, key_rows = jax.random.split(jax.random.key(seed))
    params = network.init(key_init, to_latents(pixels[:1]))["params"]

    @jax.jit  # one at a time: in a compiled loop XLA:CPU computes convolutions a hundred times as slowly
    def step(params: Any, state: Any, key: Array) -> tuple[Any, Any]:
        rows = jax.random.randint(key, (min(BATCH, len(images)),), 0, len(images))

        def loss(params: Any) -> Array:
            _, logits = network.apply({"params": params}, to_latents(pixels[rows]))
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets[rows]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    keys = jax.random.split(key_rows, STEPS)
    for key in tqdm(keys, desc="network of the set", unit="step", leave=False, disable=jax.process_index() > 0):
        params, state = step(params, state, key)
    return {path: np.asarray(value) for path, value in flat_paths(params).items()}


def features_and_classes(weights: Weights) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images, uint8 [S, h, w, c] -> features [S, F] and the likeliest class of each, [S]."""
    classes = len(weights["Dense_1/bias"])
    params = nest({path: jnp.asarray(value) for path, value in weights.items()})
    apply = jax.jit(lambda images: SetNetwork(classes).apply({"params": params}, to_latents(images)))

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for first in range(0, len(images), ROWS_AT_ONCE):
            some = images[first : first + ROWS_AT_ONCE]
            padded = some[np.minimum(np.arange(ROWS_AT_ONCE), len(some) - 1)]
            features, logits = apply(padded)
            parts.append((np.asarray(features)[: len(some)], np.asarray(logits).argmax(axis=1)[: len(some)]))
        return np.concatenate([f for f, _ in parts]), np.concatenate([c for _, c in parts])

    return run


def kept_network(identity: str, make: Callable[[], Weights], folders: Sequence[Path]) -> Weights:
    """Weights known by `identity`, from the first of the folders that has them, or made and kept in one of them."""
    name = f"network-{hashlib.sha256(f'{VERSION} {identity}'.encode()).hexdigest()[:12]}.npz"
    for folder in folders:
        with suppress(OSError, ValueError), np.load(folder / name, allow_pickle=False) as stored:
            return dict(stored)
    weights = make()
    for folder in folders:
        with suppress(OSError):  # a set may be read only
            partial = folder / f".{name}.{os.getpid()}.partial"
            with partial.open("wb") as file:
                arrays: Any = weights
                np.savez(file, **arrays)
            partial.replace(folder / name)
            break
    return weights


def network_of(own: CaptionedSet, folders: Sequence[Path]) -> Weights:
    """The network of a set, trained where none of the folders has it.

    Raises:
      UsageError: the set has fewer than 2 classes, or too many to learn.
    """
    images, labels, classes = own.labelled(MOST_IMAGES)
    if not 2 <= classes <= min(MOST_CLASSES, len(images) // 2):
        raise UsageError(
            f"--features=network learns 2 to {MOST_CLASSES} classes of several images each, but {len(images):,} images "
            f"of the set have {classes:,}: take --features=pixels or --features=random"
        )

    def make() -> Weights:
        say(f"training the network of the set: {len(images):,} images of {classes} classes")
        return train_network(images, labels, classes)

    return kept_network(own.identity, make, folders)


def network_features(weights: Weights) -> Features:
    """The features of the network of a set."""
    run, digest = features_and_classes(weights), hashlib.sha256()
    for path in sorted(weights):
        digest.update(np.ascontiguousarray(weights[path]).tobytes())
    name = "Frechet distance (network of the set)"
    return Features(name, FEATURES, lambda images: run(images)[0], digest.hexdigest()[:12])


def network_classes(weights: Weights) -> Callable[[np.ndarray], np.ndarray]:
    """Images -> the class of each."""
    run = features_and_classes(weights)
    return lambda images: run(images)[1]
