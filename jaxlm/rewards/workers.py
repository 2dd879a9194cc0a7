# SPDX-License-Identifier: Apache-2.0
"""Processes that score hostile texts and may be killed at any time: a few of each kind, shared, started when needed."""

import atexit
import contextlib
import functools
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxlm.data.records import BadRecord

_LOG = logging.getLogger("jaxlm.rewards")
_PROGRAM = Path(__file__).with_name("worker.py")
_START_SECONDS = 300.0  # imports, on a loaded machine
_EXTRAS = {"math": "math", "gym": "tasks"}  # which install what a kind imports
_LIFETIME = 2000  # requests: symbolic packages keep caches that only grow
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV")  # no keys among them


class Workers:
    """Up to `size` processes of one kind. Threads may ask at the same time.

    Args:
      kind: of `worker.KINDS`.
      size: processes at most.
      cpu_seconds: that scoring one text may take: CPU time of the worker, so that a loaded machine changes no score.
        A worker that neither computes nor answers is killed after 20 times as many seconds of the clock, plus 60.
      memory: bytes of address space of one worker.

    Attributes:
      killed: texts whose scoring was cut off, by time or memory, since the start.
      raised: texts on which the scorer raised.
    """

    def __init__(self, kind: str, *, size: int, cpu_seconds: float, memory: int = 4 << 30):
        self._command = [sys.executable, "-P", str(_PROGRAM), kind, str(cpu_seconds), str(memory)]
        self._extra = _EXTRAS[kind]
        self._size, self._cpu_seconds = size, cpu_seconds
        self._patience = 60 + 20 * cpu_seconds
        self._places: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._places.put(None)
        self._counting = threading.Lock()
        self.killed = 0
        self.raised = 0

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> list[float]:
        """The scores, in [0, 1]; 0 where scoring was cut off or raised, which is counted and logged.

        Raises: ImportError where the package is missing; BadRecord for a request refused for its record.
        """
        if len(requests) == 1:
            return [self._one(requests[0])]
        with ThreadPoolExecutor(self._size) as threads:
            return list(threads.map(self._one, requests))

    def close(self) -> None:
        """Ends the processes that are idle; new ones start when needed."""
        places = []
        with contextlib.suppress(queue.Empty):
            while True:
                places.append(self._places.get_nowait())
        for worker in places:
            if worker is not None:
                worker.end()
            self._places.put(None)

    def _one(self, request: Mapping[str, Any]) -> float:
        worker = self._places.get()
        try:
            if worker is None or worker.asked >= _LIFETIME:
                if worker is not None:
                    worker.end()
                worker = None
                worker = _Worker(self._command, self._extra)
            reply = worker.ask(request, self._patience)
            if reply is None:
                worker.end()
                worker = None
        finally:
            self._places.put(worker)
        if reply is None:
            with self._counting:
                self.killed += 1
            _LOG.warning(
                "scoring was cut off at %g s of CPU time or its memory, the text scores 0: %.200r",
                self._cpu_seconds,
                request.get("text") or request.get("texts"),
            )
            return 0.0
        if "refused" in reply:
            raise BadRecord("cannot be scored", reply["refused"])
        if "failed" in reply:
            raise RuntimeError(f"an exercise cannot be made anew to be scored: {reply['failed']}")
        if "raised" in reply:
            with self._counting:
                self.raised += 1
            _LOG.info("the scorer raised %s: the text scores 0", reply["raised"])
            return 0.0
        return min(1.0, max(0.0, reply["score"])) if reply["score"] == reply["score"] else 0.0


class _Worker:
    """One process; `ask` is None where it died or had to be killed."""

    def __init__(self, command: Sequence[str], extra: str):
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        environment["PYTHONHASHSEED"] = "0"  # the order of sets, and with it sympy's choices
        self.asked = 0
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            encoding="ascii",
        )
        first = self._reply(_START_SECONDS)
        if first is None or "missing" in first:
            code = self.end()
            why = first["missing"] if first else f"the process that scores texts did not start (it ended with {code})"
            raise ImportError(f"{why}: pip install 'jaxlm[{extra}]'")

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        self.asked += 1
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._reply(seconds)

    def end(self) -> int:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return self._process.wait()

    def _reply(self, seconds: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        alarm = threading.Timer(seconds, self._process.kill)
        alarm.start()
        try:
            line = self._process.stdout.readline()
        finally:
            alarm.cancel()
        return json.loads(line) if line.endswith("\n") else None


def shared_workers(kind: str, *, size: int, cpu_seconds: float) -> Workers:
    """The workers that all verifiers with these options share in this process; they end with it."""
    return _shared(kind, size, cpu_seconds, os.getpid())  # a forked child must not read its parent's replies


@functools.cache
def _shared(kind: str, size: int, cpu_seconds: float, _process: int) -> Workers:
    workers = Workers(kind, size=size, cpu_seconds=cpu_seconds)
    atexit.register(workers.close)
    return workers
