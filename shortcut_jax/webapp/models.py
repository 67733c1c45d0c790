"""The models behind the web page: a training run or a converted pipeline, with bounds, weights and programs."""

import contextlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from shortcut_jax.cluster.distributed import tell
from shortcut_jax.config.schema import Settings
from shortcut_jax.core.latents import PATCH
from shortcut_jax.data.datasets import EMBEDDED, captions
from shortcut_jax.data.format import PreparedSet
from shortcut_jax.data.records import data_folder, is_prepared
from shortcut_jax.errors import ConvertedError, DataError
from shortcut_jax.formats.to_devices import place
from shortcut_jax.inference.converted_pipeline import TextToImage
from shortcut_jax.inference.generator import Generator
from shortcut_jax.inference.image_files import Record
from shortcut_jax.inference.run_pipeline import Pipeline
from shortcut_jax.runtime.sharding import tree_shardings
from shortcut_jax.sources.models import open_loras, param_shapes
from shortcut_jax.steps.editing import make_plan
from shortcut_jax.steps.networks import Adapted
from shortcut_jax.webapp.request import MAX_STEPS, SIZE_UNIT, ModelLimits, Request
from shortcut_jax.weights.lora import record_of, scales, stack
from shortcut_jax.weights.rescale import rescaled
from shortcut_jax.weights.rules import nest

FEW = 4
"""Images that are sampled at once where several are asked for; one is sampled alone, so that its time is its own."""

EXAMPLES = (
    "a red fox in the snow, golden hour",
    "a lighthouse on a cliff, oil painting",
    "a bowl of ramen, top view, studio light",
    "an old library with a spiral staircase",
)
EMBEDDED_GUIDANCE = "fed to the model's guidance embedding"
CLASSIFIER_FREE = "classifier-free: above 1 each step costs two evaluations"


class Model(Protocol):
    """What the page needs of a model. Nothing in it may run in two threads at once.

    Attributes:
      offer: what it can be asked for.
    """

    offer: ModelLimits

    def load(self, request: Request) -> bool:
        """Reads the weights of a request, unless they are at hand; tells whether it has."""

    def program(self, request: Request) -> Hashable:
        """Which compiled programs a request needs: two requests with equal answers share all of them."""

    def images(self, request: Request, steps: int) -> np.ndarray:
        """Images [num, h, w, c], uint8, of a request in a number of steps; image i has noise i of its seed."""

    def notes(self, request: Request) -> list[str]:
        """What a visitor should know of a request, such as a prompt that is cut."""

    def image_size(self, height: int, width: int) -> tuple[int, int, int]:
        """Rows, columns and channels in which it edits an image of `height` x `width` pixels."""

    def facts(self, request: Request) -> Record:
        """What its images are made by besides the request's own fields, named as `sample` names it."""


