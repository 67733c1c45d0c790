"""The order of rooms: a file imports only from floors below its own, and from its own room, without a circle."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "shortcut_jax"
COMMANDS = ("app", "bench", "compare", "convert", "evaluate", "prepare", "sample", "train")
FLOORS = (
    {"errors"},
    {"core"},
    {"models", "weights", "data", "cluster"},
    {"steps", "runtime", "formats"},
    {"config"},
    {"sources"},
    {"run", "conversion"},
    {"inference"},
    {"preparation"},
    {"evaluation"},
    {"training", "diagnostics", "webapp"},
    {"cli"},
    {*COMMANDS, "__init__", "__main__"},
)
"""Rooms, lowest first: folders, and files of the top level. Rooms of one floor do not know each other."""

FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
NEVER = {"steps": {"data", "cluster"}}
"""Rooms below that a room does not import all the same: steps know no disk."""

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in FILES}


def _room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imports(nodes):
    """Names of all modules that statements import."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import of {node.module}"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & MODULES
            if names - MODULES:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _room_of(module):
    return "__init__" if module == "shortcut_jax" else module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_stay_below(path):
    room = _room(path)
    for name in _imports(ast.walk(ast.parse(path.read_text()))):  # in functions and for types too
        if name.split(".")[0] in ("torch", "diffusers", "tensorflow"):
            pytest.fail(f"{name} is a test-time reference only")
        if name.split(".")[0] != "shortcut_jax" or (other := _room_of(name)) == room:
            continue
        # What the package exports is opened where it is asked for.
        below = FLOOR[other] < FLOOR[room] or room == "__init__"
        assert below and other not in NEVER.get(room, ()), f"{room} imports {name}, which is not on a floor below"


@pytest.mark.parametrize("room", sorted({_room(path) for path in FILES}))
def test_no_room_has_a_circle(room):
    """Of imports of the top level of modules, those under TYPE_CHECKING too."""
    graph = {}
    for path in FILES:
        if _room(path) == room:
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
            body = ast.parse(path.read_text()).body
            body += [statement for node in body if isinstance(node, ast.If) for statement in node.body]
            graph[name] = set(_imports(body)) - {name}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_every_room_is_on_a_floor_and_every_file_fits_its_room():
    assert {_room(path) for path in FILES} == FLOOR.keys()
    assert len(list(PACKAGE.glob("*.py"))) <= 12
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


def test_no_function_is_longer_than_sixty_lines():
    """A function that is longer has a part that can be named."""
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (length := node.end_lineno - node.lineno + 1) > 60:
                long[f"{path.relative_to(PACKAGE)}: {node.name}"] = length
    assert not long


def test_no_function_takes_more_than_eight_arguments():
    """What belongs together is one record."""
    many = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if (count := len([name for name in names if name not in ("self", "cls")])) > 8:
                    many[f"{path.relative_to(PACKAGE)}: {node.name}"] = count
    assert not many
