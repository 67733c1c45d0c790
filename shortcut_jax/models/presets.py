"""The table of model sizes. A size is a row."""

from shortcut_jax.models.flux import FluxConfig

_AXES_128 = (16, 56, 56)
_AXES_64 = (8, 28, 28)
_FLUX = (64, 4096, 768)  # channels, text width, pooled width
_WORDS = (4, 64, 64)

PRESETS: dict[str, FluxConfig] = {
    # FLUX.1 of Black Forest Labs: 11,901,408,320 and 11,891,178,560 parameters.
    "flux-dev": FluxConfig(19, 38, 3072, 24, _AXES_128, *_FLUX, guidance=True),
    "flux-schnell": FluxConfig(19, 38, 3072, 24, _AXES_128, *_FLUX),
    # The same architecture scaled down, for the same latents and text encoders.
    "flux-2.5b": FluxConfig(8, 20, 2048, 16, _AXES_128, *_FLUX),
    "flux-600m": FluxConfig(8, 18, 1024, 8, _AXES_128, *_FLUX),
    "flux-130m": FluxConfig(3, 7, 768, 12, _AXES_64, *_FLUX),
    "flux-30m": FluxConfig(2, 8, 384, 6, _AXES_64, *_FLUX),
    # For the embedded data sets: pixels as latents, `words` as text encoder.
    "emoji": FluxConfig(2, 8, 384, 6, _AXES_64, 48, 256, 256),  # blocks of 2 x 2 pixels as latents
    "digits": FluxConfig(1, 2, 128, 4, (8, 12, 12), *_WORDS),
    "tiny": FluxConfig(2, 2, 32, 2, (4, 6, 6), *_WORDS),
}


def preset(name: str) -> FluxConfig:
    """The named row.

    Raises:
      ValueError: no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
