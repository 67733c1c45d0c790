"""shortcut_jax: flow-matching image models that need 1 to 4 sampling steps."""

from typing import TYPE_CHECKING, Any

from shortcut_jax.core.version import __version__

if TYPE_CHECKING:
    from shortcut_jax.inference.converted_pipeline import TextToImage
    from shortcut_jax.inference.run_pipeline import Pipeline

__all__ = ["Pipeline", "TextToImage", "__version__"]


def __getattr__(name: str) -> Any:
    # Both are imported on first use, so that a main can configure JAX before anything imports it.
    if name == "Pipeline":
        from shortcut_jax.inference.run_pipeline import Pipeline

        return Pipeline
    if name == "TextToImage":
        from shortcut_jax.inference.converted_pipeline import TextToImage

        return TextToImage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
