# SPDX-License-Identifier: Apache-2.0
"""All processes of a run say what they have, and go on only if they say the same.

Every function here is a collective: all processes call it at the same place. With one process none of them waits.
"""

import collections
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.train.feeding import own_rows
from jaxlm.train.mesh import reach
from jaxlm.train.options import RunOptions

Result = TypeVar("Result")

SHOWN = 4  # processes named of those that say the same
LISTED = 16  # hosts named in the summary
FAR = {"process": "inside a process", "slice": "across processes", "slices": "across slices"}
HOST = "host"
PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def gather(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What every process says, in the order of their indices; JSON values of any length.

    >>> gather({"step": 3})
    [{'step': 3}]
    """
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    if jax.process_count() == 1:
        return [json.loads(text.tobytes())]
    sizes = _gathered(np.array([len(text)], np.int32))[:, 0]
    padded = _gathered(np.pad(text, (0, int(sizes.max()) - len(text))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]


def _gathered(mine: np.ndarray) -> np.ndarray:
    """`[N]` of each process -> `[processes, N]` on all of them.

    Over the first device of each process: `multihost_utils.process_allgather` needs equal numbers of devices, and a
    host that lost one is just what is to be found out.
    """
    firsts: dict[int, jax.Device] = {}
    for device in jax.devices():
        firsts.setdefault(device.process_index, device)
    devices = np.array([firsts[index] for index in sorted(firsts)])
    mesh = Mesh(devices, ("process",), axis_types=(AxisType.Auto,))
    rows = jax.make_array_from_process_local_data(NamedSharding(mesh, P("process")), mine[None])
    everywhere = jax.jit(_same, out_shardings=NamedSharding(mesh, P()))(rows)
    return np.asarray(everywhere.addressable_data(0))


def _same(x: jax.Array) -> jax.Array:
    return x


def facts() -> dict[str, Any]:
    """What must be equal on all processes before any of them computes: code, versions, devices."""
    local = jax.local_devices()
    kinds = collections.Counter(device.device_kind for device in local)
    return {
        "jaxlm": importlib.metadata.version("jaxlm") if _is_installed("jaxlm") else "not installed",
        "source": source_digest(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "devices": ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())),
    }


@functools.cache
def source_digest(root: pathlib.Path = PACKAGE) -> str:
    """Of every Python file of the package: names and bytes. Two checkouts with one version differ here."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def agree(said: Mapping[str, Any], *, remedy: str) -> list[str]:
    """Compares what all processes say.

    Args:
      said: name -> JSON value.
      remedy: what to do where they differ.
    Returns: the host name of each process.
    Raises: ValueError on all processes, with the same words: what differs, and which process has which value.
    """
    heard = gather({HOST: socket.gethostname(), "said": said})
    hosts = [one[HOST] for one in heard]
    told = differences([one["said"] for one in heard], hosts)
    if told:
        raise ValueError(f"the processes of this run disagree: {'; '.join(told)}. {remedy}")
    return hosts


def differences(said: list[dict[str, Any]], hosts: list[str]) -> list[str]:
    """One clause for each name that has more than one value; the most common value first.

    >>> differences([{"jax": "0.10"}, {"jax": "0.12"}, {"jax": "0.10"}], ["a", "b", "c"])
    ["jax is '0.10' on process 0 (a), process 2 (c) and '0.12' on process 1 (b)"]
    """
    told = []
    for name in sorted({name for one in said for name in one}):
        groups: dict[str, list[int]] = {}
        for process, one in enumerate(said):
            groups.setdefault(repr(one[name]) if name in one else "missing", []).append(process)
        if len(groups) > 1:
            ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[1]))
            told.append(f"{name} is " + " and ".join(f"{value} on {_named(where, hosts)}" for value, where in ordered))
    return told


def together(what: str, function: Callable[[], Result]) -> Result:
    """Calls a function that may fail on one process alone; if it does on any, all raise, with the same words.

    Args:
      what: for the message, such as "opening the data".
      function: without collectives, which the others would wait in.
    Raises: OSError if one of them met one, else ValueError; it names the processes and what each of them said.
    """
    if jax.process_count() == 1:
        return function()
    failed: Exception | None = None
    try:
        result = function()
    except (ValueError, OSError, ImportError) as error:
        failed = error
    said = "" if failed is None else str(failed) or type(failed).__name__
    heard = gather({HOST: socket.gethostname(), "error": said, "storage": isinstance(failed, OSError)})
    groups: dict[str, list[int]] = {}
    for process, one in enumerate(heard):
        if one["error"]:
            groups.setdefault(one["error"], []).append(process)
    if groups:
        hosts = [one[HOST] for one in heard]
        told = "; ".join(f"on {_named(where, hosts)}: {error}" for error, where in groups.items())
        kind = OSError if any(one["storage"] for one in heard) else ValueError
        raise kind(f"{what} failed {told}") from failed
    return result


def _named(processes: list[int], hosts: list[str]) -> str:
    if len(processes) == len(hosts) > 1:
        return "all processes"
    named = ", ".join(f"process {process} ({hosts[process]})" for process in processes[:SHOWN])
    return named + (f" and {len(processes) - SHOWN} more" if len(processes) > SHOWN else "")


def summary_page(mesh: Mesh, options: RunOptions, hosts: list[str]) -> str:
    """What the processes have become, for people: one line a subject.

    Args:
      mesh: of all processes.
      options: of the run.
      hosts: from `agree`.
    """
    said, far = facts(), reach(mesh)
    axes = [f"{axis}={size} {FAR[far[axis]]}" for axis, size in mesh.shape.items() if size > 1]
    names = [f"{host} ({', '.join(str(p) for p, h in enumerate(hosts) if h == host)})" for host in dict.fromkeys(hosts)]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    saves = f"every {options.save_every} updates" if options.save_every else "at the end"
    local = len(own_rows(mesh, options.batch_size))
    lines = {
        "processes": f"{len(hosts)}; hosts {', '.join(names[:LISTED])}{more}",
        "devices": f"{said['devices']} each, {mesh.size} in all, backend {jax.default_backend()}",
        "mesh": ", ".join(axes) or "one device",
        "versions": f"jaxlm {said['jaxlm']} (source {said['source']}), Python {said['python']}, "
        f"jax {said['jax']}, jaxlib {said['jaxlib']}",
        "batch": f"{options.batch_size} rows, {local} a process, in {options.micro_batches} parts",
        "saves": f"{saves} in {options.directory}" if options.directory else "nothing: run.directory is not set",
        "watchdog": f"{options.step_timeout:g} s for an update" if options.step_timeout else "off",
    }
    return "\n".join(f"{name:<11}{line}" for name, line in lines.items())
