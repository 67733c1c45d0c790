"""Shared fixtures. Eight CPU devices are simulated for the whole suite."""

import collections
import gc
import os
from importlib.metadata import version

# Programs here run for milliseconds and compile for seconds: the cheapest code generation is the fastest suite.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",  # the workers keep the cores busy
    "--xla_cpu_multi_thread_eigen=false",
    # Half the time of compiling a train step; later versions of XLA do not know it, and end where they do not.
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib") < "0.11" else []),
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # a twentieth of the time goes into lines that nobody reads

import jax
import pytest
from filelock import FileLock

from tests.helpers import BOTH_BLOCKS

# Tracing makes many objects and little garbage: collecting it as often as by default takes a tenth of the time.
gc.freeze()
gc.set_threshold(200_000, 50, 1000)


def pytest_collection_modifyitems(items):
    """Files with the slowest tests first, so that no worker is left with one of them at the end."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # a stable order: that of the files and of their tests stays


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """The suite, and the commands it starts, compile the same small programs many times."""
    base = tmp_path_factory.getbasetemp()
    folder = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "jax_cache")  # one for all workers
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session", autouse=True)
def decoded_once():
    """The digits are decoded for a hundred runs; files that have changed are decoded again."""
    from shortcut_jax.data import records, training

    in_memory, kept = training.in_memory, {}  # whose own name for it stays, for prepared sets

    def once(source, num_bytes):
        stored = tuple((piece, piece.path.stat().st_mtime_ns) for piece in source._pieces)
        if stored not in kept:
            kept[stored] = in_memory(source, num_bytes)
        return kept[stored]

    records.in_memory = once


@pytest.fixture
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def exact_frequencies(monkeypatch):
    """diffusers' embedding of a time with exact exponentials, as ours has: those of torch depend on the processor.

    Their last digit, times a phase of 1000 t, is what a comparison at 1e-5 would see.
    """
    import torch
    from diffusers.models import embeddings

    embed, exp = embeddings.get_timestep_embedding, torch.exp

    def exactly(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "exp", lambda x: exp(x.double()).to(x.dtype))
            return embed(*args, **options)

    monkeypatch.setattr(embeddings, "get_timestep_embedding", exactly)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """(name, make) -> a folder that `make` fills, once for all workers: the others wait for the first that asks."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name, make):
        folder = shared / f"shared-{name}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                make(folder)  # where it fails, the tests of all workers that need it do
        return folder

    return once


@pytest.fixture(scope="session")
def data_dir(made_once):
    """A folder with the digits."""
    from shortcut_jax.data.records import DataSettings, open_source

    return str(made_once("tfds", lambda folder: open_source(DataSettings(dir=str(folder)))))


SMALL_RUN = {
    "model.preset": "tiny",
    "model.double_blocks": 0,  # one kind of block compiles in half the time of two
    "batch_size": 32,
    "steps": 4,
    "student_steps": "(1,2,4)",
    "student_weights": "None",
    "one_step_share": "None",
    "multistep_start": 1.0,
    "multistep_times": "first",
    "jumps": 2,
    "timestep_range": "(0.0,1.0)",
    "eval.steps": "(1,2)",
    "eval.images": "(20,20,20)",
    "eval.batch_size": 20,
    "eval.columns": 4,
    "eval.seeds": "(0,1)",
    "optimizer.warmup_steps": 0,
    "optimizer.learning_rate": 0.02,
    "log_every": 1,
    "mesh.data": 1,
    "mesh.min_shard": 0,
}


@pytest.fixture
def own_programs():
    """Samplers are compiled anew, for tests that count them; others take what an earlier test has compiled."""
    from shortcut_jax.inference import converted_editor, converted_models, generator

    for module in (generator, converted_editor, converted_models):
        for name in ("_sample_program", "_edit_program", "edit_program"):
            if program := getattr(module, name, None):
                program.cache_clear()


@pytest.fixture
def no_end(monkeypatch):
    """No sample grid and no report at the end of a run: they take most of the time of a short one."""
    from shortcut_jax.training import session

    monkeypatch.setattr(session, "finish", lambda *args: None)


@pytest.fixture
def one_device(monkeypatch):
    """Mains take all devices; these tests give them one."""
    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: device)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.fixture(scope="module")
def one_device_of_module():
    """The same for all of a module, its fixtures included."""
    with pytest.MonkeyPatch.context() as patch:
        device = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *args: device)
        patch.setattr(jax, "local_devices", lambda *args, **options: device)
        patch.setattr(jax, "device_count", lambda: 1)
        yield


@pytest.fixture(scope="session")
def arguments(data_dir):
    def make(workdir, *extra, **changes):
        values = {**SMALL_RUN, "data.dir": data_dir} | {k.replace("__", "."): v for k, v in changes.items()}
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        return ["train", "--config=configs/digits.py", f"--workdir={workdir}", *flags, *extra]

    return make


def train_on_one_device(argv):
    from shortcut_jax import train

    with pytest.MonkeyPatch.context() as patch:
        device = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *args: device)
        assert train.main(argv) == 0


@pytest.fixture(scope="session")
def trained(made_once, arguments):
    """A workdir of four uninterrupted steps with its report."""
    return made_once("trained", lambda folder: train_on_one_device(arguments(folder / "run", **BOTH_BLOCKS))) / "run"


LORA = {
    "train": "lora",
    "teacher_share": 0.4,
    "rows__self_rows": 1,
    "rows__flow_rows": 0,
    "lora__rank": 3,
    "lora__alpha": 6.0,
    "optimizer__learning_rate": 0.05,
    "eval__views": "()",
    "eval__images": "()",
}


@pytest.fixture(scope="session")
def post_arguments(arguments, trained):
    def make(workdir, *extra, **changes):
        values = {**LORA, **BOTH_BLOCKS, "init_from": str(trained), **changes}
        return arguments(workdir, *extra, **values)

    return make


@pytest.fixture(scope="session")
def distilled(made_once, post_arguments):
    """A workdir of four steps of post-training on the trained run."""
    return made_once("distilled", lambda folder: train_on_one_device(post_arguments(folder / "run"))) / "run"


@pytest.fixture(scope="session")
def pipeline_folder(made_once):
    """A small FluxPipeline with random weights, FLUX.1 dev in kind, as diffusers saves it."""
    from tests.flux_pipeline import make_pipeline

    return made_once("pipelines", lambda folder: make_pipeline(folder / "dev")) / "dev"


@pytest.fixture(scope="session")
def converted_folder(pipeline_folder, made_once):
    """The same pipeline, converted."""
    from tests.flux_pipeline import convert_pipeline

    return made_once("converted", lambda folder: convert_pipeline(pipeline_folder, folder / "dev")) / "dev"
