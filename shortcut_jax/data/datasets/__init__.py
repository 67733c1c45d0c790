"""TFDS builders."""