class TrainedRun:
    """A workdir: its views are read once each, and all of them share its compiled samplers.

    Attributes:
      offer: see `Model`.
    """

    def __init__(
        self,
        workdir: str | Path,
        views: Sequence[str] = ("slow", "online", "fast"),
        base: str | Path | None = None,
        encoders: str | Path | None = None,
    ):
        """Reads the first view; the others are read when they are asked for, and all of them stay on devices.

        Args:
          workdir: of the run.
          views: that are offered.
          base: see `Pipeline`.
          encoders: see `Pipeline`.

        Raises:
          CheckpointError, ConfigError, ValueError: see `Pipeline`.
        """
        first, *_ = views
        self._name = Path(workdir).resolve().name
        self._pipeline = Pipeline(workdir, first, MAX_STEPS, FEW, base, encoders=encoders)
        few, settings = self._pipeline.generate, self._pipeline.settings
        single = Generator(self._pipeline.assembly, 1, MAX_STEPS, settings.eval.shift, self._pipeline.codec)
        self._generators = {1: single if single.batch_size < few.batch_size else few, FEW: few}
        self._weights = {first: self._pipeline.params}
        self.offer = self._describe(settings, tuple(views))

    def _describe(self, settings: Settings, views: tuple[str, ...]) -> ModelLimits:
        data, adapters = settings.data, settings.train == "lora"
        told = self._pipeline.distilled_guidance
        facts = [f"{data.width} x {data.height} pixels", f"training step {self._pipeline.step:,}"]
        facts += [f"adapters of rank {settings.lora.rank}"] if adapters else []
        return ModelLimits(
            title=f"{settings.model.preset} · {settings.objective}",
            facts=tuple(facts),
            height=data.height,
            width=data.width,
            guidance=settings.eval.guidance,
            min_guidance=0.0 if told else min(1.0, settings.eval.guidance),
            guidance_means=EMBEDDED_GUIDANCE if told else CLASSIFIER_FREE,
            views=views,
            adapters=adapters,
            examples=captions_of(settings),
        )

    def load(self, request: Request) -> bool:
        """See `Model`."""
        if request.view in self._weights:
            return False
        self._weights[request.view] = self._pipeline.weights(request.view)
        return True

    def program(self, request: Request) -> Hashable:
        """See `Model`."""
        guided = request.guidance != 1.0 and not self._pipeline.distilled_guidance
        return self._generator(request.num).batch_size, guided, "edit" if request.edit else request.method

    def images(self, request: Request, steps: int) -> np.ndarray:
        """See `Model`."""
        prompts, guidance = [request.prompt] * request.num, request.guidance
        weights, generate = self._weights[request.view], self._generator(request.num)
        if self.offer.adapters:
            weights = weights._replace(scale=jnp.float32(self._pipeline.settings.lora.scale * request.lora_scale))
        if request.edit is None:
            how: dict[str, Any] = dict(method=request.method, shift=request.shift)
            return generate(weights, prompts, steps, request.seed, guidance, **how)
        plan = make_plan(steps, min(request.edit.skip, steps - 1))
        told = [(request.seed, 0)], guidance, guidance, request.shift
        return generate.edit(weights, request.edit.pixels_hwc[None], [request.edit.source_prompt], prompts, plan, *told)

    def notes(self, request: Request) -> list[str]:
        """See `Model`."""
        return self._pipeline.notes(prompts_of(request))

    def image_size(self, height: int, width: int) -> tuple[int, int, int]:
        """See `Model`: all of its images have one size."""
        return *self._pipeline.size, self._pipeline.channels

    def facts(self, request: Request) -> Record:
        """See `Model`."""
        settings = self._pipeline.settings
        shift = settings.eval.shift if request.shift is None else request.shift
        told: Record = {"guidance": request.guidance, "shift": shift, "height": request.height, "width": request.width}
        told |= {"model": self._name, "objective": settings.objective, "view": request.view}
        told |= {"checkpoint_step": self._pipeline.step, "batch_size": self._generator(request.num).batch_size}
        return told | {"lora_scale": request.lora_scale if self.offer.adapters else None}

    def _generator(self, num: int) -> Generator:
        return self._generators[1 if num == 1 else FEW]


def captions_of(settings: Settings, most: int = 10) -> tuple[str, ...]:
    """Captions that a run knows: of its sample grids, of an embedded set, or those kept with its prepared set."""
    data = settings.data
    if settings.eval.captions:
        return tuple(dict.fromkeys(settings.eval.captions))[:most]
    if data.name in EMBEDDED:
        return captions(data.name)[:most]
    with contextlib.suppress(DataError):  # a model can be shown where its data is gone, or damaged
        if is_prepared(data_folder(data)):
            return PreparedSet(data_folder(data)).info.eval_prompts[:most]
    return ()


def prompts_of(request: Request) -> list[str]:
    """What a model reads of a request."""
    return [request.prompt, *([request.edit.source_prompt] if request.edit else [])]


class _Adjustable(TextToImage):
    """A converted pipeline with adapters beside its weights instead of merged, so that their strength is an argument.

    Attributes:
      strength: of all adapters together.
    """

    def __init__(self, folder: str | Path, loras: Sequence[tuple[str | Path, float]]):
        super().__init__(folder)
        self.strength, self._adapters = 1.0, None
        config = self.models["flux"].config
        if loras:
            modules, notes = open_loras(loras, config)
            tell(notes)
            shapes = param_shapes("flux", config)
            arrays = rescaled(stack(modules, shapes), scales(record_of(modules), shapes), 1.0)
            wanted = nest({k: jax.ShapeDtypeStruct(x.shape, jnp.float32) for k, x in arrays.items()})
            shardings = tree_shardings(self.mesh, wanted)
            self._adapters = place(
                arrays,
                jax.tree.map(lambda w, s: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=s), wanted, shardings),
            )

    @property
    def params(self) -> dict[str, Any]:
        weights = super().params
        if self._adapters is None:
            return weights
        return weights | {"flux": Adapted(weights["flux"], self._adapters, jnp.float32(self.strength))}


