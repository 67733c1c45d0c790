"""A run against its opened sets: sizes, channels and text states, told before anything is compiled."""

from collections.abc import Iterable

from shortcut_jax.config.schema import Settings
from shortcut_jax.core.latents import PATCH
from shortcut_jax.data.format import Size, TextInfo
from shortcut_jax.data.records import stride_of
from shortcut_jax.data.training import OpenSet, TrainingData
from shortcut_jax.errors import ConfigError
from shortcut_jax.models.flux import FluxConfig
from shortcut_jax.models.presets import PRESETS


def check_data(s: Settings, cfg: FluxConfig, data: TrainingData) -> None:
    """Raises ConfigError where sets are not what a run's settings and its network take."""
    for one in data.sets:
        if s.data.store == "captions":
            if one.info and s.data.text_encoder == "stored":
                _check_text(s, cfg, one.name, one.info.text)
        elif one.prepared is None:
            _check_images(s, cfg, one)
        else:
            _check_prepared(s, cfg, one)


def check_grid(s: Settings, data: TrainingData) -> None:
    """Raises ConfigError where sample grids cannot be drawn: of a size or captions that the first set has not."""
    _check_size(s, data.sets[0].name, data.sets[0].sizes)
    if s.eval.captions and s.data.text_encoder == "stored":
        unknown = [c for c in s.eval.captions if c not in data.prompts]
        if unknown:
            raise ConfigError(
                f"eval.captions has {unknown[0]!r}, whose text states are not stored in the set {s.data.name!r}: "
                f"choose among its {len(data.prompts) - 1} prompts, or prepare the set with --eval_prompts"
            )


def _check_images(s: Settings, cfg: FluxConfig, one: OpenSet) -> None:
    """All images of a set that is in memory are looked at, else the first."""
    records = one.records if isinstance(one.records, list) else [one.records[0]]
    for height, width, depth in sorted({record["image"].shape for record in records}):
        _check_size(s, one.name, [(height, width)])
        _check_channels(s, cfg, one.name, depth * stride_of(s.data) ** 2)


def _check_prepared(s: Settings, cfg: FluxConfig, one: OpenSet) -> None:
    info = one.info
    if info is None:
        return
    stride = stride_of(s.data)
    if info.latents and info.latents.stride != stride:
        raise ConfigError(
            f"the set {one.name!r} has {info.latents.stride} pixels a latent, but data.stride is {stride}: set "
            f"data.stride={info.latents.stride}"
        )
    for height, width in one.sizes:
        if height % (stride * PATCH) or width % (stride * PATCH):
            raise ConfigError(
                f"the set {one.name!r} has images of {height} x {width}, but a token takes {stride * PATCH} pixels "
                f"each way (data.stride={stride}, patches of {PATCH})"
            )
    _check_channels(s, cfg, one.name, info.latents.channels if info.latents else 3 * stride**2)
    if s.data.text_encoder == "stored":
        _check_text(s, cfg, one.name, info.text)


def _check_text(s: Settings, cfg: FluxConfig, name: str, text: TextInfo | None) -> None:
    if text is None:
        raise ConfigError(f"the set {name!r} holds no text states: set data.text_encoder=words")
    for key, asked, found in (
        ("data.text_tokens", s.data.text_tokens, text.tokens),
        ("data.text_states", s.data.text_states, text.states),
    ):
        if asked != found:
            raise ConfigError(
                f"{key} is {asked!r}, but the set {name!r} was prepared with {found!r}: set {key}={found}"
            )
    for key, asked, found in (
        ("text width", cfg.text_width, text.width),
        ("pooled width", cfg.pooled_width, text.pooled_width),
    ):
        if asked != found:
            raise ConfigError(
                f"the set {name!r} has text states of {key} {found}, but the preset {s.model.preset!r} takes {asked}"
            )


def _check_size(s: Settings, name: str, sizes: Iterable[Size]) -> None:
    sizes = list(sizes)
    if (s.data.height, s.data.width) in sizes:
        return
    height, width = sizes[0]
    several = len(sizes) > 1
    held = ", ".join(f"{h} x {w}" for h, w in sizes)
    raise ConfigError(
        f"the data set {name!r} holds images of {held} pixels, but data.height and data.width are {s.data.height} and "
        f"{s.data.width}{' (the bucket of the sample grids)' if several else ''}: set --config.data.height={height} "
        f"--config.data.width={width}"
    )


def _check_channels(s: Settings, cfg: FluxConfig, name: str, channels: int) -> None:
    taken = cfg.channels // PATCH**2
    if channels != taken:
        fitting = [preset for preset, row in PRESETS.items() if row.channels == channels * PATCH**2]
        stride = stride_of(s.data)
        folded = f" (data.stride={stride})" if s.data.store == "pixels" and stride > 1 else ""
        raise ConfigError(
            f"the data set {name!r} holds images of {channels} channels{folded}, but the preset {s.model.preset!r} "
            f"takes {taken}: choose {' or '.join(fitting) or 'another data set; no preset takes these'}"
        )
