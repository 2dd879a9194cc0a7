# SPDX-License-Identifier: Apache-2.0
"""How this process was started: alone, or as one of several that are one run; and the call that connects them.

`find_launch` decides from the environment and touches nothing; `connect` acts on it, before a device is touched.
"""

import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

ADDRESS, COUNT, INDEX = EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ARRIVAL = 300  # seconds that the first process waits for the last
HEARTBEAT = 100  # seconds; jax's own: it aborts all processes when one is silent for so long
WATCHED_HEARTBEAT = 300  # where a watchdog runs it speaks first, says who it was, and leaves with the resumable code


class NotConnected(Exception):
    """The processes did not find each other; scripts exit with `exit_code`."""

    exit_code = 75  # EX_TEMPFAIL: start them again


class Launch(NamedTuple):
    """How this process was started.

    Attributes:
      by: "alone", "variables", "Slurm", "Open MPI", "Cloud TPU" or "Kubernetes".
      num_processes: as the environment says; None where jax asks the cluster.
      options: arguments of `jax.distributed.initialize`; what is not there jax finds itself.
    """

    by: str
    num_processes: int | None = 1
    options: Mapping[str, Any] = {}


ALONE = Launch("alone")


def find_launch(
    environ: Mapping[str, str], *, on_tpu: bool = False, installed: Callable[[str], bool] = lambda name: False
) -> Launch:
    """What the environment says about the processes of this run.

    Three variables say it outright: JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; JAX_NUM_PROCESSES=1 makes any process a run of its own. The address alone completes what Slurm, Open
    MPI or a TPU say. Without any, the schedulers are asked, the most explicit first.

    Args:
      environ: environment variables.
      on_tpu: this machine has TPU chips that jax will use.
      installed: whether a Python package is there, for detections of jax that need one.
    Raises: ValueError that names what is missing or contradicts itself.

    >>> find_launch({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).by
    'alone'
    >>> find_launch({"JAX_COORDINATOR_ADDRESS": "h0:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}).options
    {'coordinator_address': 'h0:1234', 'num_processes': 2, 'process_id': 1}
    """
    told = {name: environ[name] for name in EXPLICIT if environ.get(name)}
    if told.get(COUNT) == "1":
        return ALONE
    if set(told) == set(EXPLICIT):
        count, index = (_number(told[name], name) for name in (COUNT, INDEX))
        if not 0 <= index < count:
            raise ValueError(f"{INDEX}={index} must be in [0, {COUNT}={count}): number the processes from 0")
        options = {"coordinator_address": told[ADDRESS], "num_processes": count, "process_id": index}
        return Launch("variables", count, options)
    if told and set(told) != {ADDRESS}:
        missing = " and ".join(name for name in EXPLICIT if name not in told)
        raise ValueError(
            f"{' and '.join(told)} say that this is one of several processes, but {missing} {_is(missing)} not set: "
            f"set all three, or {COUNT}=1 for a run of one process"
        )
    found = _scheduled(environ, on_tpu, installed, address=told.get(ADDRESS, ""))
    if told and found.num_processes == 1:
        raise ValueError(
            f"{ADDRESS} says that this is one of several processes, but {COUNT} and {INDEX} are not set and no "
            f"scheduler numbers them: set all three, or {COUNT}=1 for a run of one process"
        )
    return found._replace(options={**found.options, "coordinator_address": told[ADDRESS]}) if told else found


def _scheduled(environ: Mapping[str, str], on_tpu: bool, installed: Callable[[str], bool], address: str) -> Launch:
    """What schedulers and machines say."""
    if (tasks := _number(environ.get("SLURM_STEP_NUM_TASKS", "1"), "SLURM_STEP_NUM_TASKS")) > 1:
        numbers = {"num_processes": tasks, "process_id": _number(environ.get("SLURM_PROCID", ""), "SLURM_PROCID")}
        return Launch("Slurm", tasks, numbers | _slurm_devices(environ))
    if (size := _number(environ.get("OMPI_COMM_WORLD_SIZE", "1"), "OMPI_COMM_WORLD_SIZE")) > 1:
        rank = _number(environ.get("OMPI_COMM_WORLD_RANK", ""), "OMPI_COMM_WORLD_RANK")
        options: dict[str, Any] = {"num_processes": size, "process_id": rank}
        if not address and "OMPI_MCA_orte_hnp_uri" not in environ:  # Open MPI 5 names no address
            if not installed("mpi4py"):
                raise ValueError(
                    f"Open MPI started {size} processes and names no address to meet at: mpirun -x {ADDRESS}=HOST:PORT "
                    "with the host of rank 0, or install mpi4py"
                )
            options = {"cluster_detection_method": "mpi4py"}
        return Launch("Open MPI", size, options)
    if on_tpu:
        return _tpu(environ)
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ and not address:
        if not installed("kubernetes"):
            raise ValueError(
                f"this pod is number {environ['JOB_COMPLETION_INDEX']} of an Indexed Job, which does not say of how "
                f"many: set {', '.join(EXPLICIT)} in its manifest ({COUNT}=1 for a run of one pod), or install "
                "jax[k8s] and let the pod's service account read pods and jobs"
            )
        return Launch("Kubernetes", None)
    return ALONE


