"""shortcut_jax: flow-matching image models that need 1 to 4 sampling steps."""
