"""`shortcut-jax COMMAND ...`, or `python -m shortcut_jax COMMAND ...`: the commands, by their names."""

import runpy
import sys

from shortcut_jax.core.version import __version__

COMMANDS = {
    "train": "train, post-train, or compile a run for devices that are not here (--dry_run)",
    "sample": "prompts to images, with a run or a converted pipeline; edits",
    "evaluate": "distances, precision and recall, CLIP score: a page",
    "prepare": "captioned images, or captions alone, to a set that training streams",
    "convert": "weights from and to diffusers, Black Forest Labs and ComfyUI",
    "app": "a web page",
    "compare": "several runs of small images side by side",
    "bench": "two configs in turn: time of a step, or of sampling",
}


def main() -> None:
    """Runs the command that the first argument names; without one, prints them all."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {command:<10}{what}" for command, what in COMMANDS.items()]
        print("\n".join(["usage: shortcut-jax COMMAND [--help]", "", *lines]))
        return
    if name == "--version":
        print(f"shortcut_jax {__version__}")
        return
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(1)
    del sys.argv[0]
    runpy.run_module(f"shortcut_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
