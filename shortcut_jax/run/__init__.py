"""One run: from settings to a compiled step, a state and its folder."""
