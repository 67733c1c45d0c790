"""Words that other people do not use, or use otherwise: what to say in their place. CONTRIBUTING.md has the rules."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTEAD = {
    r"pictures?": "image",
    r"(fast|slow) averages?": "fast EMA, slow EMA",
    r"(is|are) not there": "is not found",
    r"the same command goes on": "rerun the same command to resume",
    r"(is|are) told": "is conditioned on (a network); is reported, is printed",
    r"mend(s|ed|ing)?": "fix",
    r"borne": "tolerated",
    r"lessens?": "reduce",
    r"(run|training|command|session) goes on": "continues, resumes",
    r"has not (the|a|an)": "lacks",
    r"shall": "should",
}
"""Pattern of a word -> what to say."""

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
SOURCES = [path for folder in ("shortcut_jax", "configs") for path in (ROOT / folder).rglob("*.py")]


def _prose(path):
    """Texts of a page, or the comments and strings of a source, without names in backticks and argument lists."""
    text = re.sub(r"^## Words$.*?(?=^## )", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)  # the list itself
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        kinds = (tokenize.COMMENT, tokenize.STRING)
        text = "\n".join(t.string for t in tokens if t.type in kinds and " " in t.string)
        text = re.sub(r"^ +\w+: ", "", text, flags=re.MULTILINE)
        text = re.sub(r"\{[^{}]*\}", "", text)
    return re.sub(r"`[^`\n]*`", "", text)


@pytest.mark.parametrize("path", PAGES + SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_plain(path):
    for word, instead in INSTEAD.items():
        if found := re.search(rf"(?<![\w.])({word})(?![\w(])", _prose(path), re.IGNORECASE):
            pytest.fail(f"{path.relative_to(ROOT)} says {found[1]!r}: say {instead}")
