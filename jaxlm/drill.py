# SPDX-License-Identifier: Apache-2.0
"""A fault drill: a run of several processes is disturbed, ends, is started again, and must end as if nothing had been.

Every process is `scripts/train.py`, on this machine, with virtual CPU devices. A fault passes when the run ended with a
sentence that names the cause, the same command went on, and then each update is there once, with the loss of the
undisturbed run, and the parameters at the end are its parameters.
"""

import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors.numpy import load_file

FAULTS = ("kill", "sigterm", "sigstop", "disk", "corrupt", "processes")
CLOSE = 1e-4  # of parameters, where sums are taken over other processes
# What a process says on its way out: its own word, or jax's where the first process is gone.
_SAID = re.compile(r"^(?:(?:stopped|error): (.*)|.*?(another task died); see the other task logs.*)$", re.MULTILINE)
_CAUSES = {
    "kill": r"lost, killed or stopped: process {who} |another task died|an error on process",
    "sigterm": r"told to stop \(SIGTERM\)",
    "sigstop": r"lost, killed or stopped: process {who} ",
    "disk": r"could not be written to .* free space on the disk",
    "corrupt": r"{newest}\b.*(damaged|differs|bytes|checksum|unreadable)",
    "processes": r"told to stop \(SIGTERM\)",
}


class Handle(Protocol):
    """A process that was started."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, minus the signal that killed it; None while it runs."""


Start = Callable[
    [Sequence[str], Mapping[str, str], pathlib.Path, int], Handle
]  # arguments, environment, output, devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drill:
    """What is drilled.

    Attributes:
      start: starts one process of `scripts/train.py`; see `starter`.
      config: a config file.
      fields: overrides, after the drill's own.
      folder: for the runs; made.
      processes: of the run, at least 2.
      devices: virtual ones of each process.
      steps: updates of a run.
      save_every: updates between saves.
      seconds: `run.step_timeout`, which decides how fast a silent process is noticed.
      patience: seconds until a round counts as hung.
      kills: of one run, one after the other, in the fault "kill".
      seed: of when and whom.
    """

    start: Start
    config: str
    folder: pathlib.Path
    fields: tuple[str, ...] = ()
    processes: int = 2
    devices: int = 2
    steps: int = 24
    save_every: int = 4
    seconds: float = 20.0
    patience: float = 600.0
    kills: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.processes < 2:
            raise ValueError(f"a drill needs at least 2 processes, one of which is lost; got {self.processes}")
        if self.steps < 3 * self.save_every or self.save_every < 1 or self.kills < 1:
            raise ValueError(
                f"steps {self.steps} must be at least three times save_every {self.save_every}, so that there is a "
                f"checkpoint to go on from, and kills {self.kills} at least 1"
            )


class Outcome(NamedTuple):
    """How a fault went.

    Attributes:
      fault: its name.
      step: updates done when it came; several for several kills.
      codes: exit codes of the disturbed round, by process.
      said: the sentence that named the cause.
      rounds: starts of the run until it was done.
      repeated: updates that had to be done again.
      difference: largest of all parameters, from the undisturbed run.
      failure: what is wrong; "" when the fault passed.
    """

    fault: str
    step: tuple[int, ...]
    codes: tuple[int, ...]
    said: str
    rounds: int
    repeated: int
    difference: float
    failure: str


