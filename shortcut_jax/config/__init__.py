"""From a config file to frozen settings, or to one line of error. A config file imports `default_config`."""

from shortcut_jax.config.schema import default_config

__all__ = ["default_config"]