class ConvertedPipeline:
    """A converted checkpoint: images of any size up to a bound, a program for each.

    Attributes:
      offer: see `Model`.
    """

    def __init__(self, folder: str | Path, loras: Sequence[tuple[str | Path, float]] = (), max_size: int = 1024):
        """Opens it; weights are read with the first request.

        Args:
          folder: made by `shortcut_jax.convert`.
          loras: adapters and their strengths, which a request multiplies.
          max_size: the longest side of an image in pixels, a multiple of 16.

        Raises:
          ConversionError, ConvertedError: see `TextToImage`.
        """
        self._pipeline, self._loaded = _Adjustable(folder, loras), False
        guidance = self._pipeline.guidance()
        told = guidance.embedded is not None
        names = [Path(path).name for path, _ in loras]
        self._loras = list(zip(names, (strength for _, strength in loras), strict=True))
        self.offer = ModelLimits(
            title=Path(folder).resolve().name,
            facts=(f"computed in {self._pipeline.compute_dtype}", *(f"LoRA {name}" for name in names)),
            height=max_size,
            width=max_size,
            max_size=max_size,
            guidance=guidance.embedded if guidance.embedded is not None else guidance.scale,
            min_guidance=0.0 if told else 1.0,
            guidance_means=EMBEDDED_GUIDANCE if told else CLASSIFIER_FREE,
            adapters=bool(names),
            examples=EXAMPLES,
        )
        unit = PATCH * self._pipeline.models["vae"].config.factor
        if SIZE_UNIT % unit:
            raise ConvertedError(f"{folder} makes images in multiples of {unit} pixels, the page of {SIZE_UNIT}")

    def load(self, request: Request) -> bool:
        """See `Model`."""
        del request
        loaded, self._loaded = self._loaded, True
        _ = self._pipeline.params
        return not loaded

    def program(self, request: Request) -> Hashable:
        """See `Model`."""
        guided, how = self._pipeline.guidance(request.guidance).scale != 1.0, "edit" if request.edit else request.method
        return request.height, request.width, guided, how

    def images(self, request: Request, steps: int) -> np.ndarray:
        """See `Model`."""
        self._pipeline.strength = request.lora_scale
        how: dict[str, Any] = dict(guidance=request.guidance, shift=request.shift, quiet=True)  # see `notes`
        if request.edit is None:
            how |= dict(height=request.height, width=request.width, num=request.num, seed=request.seed)
            return self._pipeline(request.prompt, steps, method=request.method, **how)
        pixels_BhwC, skip = request.edit.pixels_hwc[None], min(request.edit.skip, steps - 1)
        texts = request.edit.source_prompt, request.prompt
        return self._pipeline.edit(pixels_BhwC, *texts, steps, skip, draws=[(request.seed, 0)], **how)

    def notes(self, request: Request) -> list[str]:
        """See `Model`."""
        return self._pipeline.cuts(prompts_of(request))

    def image_size(self, height: int, width: int) -> tuple[int, int, int]:
        """See `Model`: the size of the image, up to the bound."""
        scale = min(1.0, self.offer.max_size / max(height, width))
        rows, columns = (max(round(side * scale / SIZE_UNIT), 1) * SIZE_UNIT for side in (height, width))
        return rows, columns, 3

    def facts(self, request: Request) -> Record:
        """See `Model`."""
        guidance = self._pipeline.guidance(request.guidance)
        rows, columns = self._pipeline.latent_size(request.height, request.width)
        own = self._pipeline.sampling.shift.at(rows * columns // PATCH**2)
        told: Record = {"guidance": guidance.scale if guidance.embedded is None else guidance.embedded}
        told |= {"shift": own if request.shift is None else request.shift}
        told |= {"height": request.height, "width": request.width, "text_tokens": None, "model": self.offer.title}
        told |= {"batch_size": self._pipeline.rounded(None)}
        return told | {"lora": [[name, strength * request.lora_scale] for name, strength in self._loras]}
