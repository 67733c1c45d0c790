"""The reference of all config fields: `python -m shortcut_jax.config.reference > docs/configuration.md`."""

from collections import defaultdict

from shortcut_jax.config.fields import field_help
from shortcut_jax.config.resume import resume_marks
from shortcut_jax.config.schema import Settings
from shortcut_jax.core.text import markdown

ON_RESUME = {"identity": "no", "schedule": "yes, logged", "free": "yes"}

HEAD = """\
# Configuration

Every field of a config, as `python -m shortcut_jax.train --help` prints it; on the command line `--config.NAME=VALUE`.
[Training](training.md) explains how a config is written. The last column says whether a run may be resumed with another
value. Written by `python -m shortcut_jax.config.reference > docs/configuration.md`.
"""


def reference() -> str:
    """The page, as Markdown: a table for the run itself, and one for each group of fields."""
    marks = resume_marks()
    groups: dict[str, list[list[str]]] = defaultdict(list)
    for name, default, text in field_help(Settings()):
        group = name.rpartition(".")[0]
        row = [f"`{name}`", default.replace("|", "\\|"), text, ON_RESUME[marks[name]]]
        groups[group].append(row)
    head = ["field", "type, default", "meaning", "may change on resume"]
    tables = [
        f"## {f'`{group}`' if group else 'The run'}\n\n{markdown([head, *rows])}\n" for group, rows in groups.items()
    ]
    return "\n".join([HEAD, *tables])


if __name__ == "__main__":
    print(reference(), end="")
