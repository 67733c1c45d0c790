"""A trained model as a function from prompts to images: `Pipeline("runs/digits-scfm")("a handwritten digit two")`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_jax.cluster.distributed import SaidOnce
from shortcut_jax.config.bounds import MAX_IMAGES, brief, check_prompts, check_whole
from shortcut_jax.config.checks import from_config
from shortcut_jax.config.stored import complete
from shortcut_jax.core.latents import PATCH
from shortcut_jax.core.local_path import local_path
from shortcut_jax.core.schedules import Spacing
from shortcut_jax.data.records import stride_of
from shortcut_jax.errors import CheckpointError, ConfigError, UsageError
from shortcut_jax.inference.codec import sampling_codec
from shortcut_jax.inference.generator import Generator
from shortcut_jax.inference.image_files import Record
from shortcut_jax.inference.request import Edit, Guidance, ModelLimits, Row, SampleRequest
from shortcut_jax.inference.run_prompts import example_prompts, prompt_notes
from shortcut_jax.inference.run_weights import RunWeights
from shortcut_jax.run.assembly import Assembly
from shortcut_jax.runtime.checkpoint import stored_meta
from shortcut_jax.steps.editing import make_plan
from shortcut_jax.steps.networks import VIEWS, Adapted

FEW = 4
"""Images that a page samples at once where several are asked for; one is sampled alone, so that its time is its own."""


class Pipeline:
    """A trained model: `Pipeline("runs/digits-scfm")("a handwritten digit seven", steps=4, num=16)`.

    It is also an `inference.request.ImagePipeline`.

    Attributes:
      name: of the workdir.
      view: whose weights `params` are.
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
        if self.settings.train == "all" and (base is not None or lora_scale != 1.0):
            raise ConfigError(f"{workdir} trained all weights: base and lora_scale are for runs that trained adapters")
        self.name, self.view, self._lora_scale = workdir.resolve().name, view, lora_scale
        self.assembly, self._say_once = Assembly(self.settings, training=False), SaidOnce()
        self._weights = RunWeights(self.assembly, folder, base, meta["base"])
        self.params = self._weights.view(view, lora_scale)
        self.step: int = self._weights.step or 0
        self.codec = sampling_codec(self.settings, self.assembly.model, encoders)
        self._max_steps, self._generators = max_steps, dict[int, Generator]()
        self.generate = self.generator(batch_size)

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
            `Generator.edit`.

        Raises:
          ValueError: numbers out of range.
        """
        plan = make_plan(steps, skip, options.pop("plain", 0), options.pop("average", 1))
        self._tell([source_prompt, prompt])
        return self.generate.edit(
            self.params, images_BhwC, [(source_prompt, prompt)] * len(images_BhwC), plan, **options
        )

    def _captions(self, prompts: str | Sequence[str], num: int) -> list[str]:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or num < 1:
            raise ValueError(f"asked for {brief(num)} images of {len(prompts)} prompts, but both must be at least 1")
        check_whole("num", num, MAX_IMAGES)
        self._tell(prompts)
        return [p for p in prompts for _ in range(num)]

    def _tell(self, prompts: Sequence[str]) -> None:
        """Prints each of the notes once. Raises BoundsError for what is no text."""
        check_prompts(prompts)
        self._say_once(prompt_notes(self.settings.data, prompts))

    # What follows is `ImagePipeline`.

    @property
    def spacing(self) -> Spacing:
        """Of its sampling grids."""
        return self.generate.spacing

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

    @property
    def limits(self) -> ModelLimits:
        """See `ImagePipeline`."""
        settings, (height, width), adapters = self.settings, self.size, self.settings.train == "lora"
        facts = [f"{width} x {height} pixels", f"training step {self.step:,}"]
        facts += [f"adapters of rank {settings.lora.rank}"] if adapters else []
        title = f"{settings.model.preset} · {settings.objective}"
        views = (self.view, *(view for view in ("slow", "online", "fast") if view != self.view))
        limits = ModelLimits(title, tuple(facts), height, width, guidance=self.guidance(), views=views)
        return limits._replace(adapters=adapters, at_once=FEW, examples=example_prompts(settings))

    def rounded(self, batch_size: int | None) -> int:
        """See `ImagePipeline`."""
        return self.generator(batch_size).batch_size

    def generator(self, batch_size: int | None) -> Generator:
        """A generator of batches of that size, or of the pipeline's own; all of them share their programs."""
        if batch_size is None:
            return self.generate
        if batch_size not in self._generators:
            args = self._max_steps, self.settings.eval.shift, self.codec
            network = self.settings, self.assembly.model, self.assembly.mesh
            self._generators[batch_size] = Generator(*network, batch_size, *args)
        return self._generators[batch_size]

    def check(self, request: SampleRequest) -> None:
        """See `ImagePipeline`."""
        if (request.height or self.size[0], request.width or self.size[1]) != self.size:
            raise UsageError(
                f"this run makes images of {self.size[0]} x {self.size[1]} pixels only: leave the size out"
            )
        if request.lora_scale is not None and self.settings.train == "all":
            raise UsageError("lora_scale is for runs that trained adapters, but this one trained all weights")

    def notes(self, request: SampleRequest) -> list[str]:
        """See `ImagePipeline`."""
        scale, guidance = self._scale(request), self.guidance(request.guidance)
        lines = [] if scale == 1.0 else [str(guidance)]
        if scale == 0 and guidance.embedded is None:
            lines = ["guidance 0: none, as 1 is"]
        return lines + self.prompt_notes(request)

    def prompt_notes(self, request: SampleRequest) -> list[str]:
        """See `ImagePipeline`."""
        return prompt_notes(self.settings.data, request.texts)

    def weights(self, view: str | None = None) -> Any:
        """The weights of a view at `step`, for `generate` and `images`; `teacher` is what the run learned from.

        Raises:
          CheckpointError: they cannot be read.
          ConfigError: a teacher is asked for, and there was none or it is not at hand.
        """
        return self.params if view in (None, self.view) else self._weights.view(view, self._lora_scale)

    def images(self, rows: Sequence[Row], request: SampleRequest, weights: Any = None) -> np.ndarray:
        """See `ImagePipeline`."""
        generator = self.generator(request.batch_size)
        if request.edit is not None:
            return self._edited(generator, request.edit, rows, request, weights)
        return self._drawn(generator, rows, request, weights)

    def trajectories(self, rows: Sequence[Row], request: SampleRequest, weights: Any = None) -> np.ndarray:
        """See `ImagePipeline`."""
        return self._drawn(self.generator(request.batch_size).trajectory, rows, request, weights)

    def _drawn(
        self, draw: Callable[..., np.ndarray], rows: Sequence[Row], request: SampleRequest, weights: Any
    ) -> np.ndarray:
        how: dict[str, Any] = {"method": request.method, "shift": request.shift, "draws": [r.draw for r in rows]}
        captions, scale = [r.prompt for r in rows], self._scale(request)
        return draw(self._adapted(weights, request), captions, request.steps, guidance=scale, **how)

    def _edited(
        self, generator: Generator, edit: Edit, rows: Sequence[Row], request: SampleRequest, weights: Any
    ) -> np.ndarray:
        scale, prompts = self._scale(request), [(edit.source_prompt, row.prompt) for row in rows]
        source = scale if edit.source_guidance is None else edit.source_guidance
        how: dict[str, Any] = {"draws": [r.draw for r in rows], "guidance": scale, "source_guidance": source}
        images, plan = np.stack([edit.pixels_hwc] * len(rows)), make_plan(request.steps, **edit.plan)
        params = self._adapted(weights, request)
        return generator.edit(params, images, prompts, plan, shift=request.shift, **how)

    def _adapted(self, weights: Any, request: SampleRequest) -> Any:
        """Weights with the strength of adapters that is asked for."""
        weights = self.weights(request.view) if weights is None else weights
        if request.lora_scale is None or not isinstance(weights, Adapted):
            return weights
        return weights._replace(scale=self._weights.strength(request.lora_scale))

    def image_size(self, height: int, width: int, request: SampleRequest) -> tuple[int, int, int]:
        """See `ImagePipeline`: all of its images have one size."""
        return *self.size, self.channels

    def guidance(self, scale: float | None = None) -> Guidance:
        """See `ImagePipeline`."""
        scale = self.settings.eval.guidance if scale is None else scale
        return Guidance(scale, 1.0) if self.assembly.model.guidance else Guidance(None, 1.0 if scale == 0 else scale)

    def facts(self, request: SampleRequest) -> Record:
        """See `ImagePipeline`."""
        shift = self.settings.eval.shift if request.shift is None else request.shift
        made: Record = {"guidance": self._scale(request), "shift": shift, "height": self.size[0], "width": self.size[1]}
        made |= {"model": self.name, "objective": self.settings.objective, "view": request.view or self.view}
        lora_scale = self._lora_scale if request.lora_scale is None else request.lora_scale
        lora = lora_scale if self.settings.train == "lora" else None
        return {**made, "checkpoint_step": self.step, "lora_scale": lora}

    def title(self, request: SampleRequest) -> str:
        """See `ImagePipeline`."""
        return f"{self.settings.objective} ({request.view or self.view}, step {self.step})"

    def _scale(self, request: SampleRequest) -> float:
        return self.settings.eval.guidance if request.guidance is None else request.guidance
