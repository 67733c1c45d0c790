"""The web page: `python -m shortcut_jax.app --workdir=W`, or `--checkpoint=FOLDER` for a converted pipeline.

Needs gradio: `pip install ".[app]"`.
"""

import contextlib
import importlib.util
import ipaddress
import os
import shutil
import signal
import socket
import tempfile
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shortcut_jax import cli
from shortcut_jax.cluster.bootstrap import find_place
from shortcut_jax.cluster.distributed import say, tell
from shortcut_jax.errors import ConvertedError, UsageError
from shortcut_jax.inference.converted_pipeline import TextToImage
from shortcut_jax.inference.run_pipeline import FEW, Pipeline
from shortcut_jax.runtime.compilation_cache import keep_programs
from shortcut_jax.sources.models import with_strengths
from shortcut_jax.steps.networks import VIEWS
from shortcut_jax.webapp.guard import MAX_UPLOAD, Guard, Hosts, hosts_of
from shortcut_jax.webapp.request import MAX_STEPS, SIZE_UNIT, make_request
from shortcut_jax.webapp.studio import Studio

USAGE = "usage: python -m shortcut_jax.app --workdir=W|--checkpoint=FOLDER [--host=127.0.0.1] [--port=7860]"
GRACE = 5.0
"""Seconds that a request under way has when the app is to end."""

ONLY_WITH = {
    "workdir": ("views", "base", "encoders"),
    "checkpoint": ("lora", "lora_scale", "max_size", "matmul_dtype"),
}
"""What is served -> the options that go with it only."""


def main(argv: Sequence[str]) -> int:
    """Parses the command line and serves the page until SIGTERM or Ctrl-C."""
    from absl import flags

    values = cli.new_flags()
    flags.DEFINE_string("workdir", None, "Folder of a training run.", flag_values=values)
    flags.DEFINE_string("checkpoint", None, "Converted pipeline, instead of a workdir.", flag_values=values)
    flags.DEFINE_list("views", None, "With --workdir: those offered, by default slow,online,fast.", flag_values=values)
    flags.DEFINE_string("base", None, "With --workdir: base of its adapters, where it has moved.", flag_values=values)
    flags.DEFINE_string("encoders", None, "With --workdir: pipeline of a run on latents.", flag_values=values)
    flags.DEFINE_multi_string("lora", None, "With --checkpoint: LoRA; several are added up.", flag_values=values)
    flags.DEFINE_multi_float("lora_scale", None, "Strength of each --lora, which the page scales.", flag_values=values)
    cli.define_matmul_dtype(values)
    flags.DEFINE_integer("max_size", None, "With --checkpoint: longest side in pixels (1024).", flag_values=values)
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; another lets others in.", flag_values=values)
    flags.DEFINE_multi_string("allow_host", None, "Further name of the page, such as a proxy's.", flag_values=values)
    flags.DEFINE_integer("port", 7860, "Port to listen on; 0 for any free one.", flag_values=values)
    flags.DEFINE_boolean("warm_up", True, "Compile before the page is served.", flag_values=values)
    options = cli.parse(values, argv, USAGE)
    _check(options)
    if importlib.util.find_spec("gradio") is None:
        raise UsageError('the web page needs gradio: pip install ".[app]"')
    if find_place() is not None:
        raise UsageError("the web page is served by one process, but this is one of several: start it alone")
    port = free_port(options.host, options.port)
    hosts = hosts_of(options.host, options.allow_host or ())
    keep_programs()
    studio = open_studio(options)
    if options.warm_up:
        _warm_up(studio)
    which = _serve(studio, options.host, port, hosts)
    say(f"stopped by {which.name}")
    code = 130 if which == signal.SIGINT else 0
    if not studio.close(GRACE):
        os._exit(code)  # a thread inside a compiled program can be neither stopped nor left to Python's own end
    return code


def _check(options: types.SimpleNamespace) -> None:
    """Raises UsageError for options that do not go together."""
    cli.which_model(options, ONLY_WITH, USAGE)
    views = options.views or ("slow", "online", "fast")
    if set(views) - set(VIEWS) or len(set(views)) < len(views):
        raise UsageError(f"--views is {','.join(views)}, but must be some of {', '.join(VIEWS)}, each once")
    loras = with_strengths(options.lora, options.lora_scale)
    cli.check_finite("lora_scale", options.lora_scale or ())
    size = 1024 if options.max_size is None else options.max_size
    if size < SIZE_UNIT or size % SIZE_UNIT:
        raise UsageError(f"--max_size is {size}, but must be a positive multiple of {SIZE_UNIT}")
    options.views, options.max_size, options.loras = views, size, loras


