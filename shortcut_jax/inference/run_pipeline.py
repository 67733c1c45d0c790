"""A trained model as a function from prompts to images: `Pipeline("runs/digits-scfm")("a handwritten digit two")`."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from shortcut_jax.cluster.distributed import say
from shortcut_jax.config.bounds import MAX_IMAGES, brief, check_prompts, check_whole
from shortcut_jax.config.checks import from_config
from shortcut_jax.config.schema import complete
from shortcut_jax.core.latents import PATCH
from shortcut_jax.core.local_path import local_path
from shortcut_jax.data.datasets import EMBEDDED, captions
from shortcut_jax.data.records import stride_of
from shortcut_jax.data.words import count_words
from shortcut_jax.errors import CheckpointError, ConfigError
from shortcut_jax.inference.codec import sampling_codec
from shortcut_jax.inference.generator import Generator
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.run.start_from import freeze, load_base, open_initial
from shortcut_jax.runtime.checkpoint import Checkpoints, stored_meta
from shortcut_jax.steps.editing import make_plan
from shortcut_jax.steps.networks import TEACHER, VIEWS, Adapted, teacher_weights
from shortcut_jax.weights.finite import check_placed

ITEM_OF = {"online": "params", "fast": "fast", "slow": "slow"}
"""View -> the item of a checkpoint that holds it."""


class Pipeline:
    """A trained model: `Pipeline("runs/digits-scfm")("a handwritten digit seven", steps=4, num=16)`.

    Attributes:
      settings: of the run.
      params: the weights of the view.
      generate: captions to images, for any tree of weights.
      codec: what it encodes captions and decodes latents with.
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
    ):
        """Reads one view (`online`, `fast` or `slow`) of the newest readable checkpoint, and nothing else but its base.

        Args:
          workdir: of a run.
          view: weights, or adapters.
          max_steps: the most sampling steps that will be asked for.
          batch_size: images sampled at once.
          base: of a run that trained adapters, where it has moved.
          lora_scale: strength of its adapters; 0 gives the base.
          encoders: converted pipeline whose text encoders and autoencoder a run on latents is sampled with; by default
            the prompts that are stored with its set, and the set's autoencoder.

        Raises:
          CheckpointError: the workdir has no readable checkpoint, or none with this view.
          ConfigError: the base is not found, or not the one that the run was trained on; or base or scale are given
            for a run without adapters.
          ConversionError: weights that are not finite.
          ValueError: an unknown view.
        """
        if view not in VIEWS:
            raise ValueError(f"view is {view!r}, but must be one of {', '.join(VIEWS)}")
        workdir = local_path(workdir, "workdir")
        base = None if base is None else local_path(base, "base")
        encoders = None if encoders is None else local_path(encoders, "encoders")
        folder = workdir / "checkpoints"
        meta = stored_meta(folder)
        if meta is None:
            raise CheckpointError(f"no checkpoint in {folder}: train first, or name another --workdir")
        config = complete(meta["config"])
        mesh = {**config["mesh"], "data": -1, "fsdp": 1, "tensor": 1}
        self.settings = from_config({**config, "mesh": mesh, "model": {**config["model"], "attention": "auto"}})
        assembly = Assembly(self.settings, training=False)
        if self.settings.train == "all" and (base is not None or lora_scale != 1.0):
            raise ConfigError(f"{workdir} trained all weights: base and lora_scale are for runs that trained adapters")
        self.assembly, self._folder, self._lora_scale = assembly, folder, lora_scale
        self._base_record, self._said = meta["base"], set[str]()
        self._base_path = str(base or (meta["base"] or {}).get("path"))
        trained, self.step = self._trained(view)
        self.params = self._whole(trained)
        self.codec = sampling_codec(assembly, encoders)
        self.generate = Generator(assembly, batch_size, max_steps, self.settings.eval.shift, self.codec)

    def weights(self, view: str) -> Any:
        """The weights of a view at the step of `params`, for `generate`; a base is on devices once.

        `teacher` is what the run learned from, where it had a base.

        Raises:
          CheckpointError: they cannot be read.
          ConfigError: a teacher is asked for, and there was none or it is not at hand.
        """
        return self._teacher() if view == TEACHER else self._whole(self._trained(view, self.step)[0])

    def _trained(self, view: str, step: int | None = None) -> tuple[Any, int]:
        """What was trained, of one view; of the newest readable step by default."""
        shapes = self.assembly.state_shapes
        wanted = shapes.params if view == "online" else getattr(shapes.ema, view)
        item, checkpoints = ITEM_OF[view], Checkpoints(self._folder, read_only=True)
        try:
            if not checkpoints.holding(item):
                held = " or ".join(v for v, name in ITEM_OF.items() if checkpoints.holding(name))
                raise CheckpointError(
                    f"the checkpoints in {self._folder} lack the view {view!r}: choose {held or 'another workdir'}"
                )
            read = lambda step: (checkpoints.restore(step, {item: wanted})[item], step)
            trained, step = checkpoints.newest_readable(read) if step is None else read(step)
        finally:
            checkpoints.close()
        return check_placed(trained, f"{view} weights of step {step} in {self._folder.parent}"), step

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
        initial = open_initial(self.assembly, {**self._base_record, "path": self._base_path})
        frozen, _ = freeze(self.assembly, initial, self._base_record)
        return teacher_weights(frozen)

    @property
    def distilled_guidance(self) -> bool:
        """Whether the model has a guidance embedding, so that guidance costs no second evaluation."""
        return self.assembly.model.guidance

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of its images in pixels."""
        data = self.settings.data
        return data.height, data.width

    @property
    def channels(self) -> int:
        """Of its images."""
        data = self.settings.data
        if data.store == "latents" or data.text_encoder == "stored":
            return 3
        return self.assembly.model.channels // (PATCH * stride_of(data)) ** 2

    def __call__(
        self,
        prompts: str | Sequence[str],
        steps: int = 4,
        num: int = 1,
        seed: int = 0,
        guidance: float = 1.0,
        **options: Any,
    ) -> np.ndarray:
        """Images [len(prompts) * num, h, w, c], uint8, those of a prompt together.

        Args:
          prompts: one or several; words beyond the text length are cut, which is said.
          steps: sampling steps, 1 to `max_steps`.
          num: images a prompt.
          seed: of the noise.
          guidance: guidance scale; 1 means none, and so does 0 where the model has no guidance embedding.
          **options: `draws`, `method` and `shift` of `Generator`.

        Raises:
          ValueError: no prompt, or a number of steps or images out of range.
        """
        return self.generate(self.params, self._captions(prompts, num), steps, seed, guidance, **options)

    def trajectory(
        self,
        prompts: str | Sequence[str],
        steps: int = 4,
        num: int = 1,
        seed: int = 0,
        guidance: float = 1.0,
        **options: Any,
    ) -> np.ndarray:
        """The images that each step aims at, and the result: [len(prompts) * num, steps + 1, h, w, c], uint8.

        Arguments and errors are those of a call.
        """
        return self.generate.trajectory(self.params, self._captions(prompts, num), steps, seed, guidance, **options)

    def edit(
        self,
        images_BhwC: np.ndarray,
        source_prompt: str,
        prompt: str,
        steps: int = 4,
        skip: int = 0,
        **options: Any,
    ) -> np.ndarray:
        """Images of what `source_prompt` says, uint8 of `size`, changed to what `prompt` says; see `steps.editing`.

        Args:
          images_BhwC: uint8, of `size`.
          source_prompt: of all of them.
          prompt: of all of them.
          steps: of the grid, 1 to `max_steps`.
          skip: first steps that are left out.
          **options: `plain` and `average` of an `EditPlan`; `draws`, `guidance`, `source_guidance` and `shift` of
            `Generator.edit`; `quiet`, whether the `notes` go unsaid.

        Raises:
          ValueError: numbers out of range.
        """
        plan = make_plan(steps, skip, options.pop("plain", 0), options.pop("average", 1))
        self._tell([source_prompt, prompt], options.pop("quiet", False))
        texts = [source_prompt] * len(images_BhwC), [prompt] * len(images_BhwC)
        return self.generate.edit(self.params, images_BhwC, *texts, plan, **options)

    def _captions(self, prompts: str | Sequence[str], num: int) -> list[str]:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or num < 1:
            raise ValueError(f"asked for {brief(num)} images of {len(prompts)} prompts, but both must be at least 1")
        check_whole("num", num, MAX_IMAGES)
        self._tell(prompts)
        return [p for p in prompts for _ in range(num)]

    def _tell(self, prompts: Sequence[str], quiet: bool = False) -> None:
        """Says each of the `notes` once. Raises BoundsError for what is no text."""
        check_prompts(prompts)
        for line in self.notes(prompts):
            if not quiet and line not in self._said:
                say(line)
                self._said.add(line)

    def notes(self, prompts: Sequence[str]) -> list[str]:
        """What the user should know of prompts: what is cut off them, and words that the model never saw."""
        unknown = ", ".join(repr(word) for word in self.unknown_words(prompts))
        known = ", ".join(self.known_words)
        lines = [f"never seen in training, so of no meaning: {unknown}; the words it knows are {known}"]
        return [*self.cuts(prompts), *(lines if unknown else [])]

    @cached_property
    def known_words(self) -> tuple[str, ...]:
        """The words of the captions that it was trained on; empty where they are not known, or not words."""
        data = self.settings.data
        if data.text_encoder != "words" or not {data.name, *data.mix} <= set(EMBEDDED):
            return ()
        known = (caption for name in (data.name, *data.mix) for caption in captions(name))
        return tuple(dict.fromkeys(word for caption in known for word in caption.split()))

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """The words of prompts that the model never saw, each once; none where its words are not known."""
        words = dict.fromkeys(word for prompt in prompts for word in prompt.split())
        return [word for word in words if self.known_words and word not in self.known_words]

    def cuts(self, prompts: Sequence[str]) -> list[str]:
        """A line for each prompt that the model does not read all of."""
        length, lines = self.settings.data.text_tokens, []
        for prompt in dict.fromkeys(prompts) if self.settings.data.text_encoder == "words" else ():
            if (count := count_words(prompt)) > length:
                kept = " ".join(prompt.split()[:length])
                lines.append(f"the prompt has {count} words, the model reads {length}: it is cut to {kept!r}")
        return lines
