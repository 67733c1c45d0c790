"""A file imports strictly lower floors, plus siblings in its own folder; `steps/` and `runtime/` never meet."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "shortcut_jax"
MAY_IMPORT = {
    "core": set(),
    "models": {"core"},
    "weights": {"core"},
    "steps": {"core", "models"},
    "runtime": {"core", "models", "weights"},
    "data": {"core"},
    "evaluation": {"core", "models", "weights", "steps", "runtime", "data", ""},
    "": {"core", "models", "weights", "steps", "runtime", "data", "evaluation"},
}
LOWEST = ("errors", "local_path")
"""Files of the top level that every floor may import: each imports nothing of ours but those before it."""

FILES = sorted(PACKAGE.rglob("*.py"))


def _floor(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "shortcut_jax")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_stay_below(path):
    floor = _floor(path)
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] in ("torch", "diffusers", "tensorflow"):
            pytest.fail(f"{name} is a test-time reference only")
        if parts[0] != "shortcut_jax" or len(parts) == 1:
            continue
        if path.stem in LOWEST and not floor:
            assert parts[1] in LOWEST[: LOWEST.index(path.stem)], f"{path.name} imports {name}"
        if parts[1] in LOWEST:
            continue
        target = parts[1] if (PACKAGE / parts[1]).is_dir() else ""
        assert target == floor or target in MAY_IMPORT[floor], f"{path.name} on floor {floor!r} imports {name}"


def test_every_folder_has_a_floor_and_every_file_fits_its_room():
    assert {_floor(path) for path in FILES} == set(MAY_IMPORT)
    too_long = {path.name: n for path in FILES if (n := _code_lines(path)) > 350}
    assert not too_long


def _code_lines(path):
    """Lines that hold code: neither blank, nor a comment, nor part of a docstring."""
    code = set()
    tokens = list(tokenize.generate_tokens(io.StringIO(path.read_text()).readline))
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            continue
        starts_statement = before is None or before.type in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT)
        if token.type == tokenize.STRING and (starts_statement or before.type == tokenize.DEDENT):
            continue
        code.update(range(token.start[0], token.end[0] + 1))
    return len(code)
