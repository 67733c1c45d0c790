"""Which processes make up a run, and joining them: from flags, variables, or what JAX detects of a cluster."""

import os
from typing import Any, NamedTuple

import jax

from shortcut_jax.cluster import failures, rendezvous
from shortcut_jax.errors import JoinError

JOIN_TIMEOUT = 300.0
"""Seconds that processes wait for each other at start."""


class Place(NamedTuple):
    """The place of this process among several.

    Attributes:
      address: host:port of process 0.
      num_processes: of the run.
      process_id: of this one.
      local_device_ids: devices of this host that this process uses; all, if None.
    """

    address: str
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


def join(place: Place | None, timeout: float = JOIN_TIMEOUT) -> None:
    """Joins the other processes; does nothing for None. From then on a failure of one of them ends this one.

    Raises:
      JoinError: they do not come together within `timeout` seconds.
    """
    if place is None:
        return
    rendezvous.meet(place.address, place.num_processes, place.process_id, timeout)
    jax.distributed.initialize(
        place.address,
        place.num_processes,
        place.process_id,
        place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=60,  # everyone was here a moment ago
    )
    failures.watch()


def find_place(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = JOIN_TIMEOUT,
) -> Place | None:
    """The place of this process: each part as given, else from its variable, else as JAX detects it in a cluster.

    Returns:
      None where this is the only process.

    Raises:
      JoinError: a part is given and the others are neither given nor detected, or they do not go together.
    """
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num = _number("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    index = _number("JAX_PROCESS_ID") if process_id is None else process_id
    local: list[int] | None = None
    if num == 1:
        return None
    if address is None or num is None or index is None:
        cluster = detected_cluster()
        if cluster is None:
            if address is None and num is None:
                _check_alone()
                return None
            parts = {"--coordinator": address, "--num_processes": num, "--process_id": index}
            missing = " and ".join(flag for flag, part in parts.items() if part is None)
            raise JoinError(
                f"{missing} must be given too (or the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                f"JAX_PROCESS_ID): no cluster was detected that provides them"
            )
        address, num, index, local = _ask(cluster, address, num, index, timeout)
        if num == 1:
            return None
    _, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise JoinError(f"the coordinator's address is {address!r}, but must be HOST:PORT")
    if not 0 <= index < num:
        raise JoinError(f"process {index} is not one of {num} processes: ids are 0 to {num - 1}")
    return Place(address, num, index, local)


def detected_cluster() -> Any:
    """JAX's class for the cluster that this process is one of several of; None where it is alone.

    A shell of one task inside an allocation, or a pod that is no member of an indexed job, is alone.
    """
    from jax._src.clusters import ClusterEnv

    alone = {
        "SlurmCluster": int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1) == 1,
        "K8sCluster": "JOB_COMPLETION_INDEX" not in os.environ,
    }
    for kind in ClusterEnv._cluster_types:
        if not kind.opt_in_only_method and not alone.get(kind.__name__, False) and kind.is_env_present():
            return kind
    return None


def _check_alone() -> None:
    """Raises JoinError where a scheduler says that there are others, but JAX cannot find out who: each would run alone.

    So it is in a pod of an indexed job without the package `kubernetes`, and with Open MPI 5.
    """
    for name, highest in (("JOB_COMPLETION_INDEX", 0), ("OMPI_COMM_WORLD_SIZE", 1)):
        if (_number(name) or 0) > highest:
            raise JoinError(
                f"{name}={os.environ[name]} says that there are several processes, but not where process 0 is: give "
                f"--coordinator, --num_processes and --process_id, or their variables"
            )


def _ask(
    cluster: Any, address: str | None, num: int | None, index: int | None, timeout: float
) -> tuple[str, int, int, list[int] | None]:
    try:
        num = cluster.get_process_count() if num is None else num
        index = cluster.get_process_id() if index is None else index
        if address is None and num > 1:
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(timeout_secs=int(timeout), override_coordinator_port=port)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        why = " ".join(str(error).split())
        raise JoinError(f"the cluster ({cluster.__name__}) does not tell which processes there are: {why}") from error
    return address or "", num, index, _share_of_gpus(cluster.get_local_process_id())


def _share_of_gpus(local_id: int | None) -> list[int] | None:
    """This process's share of the GPUs that all processes of this host see, or None: all that it sees.

    JAX's own rule gives each process of Slurm or Open MPI one device, also where one process has the whole host. Here
    it holds where several processes share a host and no variable says which GPUs there are. CPUs are not affected.
    """
    tasks = _tasks_of_host()
    if local_id is None or tasks <= 1 or os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return [local_id]
    visible = [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    bound = len(visible) < (_number("SLURM_GPUS_ON_NODE") or 0)  # the scheduler gave each process its own
    if bound or len(visible) < tasks:
        return None
    if len(visible) % tasks:
        raise JoinError(f"{len(visible)} GPUs of a host cannot be divided among its {tasks} processes")
    share = len(visible) // tasks
    return list(range(local_id * share, (local_id + 1) * share))


def _tasks_of_host() -> int:
    if num := _number("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return num
    tasks, nodes = _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS"), _number("SLURM_STEP_NUM_NODES")
    return -(-(tasks or 1) // (nodes or 1))


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise JoinError(f"the variable {name} is {text!r}, but must be a number")
    return int(text)