def starter(script: str | pathlib.Path) -> Start:
    """Starts `script` as a process of its own, with this Python."""

    def start(arguments: Sequence[str], environ: Mapping[str, str], said: pathlib.Path, devices: int) -> Handle:
        told = os.environ | environ | {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": ""}
        with said.open("w") as file:
            return subprocess.Popen([sys.executable, str(script), *arguments], env=told, stdout=file, stderr=file)

    return start


def run_drill(
    drill: Drill, faults: Sequence[str] = FAULTS, tell: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """Runs once undisturbed, then once with each fault.

    Args:
      drill: what.
      faults: some of FAULTS.
      tell: hears each outcome as soon as it is known.
    Raises: ValueError for an unknown fault; RuntimeError when the undisturbed run does not end well.
    """
    for fault in faults:
        if fault not in FAULTS:
            raise ValueError(f"unknown fault {fault!r}: there are {', '.join(FAULTS)}")
    steps = drill.steps + (2 * drill.save_every * drill.kills if "kill" in faults else 0)
    drill = dataclasses.replace(drill, steps=steps)
    undisturbed = drill.folder / "undisturbed"
    codes, said = _Run(drill, undisturbed).round().end()
    if any(codes):
        raise RuntimeError(f"the undisturbed run ended with codes {codes}: {said}")
    outcomes = []
    for fault in faults:
        outcomes.append(_drill(drill, fault, undisturbed))
        tell(outcomes[-1])
    return outcomes


def _drill(drill: Drill, fault: str, undisturbed: pathlib.Path) -> Outcome:
    """One fault."""
    rng = random.Random(f"{drill.seed}/{fault}")
    run = _Run(drill, drill.folder / fault)
    steps: list[int] = []
    codes: tuple[int, ...] = ()
    said = failure = ""
    for _ in range(drill.kills if fault == "kill" else 1):
        who = rng.randrange(drill.processes)
        round_ = run.round(*(["run.save_retries=1"] if fault == "disk" else []))
        step = round_.reach(run.step() + rng.randint(drill.save_every + 1, 2 * drill.save_every))
        time.sleep(rng.random() * 0.2)  # not always just after a report
        steps.append(step)
        codes, said = _disturb(round_, fault, who)
        newest = ""
        if fault == "corrupt":
            newest = run.corrupt()
            codes, said = run.round().end()
        cause = _CAUSES[fault].format(who=who, newest=newest)
        if not any(codes):
            failure = "the run was over before it was disturbed"
        elif not re.search(cause, said):
            failure = failure or f"no word of the cause ({cause})"
    run.damaged = int(fault == "corrupt")
    last: dict[str, Any] = {"processes": 1, "devices": drill.devices * drill.processes} if fault == "processes" else {}
    ended, words = run.round(*(["run.bad_checkpoint=previous"] if fault == "corrupt" else []), **last).end()
    if any(ended):
        failure = failure or f"it did not go on: codes {ended}, {words}"
        return Outcome(fault, tuple(steps), codes, said, run.rounds, run.repeated, float("nan"), failure)
    difference, wrong = compared(undisturbed, run.directory, drill.steps, exact=fault != "processes")
    return Outcome(fault, tuple(steps), codes, said, run.rounds, run.repeated, difference, failure or wrong)


def _disturb(round_: "_Round", fault: str, who: int) -> tuple[tuple[int, ...], str]:
    """Does it; returns how the round ended."""
    if fault == "kill":
        os.kill(round_.handles[who].pid, signal.SIGKILL)
    elif fault == "sigstop":
        os.kill(round_.handles[who].pid, signal.SIGSTOP)
        round_.wait([handle for process, handle in enumerate(round_.handles) if process != who])
        os.kill(round_.handles[who].pid, signal.SIGCONT)
    elif fault == "disk":
        for handle in round_.handles:  # as a limit on the size of a file, which half a checkpoint exceeds
            resource.prlimit(handle.pid, resource.RLIMIT_FSIZE, (round_.run.largest()[1] // 2, resource.RLIM_INFINITY))
    else:
        os.kill(round_.handles[who].pid, signal.SIGTERM)
    return round_.end()


class _Run:
    """A run directory and the rounds in it."""

    def __init__(self, drill: Drill, directory: pathlib.Path):
        self.drill, self.directory = drill, directory
        self.rounds, self.repeated, self.damaged = 0, 0, 0  # damaged: checkpoints, the newest, that will be passed over
        directory.mkdir(parents=True)

    def round(self, *fields: str, processes: int = 0, devices: int = 0) -> "_Round":
        """Starts all processes of the run."""
        drill, done = self.drill, self.step()
        self.repeated += done - self.checkpoint() if self.rounds else 0
        self.rounds += 1
        own = {
            "directory": self.directory / "run",
            "steps": drill.steps,
            "save_every": drill.save_every,
            "keep_last": 3,
            "log_every": 1,
            "compile_cache": drill.folder / "compiled",
            "step_timeout": drill.seconds,
        }
        arguments = [drill.config, *(f"run.{name}={value}" for name, value in own.items()), *drill.fields, *fields]
        count = processes or drill.processes
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        handles, said = [], []
        for process in range(count):
            names = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(process),
            }
            said.append(self.directory / f"said-{self.rounds}-{process}.txt")
            environ = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | names
            handles.append(drill.start(arguments, environ, said[-1], devices or drill.devices))
        return _Round(self, handles, said)

    def step(self) -> int:
        """Updates that were reported."""
        return max(history(self.directory), default=0)

    def checkpoints(self) -> list[pathlib.Path]:
        """Newest last."""
        found = (self.directory / "run" / "checkpoints").glob("*/*")
        return sorted((path for path in found if path.name.isdecimal()), key=lambda path: int(path.name))

    def checkpoint(self) -> int:
        """Updates of the newest checkpoint that will be read."""
        readable = self.checkpoints()[: -self.damaged or None]
        return int(readable[-1].name) if readable else 0

    def largest(self) -> tuple[pathlib.Path, int]:
        """The largest file of the newest checkpoint, and its bytes."""
        files = [path for path in self.checkpoints()[-1].rglob("*") if path.is_file()]
        return max(((path, path.stat().st_size) for path in files), key=lambda found: found[1])

    def corrupt(self) -> str:
        """Turns one byte of the newest checkpoint; returns its folder."""
        path, size = self.largest()
        with path.open("r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)
            file.seek(size // 2)
            file.write(bytes([byte[0] ^ 0xFF]))
        return re.escape(str(self.checkpoints()[-1]))


class _Round:
    """Processes that are one run."""

    def __init__(self, run: _Run, handles: list[Handle], said: list[pathlib.Path]):
        self.run, self.handles, self._said = run, handles, said
        self._end = time.monotonic() + run.drill.patience

    def reach(self, step: int) -> int:
        """Waits until so many updates are reported, or a process has ended; returns how many there are."""
        step = min(step, self.run.drill.steps - 1)
        while (done := self.run.step()) < step and self._goes_on():
            time.sleep(0.05)
        return done

    def _goes_on(self) -> bool:
        return time.monotonic() < self._end and all(handle.poll() is None for handle in self.handles)

    def wait(self, handles: Sequence[Handle]) -> None:
        """Until these have ended; what takes too long is killed, code -9."""
        while any(handle.poll() is None for handle in handles):
            if time.monotonic() > self._end:
                for handle in handles:
                    if handle.poll() is None:
                        os.kill(handle.pid, signal.SIGKILL)
                self._end = time.monotonic() + 60
            time.sleep(0.05)

    def end(self) -> tuple[tuple[int, ...], str]:
        """Exit codes, and the different last words of the processes."""
        self.wait(self.handles)
        said = [match for path in self._said for match in _SAID.findall(path.read_text(errors="replace"))]
        words = dict.fromkeys(own or jaxs for own, jaxs in said)
        return tuple(int(handle.poll() or 0) for handle in self.handles), " | ".join(words)


def history(directory: pathlib.Path) -> dict[int, float]:
    """The objective of every update that a run reported; of one reported twice NaN."""
    found: dict[int, float] = {}
    path = directory / "run" / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            said = json.loads(line)
        except json.JSONDecodeError:
            continue  # is being written
        if said["kind"] == "train":
            found[said["step"]] = float("nan") if said["step"] in found else float(said["objective"])
    return found


def compared(undisturbed: pathlib.Path, directory: pathlib.Path, steps: int, *, exact: bool) -> tuple[float, str]:
    """The largest difference of parameters, and what is wrong with a run ("" for nothing)."""
    wanted, found = history(undisturbed), history(directory)
    if list(found) != list(range(1, steps + 1)):
        return float("nan"), f"updates are missing or out of order: {list(found)}"
    for step, objective in found.items():
        if not (objective == wanted[step] if exact else np.isclose(objective, wanted[step], rtol=1e-4)):
            return float(
                "nan"
            ), f"update {step} has the objective {objective}, undisturbed {wanted[step]}: other samples"
    first, second = (load_file(path / "run" / "model" / "model.safetensors") for path in (undisturbed, directory))
    difference = max(float(np.max(np.abs(first[name] - second[name]))) for name in first)
    if difference > (0.0 if exact else CLOSE):
        return difference, f"parameters differ by up to {difference:.3g}"
    return difference, ""


HEADER = (
    "| fault | after update | exit codes | what the run said | starts | updates done again | parameters differ by |"
)


def row(outcome: Outcome) -> str:
    """A line of the table under HEADER."""
    said = (f"**{outcome.failure}** " if outcome.failure else "") + outcome.said
    cells = [
        outcome.fault,
        ", ".join(map(str, outcome.step)),
        ", ".join(map(str, outcome.codes)),
        said if len(said) < 240 else said[:237] + "...",
        str(outcome.rounds),
        str(outcome.repeated),
        f"{outcome.difference:.3g}",
    ]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
