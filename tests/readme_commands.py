"""The commands that the README and the pages of docs/ show, as a shell would read them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {
    name: (ROOT / name).read_text()
    for name in (
        *(
            "README.md",
            "docs/training.md",
            "docs/configuration.md",
            "docs/results.md",
            "docs/sampling.md",
            "docs/web-page.md",
        ),
        *("docs/post-training.md", "docs/averages.md", "docs/data.md", "docs/pods.md", "docs/performance.md"),
        *("docs/launch.md", "docs/evaluation.md", "docs/weights.md", "docs/objectives.md", "docs/faults.md"),
        "CONTRIBUTING.md",
    )
}
"""The text of each, in the order of reading."""

MODULE = "shortcut_jax."


def shown():
    """[(module, arguments)] of every `python -m shortcut_jax.X` in a block, each once, in order."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", "\n".join(PAGES.values()), re.DOTALL | re.MULTILINE)
    commands = [command for language, block in blocks if not language for command in _read(block)]
    return [command for i, command in enumerate(commands) if command not in commands[:i]]


def _read(block):
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    variables, loop = {}, None
    for line in lines:
        if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
            variables[assigned[1]] = assigned[2]
        elif started := re.fullmatch(r"for (\w+) in (.*); do", line):
            loop = started[1], started[2].split()
        elif line == "done":
            loop = None
        else:
            for value in loop[1] if loop else [None]:
                yield from _commands(_substituted(line, variables | ({loop[0]: value} if loop else {})))


def _substituted(line, variables):
    return re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)


def _commands(line):
    words = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word != "&&":
            words.append(word)
            continue
        if words[:2] == ["python", "-m"] and words[2].startswith(MODULE):
            yield words[2].removeprefix(MODULE), words[3:]
        words = []
