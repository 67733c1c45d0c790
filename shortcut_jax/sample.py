"""Sampling: `python -m shortcut_jax.sample --workdir=W --prompt="a handwritten digit seven" --out=seven.png`.

With `--checkpoint=FOLDER` instead of a workdir it samples a converted pipeline.
"""

import math
import textwrap
import time
import types
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from shortcut_jax import command
from shortcut_jax.assemble import Assembly
from shortcut_jax.command import UsageError
from shortcut_jax.data.words import count_words
from shortcut_jax.ends import sampling_ends
from shortcut_jax.generate import Generator
from shortcut_jax.initial import freeze, load_base, open_initial
from shortcut_jax.resolve import from_config
from shortcut_jax.runtime import distributed
from shortcut_jax.runtime.checkpoint import CheckpointError, Checkpoints, stored_meta
from shortcut_jax.runtime.distributed import say, tell
from shortcut_jax.runtime.metrics import contact_sheet
from shortcut_jax.settings import ConfigError, complete
from shortcut_jax.steps.views import TEACHER, VIEWS, Adapted, teacher_of
from shortcut_jax.text_to_image import TextToImage

USAGE = (
    "usage: python -m shortcut_jax.sample --workdir=W|--checkpoint=FOLDER "
    '--prompt="..." [--steps=4] [--num=16] [--out=samples.png]'
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "workdir": {"num": 16, "guidance": None, "view": "slow", "base": None, "encoders": None},
    "checkpoint": {"num": 1, "guidance": None, "height": 1024, "width": 1024, "text_tokens": None, "lora": []},
}
"""What is sampled -> the options that go with it only, or differ by it."""