def free_port(host: str, port: int) -> int:
    """A port that can be listened on, so that a busy one is reported before anything is read.

    Raises:
      UsageError: it is in use or no port, or the host is none of this machine.
    """
    if not 0 <= port < 65536:
        raise UsageError(f"--port is {port}, but must be 0 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except (OSError, UnicodeError) as error:
        hint = "choose another --port, or --port=0 for any free one"
        raise UsageError(f"cannot listen on {host}:{port} ({error}): {hint}") from error


def open_studio(options: types.SimpleNamespace) -> Studio:
    """The model within the limits of the options; see `Pipeline` and `TextToImage` for what is raised."""
    if options.checkpoint is None:
        first, *_ = options.views
        run = Pipeline(options.workdir, first, MAX_STEPS, FEW, options.base, encoders=options.encoders)
        return Studio(run, run.limits._replace(views=tuple(options.views)), {first: run.params})
    pipeline = TextToImage(options.checkpoint, loras=options.loras, merge=False, matmul_dtype=options.matmul_dtype)
    if SIZE_UNIT % (unit := pipeline.size_unit):
        raise ConvertedError(
            f"{options.checkpoint} makes images in multiples of {unit} pixels, the page of {SIZE_UNIT}"
        )
    tell(pipeline.models["flux"].notes)
    return Studio(pipeline, pipeline.limits._replace(height=options.max_size, width=options.max_size))


def _warm_up(studio: Studio) -> None:
    """Compiles what the page asks for at first, so that a checkpoint that cannot be sampled is reported at once."""
    prompt = studio.limits.examples[0] if studio.limits.examples else "an image"
    several = studio.sample(make_request(studio.limits, {"prompt": prompt, "steps": 1}))
    single = studio.sample(make_request(studio.limits, {"prompt": prompt, "steps": 1, "num": 1}))
    say(f"compiled in {several.compiling + single.compiling:.1f} s")


def _serve(studio: Studio, host: str, port: int, hosts: Hosts) -> signal.Signals:
    """Serves until a signal comes, and returns it. Images lie in a folder of their own, which goes with the app."""
    received: list[signal.Signals] = []
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, lambda number, _: received.append(signal.Signals(number)))
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with _own_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        from shortcut_jax.webapp import page, style

        blocks = page.build(studio, Path(folder))
        # Nothing is shared, recorded or monitored.
        closed: dict[str, Any] = dict(share=False, max_file_size=MAX_UPLOAD, run_history=False, enable_monitoring=False)
        closed |= dict(ssr_mode=False, mcp_server=False, pwa=False, footer_links=[], show_error=False)
        closed["app_kwargs"] = {"lifespan": _guarded(hosts), "openapi_url": None}
        url_host = f"[{host}]" if ":" in host else host
        try:
            look: dict[str, Any] = dict(theme=style.THEME, css=style.CSS)
            blocks.launch(
                server_name=url_host, server_port=port, prevent_thread_lock=True, quiet=True, **closed, **look
            )
        except OSError as error:
            raise UsageError(f"cannot listen on {host}:{port} ({str(error).splitlines()[0]})") from error
        if not _is_loopback(host):
            say(f"note: {host} lets other machines in, and there is no password")
        say(f"the page is at http://{url_host}:{port} (Ctrl-C ends it)")
        while not received:
            time.sleep(0.2)  # not for ever: a signal that another thread takes does not wake this one
        blocks.server.force_exit = True  # open pages are not waited for
        blocks.close(verbose=False)
    return received[0]


@contextlib.contextmanager
def _own_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="shortcut_jax_app_")
    try:
        yield folder
    finally:  # renamed first, so that a request under way can add nothing to what is being deleted
        with contextlib.suppress(OSError):
            os.rename(folder, f"{folder}-ended")
        shutil.rmtree(f"{folder}-ended", ignore_errors=True)


def _guarded(hosts: Hosts) -> Callable[[Any], contextlib.AbstractAsyncContextManager[None]]:
    """A lifespan that puts the guard around all of gradio's own middleware, which answers some requests itself."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        app.middleware_stack = Guard(app.middleware_stack, hosts)
        yield

    return lifespan


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    cli.run(main)