def _tpu(environ: Mapping[str, str]) -> Launch:
    """GKE names all hosts of a slice, and multi-slice jobs their slices; a TPU VM must be asked."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = _number(environ.get("MEGASCALE_NUM_SLICES") or "1", "MEGASCALE_NUM_SLICES")
    if hosts:
        count = len(hosts.split(",")) * slices
        return Launch("Cloud TPU", count) if count > 1 else ALONE
    if environ.get("TPU_SKIP_MDS_QUERY") and not environ.get("TPU_PROCESS_ADDRESSES_PATH"):
        return ALONE  # a lent single host without metadata, such as a notebook's
    return Launch("Cloud TPU", None)


def _slurm_devices(environ: Mapping[str, str]) -> dict[str, Any]:
    """All GPUs of a node for its one task. jax would take one, that of the task's number on the node."""
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    one_each = bool(tasks) and all(re.sub(r"\(x\d+\)", "", part) == "1" for part in tasks.split(","))
    if environ.get("JAX_LOCAL_DEVICE_IDS") or not one_each or len(visible) < 2:
        return {}
    return {"local_device_ids": list(range(len(visible)))}


def connect(*, watched: bool = False, seconds: int = ARRIVAL) -> Launch:
    """Makes the processes of a run one, if the environment says that there are several. Before a device is touched.

    Args:
      watched: a watchdog will run, so that jax's own, which aborts and names no host, may wait longer.
      seconds: how long the first process waits for the last.
    Raises: ValueError for an environment that contradicts itself, or when jax then sees another number of processes;
      NotConnected when they do not find each other.
    """
    launch = find_launch(
        os.environ, on_tpu=_has_tpu(), installed=lambda name: importlib.util.find_spec(name) is not None
    )
    if launch.by == "alone":
        return launch
    try:
        jax.distributed.initialize(
            **launch.options,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=WATCHED_HEARTBEAT if watched else HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotConnected(
            f"this process was started by {launch.by} as one of {launch.num_processes or 'several'}, and they did not "
            f"find each other in {seconds} s: {reason}"
        ) from error
    seen = jax.process_count()
    if launch.num_processes not in (None, seen):
        raise ValueError(
            f"{launch.by} started {launch.num_processes} processes, but jax sees {seen} on the backend "
            f"{jax.default_backend()!r}: each would train alone. Set JAX_PLATFORMS to the backend of all, and look "
            "whether every host has its devices"
        )
    return launch


def alone(what: str) -> None:
    """Refuses to be started as one of several processes: they would do the same work in the same place.

    Raises: ValueError.
    """
    launch = find_launch(os.environ, on_tpu=_has_tpu(), installed=lambda name: True)
    if launch.num_processes != 1:
        raise ValueError(
            f"{what}, and {launch.by} started {launch.num_processes or 'several'}: start it once, or set {COUNT}=1"
        )


def keep_programs(folder: str | pathlib.Path) -> None:
    """Keeps compiled programs in a folder that processes and runs may share; the first process writes, all read.

    Before anything is compiled: jax looks only once whether it has such a folder.
    """
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder).absolute()))


def _has_tpu() -> bool:
    """Whether jax will use TPU chips of this machine; asks files alone, so that no device is touched."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        return False
    device = pathlib.Path("/dev")
    return any(device.glob("accel*")) or any(device.glob("vfio/[0-9]*"))


def _number(text: str, name: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name} must be a number, got {text!r}")
    return int(text)


def _is(names: str) -> str:
    return "are" if " and " in names else "is"
