"""`sample --interactive`: prompts in, files out, until `:quit`."""

import contextlib
import dataclasses
from collections.abc import Callable

from shortcut_jax.cluster.distributed import say
from shortcut_jax.errors import UsageError, UserError
from shortcut_jax.inference.batches import sample_to_files
from shortcut_jax.inference.image_files import Output
from shortcut_jax.inference.request import ImagePipeline, SampleRequest

HELP = """A line is a prompt; a line that begins with a colon is a setting:
  :steps 2          sampling steps
  :guidance 3.5     guidance scale; without a guidance embedding 0 and 1 mean none
  :seed 7           seed of the noise
  :num 4            images a prompt
  :size 512x512     height x width in pixels
  :method heun      euler or heun
  :shift 3          timestep shift
  :help             this text
  :quit             the end, as is Ctrl-D"""

_READ: dict[str, Callable[[str], dict[str, object]]] = {
    "steps": lambda text: {"steps": int(text)},
    "guidance": lambda text: {"guidance": float(text)},
    "seed": lambda text: {"seed": int(text), "seeds": ()},
    "num": lambda text: {"num": int(text), "seeds": ()},
    "size": lambda text: dict(zip(("height", "width"), map(int, text.lower().split("x")), strict=True)),
    "method": lambda text: {"method": text},
    "shift": lambda text: {"shift": float(text)},
}
"""Setting -> its text as fields of `SampleRequest`; ValueError where it cannot be read."""


def interact(
    model: ImagePipeline,
    request: SampleRequest,
    output: Output,
    trajectory: bool = False,
    ask: Callable[[str], str] = input,
) -> None:
    """Reads lines and samples, with the settings of `request` to begin with. Errors are reported, and it continues.

    Every prompt of one size runs the same compiled program, whatever its steps, guidance and seed.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited, and have a history)
    say("a prompt makes images; :help tells the settings, :quit ends")
    while True:
        try:
            line = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in (":quit", ":q"):
            return
        try:
            if line.startswith(":"):
                request = _set(model, request, line)
            elif line:
                _answer(model, dataclasses.replace(request, prompts=(line,)), output, trajectory)
        except UserError as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            say("interrupted")


def _set(model: ImagePipeline, request: SampleRequest, line: str) -> SampleRequest:
    """The settings after a line such as `:steps 2`. Raises UsageError where it cannot be understood or done."""
    name, _, text = line[1:].partition(" ")
    if name == "help":
        say(HELP)
        return request
    if name not in _READ:
        raise UsageError(f"there is no setting :{name}; :help tells those there are")
    try:
        changed = dataclasses.replace(request, **_READ[name](text.strip()))  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(f":{name} {text}: cannot be read; :help shows an example") from error
    changed.check()
    model.check(changed)
    return changed


def _answer(model: ImagePipeline, request: SampleRequest, output: Output, trajectory: bool) -> None:
    request.check()
    model.check(request)
    for note in model.notes(request):
        say(note)
    for path in sample_to_files(model, request, output, trajectory):
        say(str(path))
