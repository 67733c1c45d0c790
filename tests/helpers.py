"""Small settings that several tests share."""

import dataclasses
import functools
import shutil
import struct
import weakref

import jax
import numpy as np

from shortcut_jax.config.checks import from_config
from shortcut_jax.config.schema import default_config
from shortcut_jax.core.tree import flat_paths
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.runtime.hlo import compile_and_partition
from shortcut_jax.weights.params import Params, Spec, raw
from shortcut_jax.weights.rules import Converted, export, torch_specs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The browser of the tests of pages; None where there is none."""


def tiny_config(**changes):
    """A config of the tiny preset on one device; keys with dots become nested (`rows__self_rows=1`).

    It has single blocks alone, which compile in half the time: `**BOTH_BLOCKS` where the architecture counts.
    """
    c = default_config()
    c.model.preset = "tiny"
    c.model.double_blocks = 0
    c.batch_size = 32
    c.steps = 4
    c.student_steps = (1, 2, 4)
    c.mesh.data, c.mesh.fsdp, c.mesh.min_shard = 1, 1, 0
    c.optimizer.learning_rate = 1e-2
    c.eval.views, c.eval.images = (), ()
    c.eval.steps = (1, 2)
    c.eval.columns = 4
    for key, value in changes.items():
        *folders, leaf = key.split("__")
        node = c
        for name in folders:
            node = node[name]
        with node.ignore_type():
            node[leaf] = value
    return c


BOTH_BLOCKS = {"model__double_blocks": 2}

POST_TRAINING = dict(
    train="lora",
    init_from="given",
    teacher_share=0.4,
    rows__self_rows=1,
    rows__flow_rows=0,
    lora__rank=3,
    lora__alpha=6.0,
)


def tiny_assembly(num_devices=1, **changes):
    return _assembly(from_config(tiny_config(**changes)), num_devices)


@functools.lru_cache(maxsize=16)
def _assembly(settings, num_devices):
    """Tests of the same settings share their programs."""
    return Assembly(settings, jax.devices()[:num_devices])


def relative(a, b):
    """The norm of the difference of two trees over the norm of the second."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(t))]) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@functools.cache
def _first_state(settings):
    """The state before the first step, on one device: its programs are compiled once for all meshes."""
    return jax.device_get(Assembly(settings, jax.devices()[:1]).init_state())


def noisy_state(assembly, seed=0):
    """A state with no weight at zero, and EMAs that differ from the weights and from each other."""
    one = dataclasses.replace(assembly.settings.mesh, data=1, fsdp=1, tensor=1)
    # A copy, for the state is donated to steps and device arrays may be views of host arrays.
    state = host_copy(_first_state(dataclasses.replace(assembly.settings, mesh=one)))
    rng = np.random.default_rng(seed)
    jitter = lambda tree: jax.tree.map(lambda x: (x + 0.05 * rng.standard_normal(x.shape)).astype(x.dtype), tree)
    params = jitter(state.params)
    frozen = state.frozen._replace(base=jitter(state.frozen.base), teacher=jitter(state.frozen.teacher))
    state = state._replace(params=params, ema=type(state.ema)(jitter(params), jitter(params)), frozen=frozen)
    return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, assembly.state_shapes)


def host_copy(tree):
    """A copy that outlives the donation of a tree."""
    return jax.tree.map(np.array, tree)


def moved(before, after):
    """Whether each leaf differs, by path."""
    return {k: not np.array_equal(v, flat_paths(after)[k]) for k, v in flat_paths(before).items()}


# JAX lets go of a host array at some later call: these few may be alive at once where only one is held.
LET_GO = 5


class Watched(Params):
    """Parameters that are made when they are read, and that remember how many of them are alive."""

    def __init__(self, names, make):
        self.alive = self.most = 0
        self._names, self._make = list(names), make

    def spec(self, name):
        value = self._make(name)
        return Spec(value.dtype, value.shape)

    def __getitem__(self, name):
        value = self._make(name)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(value, lambda: setattr(self, "alive", self.alive - 1))
        return value

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def read_events(path):
    """The scalars of an event file by tag and step, and the text of its other entries."""
    from tensorboardX.proto.event_pb2 import Event

    data, at, scalars, rest = path.read_bytes(), 0, {}, {}
    while at < len(data):  # records: length, its checksum, data, its checksum
        (size,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, {})[event.step] = round(value.simple_value, 6)
            else:
                content = value.metadata.plugin_data.content
                text = b"".join(value.tensor.string_val) + (content if isinstance(content, bytes) else content.encode())
                rest[value.tag] = text.decode("utf-8", "replace")
    return scalars, rest


def to_flax(source, rules, shapes):
    """All of `Converted` at once."""
    return dict(Converted(source, rules, shapes))


def to_torch(params, rules):
    """All of `export` at once, as contiguous arrays."""
    result = {name: np.empty(spec.shape, spec.dtype) for name, spec in torch_specs(params, rules).items()}
    for name, first, value in export(params, rules):
        raw(result[name])[first : first + len(value)] = raw(value)
    return result


def partitioned_hlo(lowered):
    """The module right after the SPMD partitioner (see `compile_and_partition`).

    Raises:
      RuntimeError: XLA wrote no such module.
    """
    _, text = compile_and_partition(lowered)
    if text is None:
        raise RuntimeError("XLA dumped no module after the SPMD partitioner")
    return text
