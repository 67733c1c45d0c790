"""`shortcut-jax COMMAND ...`, or `python -m shortcut_jax COMMAND ...`: the commands, by their names."""

import runpy
import sys

from shortcut_jax.core.version import __version__

COMMANDS = {
    "train": "train, post-train, or compile a run for devices that are not here (--dry_run)",
    "sample": "prompts to images, with a run or a converted pipeline; edits",
    "evaluate": "Frechet distance, KID, precision, recall and CLIP score, as an HTML page",
    "prepare": "captioned images, or captions alone, to a set that training streams",
    "convert": "weights from and to diffusers, Black Forest Labs and ComfyUI",
    "app": "a web page",
    "compare": "several runs of small images side by side",
    "bench": "two configs in turn: time of a step, or of sampling",
}

COMPLETION = r"""_shortcut_jax() {
  local word=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]} flags
  if [ "$COMP_CWORD" = 1 ]; then
    mapfile -t COMPREPLY < <(compgen -W "COMMANDS" -- "$word")
  elif [[ $word == -* ]]; then
    flags=_shortcut_jax_flags_$command  # asked for once a shell
    [ -n "${!flags}" ] || printf -v "$flags" %s "$(shortcut-jax "$command" --help 2>/dev/null |
      sed -nE 's/^  --(\[no\])?([a-z0-9_]+):.*/ --\2/p')"
    mapfile -t COMPREPLY < <(compgen -W "${!flags}" -- "$word")
  fi
}
complete -o default -F _shortcut_jax shortcut-jax
""".replace("COMMANDS", " ".join(COMMANDS))
"""Of commands and flags, for bash."""


def main() -> None:
    """Runs the command that the first argument names; without one, prints them all."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {command:<10}{what}" for command, what in COMMANDS.items()]
        usage = "usage: shortcut-jax COMMAND [--help]"
        completion = 'completion in bash: eval "$(shortcut-jax --completion)"'
        print("\n".join([usage, "", *lines, "", completion]))
        return
    if name == "--version":
        print(f"shortcut_jax {__version__}")
        return
    if name == "--completion":
        print(COMPLETION, end="")
        return
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(1)
    del sys.argv[0]
    runpy.run_module(f"shortcut_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
