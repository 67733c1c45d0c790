"""Judging images: features, metrics, the page."""
