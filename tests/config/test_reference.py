from pathlib import Path

from shortcut_jax.config.reference import reference
from shortcut_jax.config.schema import known_fields

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_of_all_fields_is_the_one_that_is_generated():
    assert PAGE.read_text() == reference(), "run python -m shortcut_jax.config.reference > docs/configuration.md"
    assert all(f"| `{name}`" in reference() for name in known_fields())


def test_every_field_has_a_meaning():
    rows = [line.split("|") for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) == len(known_fields())
    assert all(row[3].strip() for row in rows)