class Pipeline:
    """A trained model: `Pipeline("runs/digits-scfm")("a handwritten digit seven", steps=4, num=16)`.

    Attributes:
      settings: of the run.
      params: the weights of the view.
      generate: captions to pictures, for any tree of weights.
      ends: what it encodes captions and decodes latents with.
      assembly: the network on the devices.
      step: the training step whose weights were read.
    """

    def __init__(
        self,
        workdir: str | Path,
        view: str = "slow",
        max_steps: int = 1000,
        batch_size: int = 16,
        base: str | Path | None = None,
        lora_scale: float = 1.0,
        encoders: str | Path | None = None,
        shift: float | None = None,
    ):
        """Reads one view (`online`, `fast` or `slow`) of the newest readable checkpoint, and nothing else but its base.

        Args:
          workdir: of a run.
          view: weights, or adapters.
          max_steps: the most sampling steps that will be asked for.
          batch_size: pictures sampled at once.
          base: of a run that trained adapters, where it has moved.
          lora_scale: strength of its adapters; 0 gives the base.
          encoders: converted pipeline whose text encoders and autoencoder a run on latents is sampled with; by default
            the prompts that are stored with its set, and the set's autoencoder.
          shift: timestep shift of the sampling grid; the run's by default.

        Raises:
          CheckpointError: the workdir has no readable checkpoint.
          ConfigError: the base is not there, or not the one that the run was trained on; or base or scale are given
            for a run without adapters.
          ValueError: an unknown view.
        """
        if view not in VIEWS:
            raise ValueError(f"view is {view!r}, but must be one of {', '.join(VIEWS)}")
        folder = Path(workdir) / "checkpoints"
        meta = stored_meta(folder)
        if meta is None:
            raise CheckpointError(f"no checkpoint in {folder}: train first, or name another --workdir")
        config = complete(meta["config"])
        mesh = {**config["mesh"], "data": -1, "fsdp": 1, "tensor": 1}
        self.settings = from_config({**config, "mesh": mesh, "model": {**config["model"], "attention": "auto"}})
        assembly = Assembly(self.settings, training=False)
        if self.settings.train == "all" and (base is not None or lora_scale != 1.0):
            raise ConfigError(f"{workdir} trained all weights: base and lora_scale are for runs that trained adapters")
        self.assembly, self._folder, self._base_record = assembly, folder, meta["base"]
        self._base_path, self._lora_scale = base or (meta["base"] and meta["base"]["path"]), lora_scale
        trained, self.step = self._trained(view)
        self.params = self._whole(trained)
        self.ends = sampling_ends(assembly, encoders)
        chosen = self.settings.eval.shift if shift is None else shift
        self.generate = Generator(assembly, batch_size, max_steps, chosen, self.ends)

    def weights(self, view: str) -> Any:
        """The weights of a view at the step of `params`, for `generate`; a base is on devices once.

        `teacher` is what the run learned from, where it had a base.

        Raises:
          CheckpointError: they cannot be read.
          ConfigError: a teacher is asked for, and there was none or it is not at hand.
        """
        if view == TEACHER:
            return self._teacher()
        return self._whole(self._trained(view, self.step)[0])

    def _trained(self, view: str, step: int | None = None) -> tuple[Any, int]:
        """What was trained, of one view; of the newest readable step by default."""
        shapes = self.assembly.state_shapes
        wanted = shapes.params if view == "online" else getattr(shapes.ema, view)
        item = "params" if view == "online" else view
        checkpoints = Checkpoints(self._folder, read_only=True)
        try:
            read = lambda step: (checkpoints.restore(step, {item: wanted})[item], step)
            return checkpoints.newest_readable(read) if step is None else read(step)
        finally:
            checkpoints.close()

    def _whole(self, trained: Any) -> Any:
        if self.settings.train == "all":
            return trained
        return Adapted(self._base, trained, jnp.float32(self.settings.lora.scale * self._lora_scale))

    @cached_property
    def _base(self) -> Any:
        return load_base(self.assembly, self._base_path, self._base_record)

    def _teacher(self) -> Any:
        if not self.settings.has_base:
            raise ConfigError(f"{self._folder.parent} was trained without a teacher")
        if self.settings.train == "lora" and self.settings.teacher_lora is None:
            return self._base
        record = {**self._base_record, "path": str(self._base_path)}
        frozen, _ = freeze(self.assembly, open_initial(self.assembly, record), self._base_record)
        return teacher_of(frozen)

    @property
    def distilled_guidance(self) -> bool:
        """Whether the model has a guidance embedding, so that guidance costs no second evaluation."""
        return self.assembly.model.guidance

    def __call__(
        self, prompts: str | Sequence[str], steps: int = 4, num: int = 1, seed: int = 0, guidance: float = 1.0
    ) -> np.ndarray:
        """Pictures [len(prompts) * num, h, w, c], uint8, those of a prompt together.

        Args:
          prompts: one or several; words beyond the text length are cut, which is said.
          steps: sampling steps (Euler), 1 to `max_steps`.
          num: pictures a prompt.
          seed: of the noise.
          guidance: guidance scale; 1 means none.

        Raises:
          ValueError: no prompt, or a number of steps or pictures out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or num < 1:
            raise ValueError(f"asked for {num} pictures of {len(prompts)} prompts, but both must be at least 1")
        length = self.settings.data.text_tokens
        for prompt in prompts if self.settings.data.text_encoder == "words" else ():
            if count_words(prompt) > length:
                kept = " ".join(prompt.split()[:length])
                say(f"the prompt has {count_words(prompt)} words, the model reads {length}: it is cut to {kept!r}")
        return self.generate(self.params, [p for p in prompts for _ in range(num)], steps, seed, guidance)


def main(argv: Sequence[str]) -> int:
    """Parses the command line, samples, and writes a PNG."""
    from absl import flags

    values = command.new_flags()
    flags.DEFINE_string("workdir", None, "Folder of a training run.", flag_values=values)
    flags.DEFINE_string("checkpoint", None, "Converted pipeline, instead of a workdir.", flag_values=values)
    flags.DEFINE_multi_string("prompt", None, "Caption; give it several times for several rows.", flag_values=values)
    flags.DEFINE_integer("steps", 4, "Sampling steps.", flag_values=values)
    flags.DEFINE_integer("num", None, "Pictures a prompt: 16, or 1 of a --checkpoint.", flag_values=values)
    flags.DEFINE_integer("height", None, "With --checkpoint: of a picture in pixels (1024).", flag_values=values)
    flags.DEFINE_integer("width", None, "With --checkpoint: of a picture in pixels (1024).", flag_values=values)
    flags.DEFINE_integer("text_tokens", None, "With --checkpoint: tokens of a prompt for T5.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", flag_values=values)
    flags.DEFINE_enum("view", None, VIEWS, "With --workdir: online, or the fast or slow average.", flag_values=values)
    flags.DEFINE_float("guidance", None, "Guidance scale; by default that of the run.", flag_values=values)
    flags.DEFINE_string("base", None, "With --workdir: base of its adapters, where it has moved.", flag_values=values)
    flags.DEFINE_string("encoders", None, "With --workdir: pipeline of a run on latents.", flag_values=values)
    flags.DEFINE_multi_string("lora", None, "With --checkpoint: LoRA; several are added up.", flag_values=values)
    flags.DEFINE_multi_float("lora_scale", None, "Strength of the adapters, one for each --lora.", flag_values=values)
    flags.DEFINE_string("out", "samples.png", "File to write.", flag_values=values)
    options = _resolved(command.parse(values, argv, USAGE, required=["prompt"]))
    num = options.num
    if min(options.steps, num) < 1:
        raise UsageError(f"--steps is {options.steps} and --num is {num}, but both must be at least 1")
    out = Path(options.out)
    if out.suffix.lower() not in (".png", ".jpg", ".webp"):
        raise UsageError(f"--out={out}: end it in .png, .jpg or .webp")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out={out}: the folder {out.parent} is not there")
    if not all(map(math.isfinite, options.lora_scale or ())):
        raise UsageError(f"--lora_scale is {', '.join(map(str, options.lora_scale))}, but must be finite")
    distributed.initialize()
    if options.checkpoint is not None:
        return _sample_checkpoint(options, out)
    scales = options.lora_scale or [1.0]
    if len(scales) > 1:
        raise UsageError(f"--lora_scale is given {len(scales)} times, but a workdir has one set of adapters")
    chosen = options.view, options.steps, min(num, 64), options.base, scales[0], options.encoders
    pipeline = Pipeline(options.workdir, *chosen)
    if options.guidance is None:
        options.guidance = pipeline.settings.eval.guidance
    if options.guidance != 1.0:
        classifier_free = "classifier-free, two evaluations a step"
        how = "through the guidance embedding" if pipeline.distilled_guidance else classifier_free
        say(f"guidance {options.guidance:g}: {how}")
    pictures = pipeline(options.prompt, options.steps, num, options.seed, options.guidance)
    rows = [pictures[i : i + num] for i in range(0, len(pictures), num)]
    contact_sheet(rows, options.prompt).save(out)
    model = f"{pipeline.settings.objective} ({options.view}, step {pipeline.step})"
    say(f"{len(pictures)} pictures of {model} in {options.steps} steps: {out}")
    return 0


def _resolved(options: types.SimpleNamespace) -> types.SimpleNamespace:
    """The options with the defaults of what is sampled.

    Raises:
      UsageError: neither or both of workdir and checkpoint, or an option that does not go with it.
    """
    if (options.workdir is None) == (options.checkpoint is None):
        raise UsageError(f"give one of --workdir and --checkpoint; {USAGE}")
    kind, other = ("workdir", "checkpoint") if options.checkpoint is None else ("checkpoint", "workdir")
    for name in DEFAULTS[other].keys() - DEFAULTS[kind].keys():
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} goes with --{other}, not with --{kind}")
    for name, value in DEFAULTS[kind].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _sample_checkpoint(options: types.SimpleNamespace, out: Path) -> int:
    """Samples a converted pipeline: one picture as it is, several as a contact sheet."""
    scales = options.lora_scale or [1.0] * len(options.lora)
    if len(scales) != len(options.lora):
        raise UsageError(f"--lora is given {len(options.lora)} times, --lora_scale {len(scales)}: give one for each")
    pipeline = TextToImage(options.checkpoint, loras=list(zip(options.lora, scales, strict=True)))
    arguments = {k: getattr(options, k) for k in ("steps", "guidance", "height", "width", "num", "text_tokens")}
    try:
        pipeline.check(options.prompt, **arguments)
    except ValueError as error:
        raise UsageError(str(error)) from error
    for model in pipeline.models.values():
        say(model.origin)
        tell(model.notes)
    say(f"{pipeline.guidance(options.guidance)}; computed in {pipeline.compute_dtype}")
    for line in pipeline.cuts(options.prompt, options.text_tokens):
        say(line)
    start = time.perf_counter()
    _ = pipeline.params  # read here, so that the time of a picture is its own
    loaded = time.perf_counter()
    pictures = pipeline(options.prompt, seed=options.seed, **arguments)
    seconds = (time.perf_counter() - loaded) / len(pictures)
    if len(pictures) == 1:
        Image.fromarray(pictures[0]).save(out)
    else:
        rows = [pictures[i : i + options.num] for i in range(0, len(pictures), options.num)]
        contact_sheet(rows, [textwrap.shorten(p, 40) for p in options.prompt]).save(out)
    say(
        f"{len(pictures)} pictures of {options.height} x {options.width} in {options.steps} steps, {seconds:.2f} s "
        f"each with compilation (weights read in {loaded - start:.1f} s): {out}"
    )
    return 0


if __name__ == "__main__":
    command.run(main)
