# SPDX-License-Identifier: Apache-2.0
"""A run that stands still ends itself: who was stuck, where everyone was, and the code that says "start me again".

<directory>/heartbeats/<process>.json        what it is doing, rewritten every few seconds by a thread
<directory>/heartbeats/verdict.json          why the run was ended, by the first who knew; all others follow it
<directory>/heartbeats/stacks-<process>.txt  Python stacks of all threads of a process that ended like that

A collective waits for ever for a process that will not come, and no exception reaches it: only another thread can act.
"""

import contextlib
import faulthandler
import json
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax

from jaxlm.train.agreement import gather, together
from jaxlm.train.goodput import OTHER, PART_OF, Clock
from jaxlm.train.stop import EXIT_CODE, Preempted

PATIENT = 10  # times run.step_timeout, for all that is no update: compiling, evaluating, saving, preparing data
STEPS = ("batch", "update")  # where run.step_timeout itself counts
SILENT = 120.0  # seconds without a heartbeat after which a process counts as lost, unless run.step_timeout is shorter
LENGTH = 512  # bytes of a heartbeat, spaces included
USER_ERROR = 2  # of an error that the user can mend, as in jaxlm.command
LOST = "lost, killed or stopped"
LEFT = ("done", "failed")  # places of a process whose silence is in order


class Watch:
    """What a process is doing, and since when.

    Args:
      directory: of the run, shared by all processes; None: no heartbeats, so that nobody can be named.
      timeout: seconds that one update, or one batch, may take.
      token: of this start of the run, so that files of an earlier one are not believed.
      hosts: names, by process.
      process: index of this one.
      clock: of the process; it is told the same places.
    """

    def __init__(
        self, directory: pathlib.Path | None, timeout: float, token: str, hosts: list[str], process: int, clock: Clock
    ):
        self.clock = clock
        self._stacks = directory / "heartbeats" if directory else None
        self._folder = self._stacks if len(hosts) > 1 else None  # one process has nobody to tell
        self._timeout, self._token, self._hosts, self._process = timeout, token, hosts, process
        self.silent = min(timeout, SILENT)
        self.every = min(max(self.silent / 12, 0.05), 10.0)
        self.grace = min(self.silent, 30.0)
        self._place, self._step, self._since = "start", 0, time.monotonic()
        self._number = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            if process == 0:
                (self._folder / "verdict.json").unlink(missing_ok=True)
        if self._stacks is not None:
            (self._stacks / f"stacks-{process}.txt").unlink(missing_ok=True)
        self.beat()

    def start(self) -> None:
        """Begins to watch."""
        self._since = time.monotonic()
        self._thread.start()

    def at(self, place: str, step: int | None = None) -> None:
        """Says what comes now: "batch" or "update", or anything that may take longer. The time begins anew."""
        self._place, self._since = place, time.monotonic()
        self._step = self._step if step is None else step
        self.clock.at(PART_OF.get(place, OTHER))

    @property
    def doing(self) -> tuple[str, int]:
        """Place and step."""
        return self._place, self._step

    def stop(self, place: str) -> None:
        """Ends the watch; `place` is "done" or "failed"."""
        self.at(place)
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        self.beat()

    def beat(self) -> None:
        """Writes the heartbeat, over the last one: a full disk must not make this process look dead."""
        if self._folder is None:
            return
        self._number += 1
        place, step = self.doing
        said = {"token": self._token, "number": self._number, "place": place, "step": step, "pid": os.getpid()}
        said |= {"host": socket.gethostname(), "for": round(time.monotonic() - self._since, 1), "time": time.time()}
        text = json.dumps(said).ljust(LENGTH - 1) + "\n"
        with contextlib.suppress(OSError):  # it is the business of who saves there
            file = os.open(self._folder / f"{self._process}.json", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, text.encode(), 0)
            finally:
                os.close(file)

    def heard(self, process: int) -> dict[str, Any] | None:
        """The last heartbeat of a process; None if there is none of this start, or it is being rewritten."""
        assert self._folder is not None
        return self._read(self._folder / f"{process}.json")

    def _read(self, path: pathlib.Path) -> dict[str, Any] | None:
        try:
            said = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return said if isinstance(said, dict) and said.get("token") == self._token else None

    def _watch(self) -> None:
        """The thread: beats, listens to the next process and to verdicts, looks at the clock."""
        following = (self._process + 1) % len(self._hosts)
        number, changed, woke = -1, time.monotonic(), time.monotonic()
        while not self._over.wait(self.every):
            now = time.monotonic()
            if now - woke > self.silent:  # this process itself was stopped: the others had no time to speak
                self._since = changed = now
            woke = now
            self.beat()
            place, step = self.doing
            if place in LEFT:
                continue
            if self._folder is not None:
                if verdict := self._read(self._folder / "verdict.json"):
                    self._follow(verdict)
                    continue
                said = self.heard(following)
                if said is not None and (said["number"] != number or said["place"] in LEFT):
                    number, changed = said["number"], now
                if now - changed > self.silent:
                    if (blame := self.blame()).startswith(LOST):
                        self.end(f"nothing was heard of process {following} for {now - changed:.0f} s", blame)
                    changed = time.monotonic()  # a machine that is very busy: it came back
            limit = self._timeout * (1 if place in STEPS else PATIENT)
            if now - self._since > limit:
                self.end(f"no end of {place!r} at step {step} within {limit:g} s (run.step_timeout {self._timeout:g})")

    def end(self, reason: str, blame: str = "") -> NoReturn:
        """Finds out who is to blame, says so in a file that the others read, and leaves at once."""
        self.leave(self.tell(f"{reason}; {blame or self.blame()}", EXIT_CODE))

    def blame(self, seconds: float | None = None) -> str:
        """Who is lost or behind: heartbeats now and some time later, so that no two clocks are compared."""
        if self._folder is None:
            return "this is the only process" if len(self._hosts) == 1 else "without run.directory none can be named"
        everyone = range(len(self._hosts))
        before = [self.heard(process) for process in everyone]
        end = time.monotonic() + (4 * self.every if seconds is None else seconds)
        lost = list(everyone)
        while lost and time.monotonic() < end:
            time.sleep(self.every / 2)
            self.beat()
            after = {process: self.heard(process) or before[process] for process in lost}
            lost = [process for process in lost if not _alive(before[process], after[process])]
        last = [self.heard(process) or before[process] for process in everyone]
        return blamed(last, lost, self._hosts)

    def tell(self, sentence: str, code: int) -> dict[str, Any]:
        """Leaves the verdict for all others; returns that of the first who left one."""
        verdict = {"token": self._token, "sentence": sentence, "code": code, "process": self._process}
        if self._folder is None:
            return verdict
        path = self._folder / "verdict.json"
        try:
            with path.open("x") as file:  # two may know at once, and one sentence is to be said
                file.write(json.dumps(verdict) + "\n")
        except FileExistsError:
            for _ in range(10):  # it may still be being written
                if earlier := self._read(path):
                    return earlier
                time.sleep(self.every / 4)
        except OSError:  # nobody else will know; a full disk must not keep this one from ending
            pass
        return verdict

    def _follow(self, verdict: Mapping[str, Any]) -> None:
        """Another process ended the run. If this one meets the same error, it comes out by itself."""
        if verdict["code"] != EXIT_CODE and self._over.wait(self.grace):
            return
        self.leave(verdict)

    def all_failed(self) -> bool:
        """Whether all others come to fail as this one did, within the grace."""
        end = time.monotonic() + self.grace
        others = [process for process in range(len(self._hosts)) if process != self._process]
        while self._folder is not None and time.monotonic() < end:
            others = [p for p in others if (said := self.heard(p)) is None or said["place"] not in LEFT]
            if not others:
                return True
            time.sleep(self.every / 2)
        return False

    def leave(self, verdict: Mapping[str, Any]) -> NoReturn:
        """Stacks, one sentence, and out: the main thread hangs in a collective and hears nothing."""
        if self._stacks is not None:
            with contextlib.suppress(OSError):
                self._stacks.mkdir(parents=True, exist_ok=True)
                with (self._stacks / f"stacks-{self._process}.txt").open("w") as file:
                    faulthandler.dump_traceback(file=file, all_threads=True)
        again = "; the same command goes on" if verdict["code"] == EXIT_CODE else ""
        stacks = f" (stacks: {self._stacks})" if self._stacks is not None else ""
        print(f"stopped: {verdict['sentence']}{stacks}{again}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if self._process == 0 and self._folder is not None:
            time.sleep(4 * self.every)  # jax aborts the others when the first is gone: let them speak before
        os._exit(int(verdict["code"]))


def blamed(last: list[dict[str, Any] | None], lost: list[int], hosts: list[str]) -> str:
    """The end of a sentence that names whose fault it is.

    Args:
      last: heartbeats by process.
      lost: who has been silent.
      hosts: names by process.

    >>> beat = {"place": "update", "step": 7}
    >>> blamed([beat, {"place": "batch", "step": 7}], [], ["a", "b"])
    "process 1 (b) is behind, in 'batch' at step 7, and the others wait for it in 'update' at step 7"
    """

    def where(process: int) -> str:
        said = last[process]
        return f"in {said['place']!r} at step {said['step']}" if said else "before its first heartbeat"

    if lost:
        told = ", ".join(f"process {p} ({hosts[p]}), last {where(p)}" for p in lost)
        return f"{LOST}: {told}"
    order = [(said["step"], said["place"] != "batch") if said else (-1, False) for said in last]
    behind = [process for process, at in enumerate(order) if at == min(order)]
    if len(behind) == len(last):
        return f"all processes are alive and {where(0)}: look at the network between them, and at the stacks"
    told = ", ".join(f"process {p} ({hosts[p]})" for p in behind)
    ahead = next(process for process, at in enumerate(order) if at == max(order))
    return f"{told} is behind, {where(behind[0])}, and the others wait for it {where(ahead)}"


def _alive(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> bool:
    if after is None:
        return False
    return after["place"] in LEFT or before is None or after["number"] != before["number"]


class _Unwatched:
    """Ends nothing; the time is taken all the same."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def at(self, place: str, step: int | None = None) -> None:
        self.clock.at(PART_OF.get(place, OTHER))


_current: Watch | _Unwatched | None = None


@contextlib.contextmanager
def watching(
    directory: str | pathlib.Path | None, timeout: float, began: float | None = None
) -> Iterator[Watch | _Unwatched]:
    """Watches over what runs inside; within another watch it is that one. All processes enter together.

    Args:
      directory: of the run, shared by all processes, or None or "".
      timeout: `run.step_timeout`, seconds; 0: nothing is watched.
      began: when this life of the run began, on the clock of `time.perf_counter`; None: now.
    Raises: ValueError if the directory is not the same one on all processes; and what is raised inside, unless it came
      of another process's loss: then this one leaves with code 75, as the others do.
    """
    global _current
    if timeout < 0:
        raise ValueError(f"run.step_timeout is in seconds, 0 for none, got {timeout}")
    if _current is not None:
        yield _current
        _current.at("between stages")
        return
    clock = Clock(began)
    if not timeout:
        _current = _Unwatched(clock)
        try:
            yield _current
        finally:
            _current = None
        return
    several = jax.process_count() > 1
    heard = gather({"token": uuid.uuid4().hex, "host": socket.gethostname()})
    hosts = [one["host"] for one in heard]
    folder = pathlib.Path(directory).absolute() if directory else None
    watch = Watch(folder, timeout, heard[0]["token"], hosts, jax.process_index(), clock)
    if several and folder is not None:
        gather({})  # all have written their first heartbeat
        together("looking for each other in run.directory", lambda: _seen(watch, folder, len(hosts)))
    _current = watch
    watch.start()
    place = "done"
    try:
        yield watch
    except Preempted:
        raise
    except Exception as error:
        place = "failed"
        if several:
            _fail(watch, error)
        raise
    finally:
        _current = None
        watch.stop(place)


def _seen(watch: Watch, folder: pathlib.Path, count: int) -> None:
    """Raises ValueError unless the heartbeats of all are there; a file server may take its time."""
    end = time.monotonic() + min(watch.silent, 60.0)
    missing = list(range(count))
    while missing := [process for process in missing if watch.heard(process) is None]:
        if time.monotonic() > end:
            raise ValueError(
                f"{folder} holds no heartbeat of process {missing[0]}: run.directory must be one folder that all "
                "processes share, on a file server or a mounted bucket"
            )
        time.sleep(watch.every / 4)


def _fail(watch: Watch, error: Exception) -> None:
    """An error here. Did another process's loss bring it about, do all meet it, or must the others be told?"""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    place, step = watch.doing
    watch.at("failed")  # from now on nobody waits for this one, and its own clock is stopped
    if isinstance(error, jax.errors.JaxRuntimeError) and (blame := watch.blame(watch.silent)).startswith(LOST):
        watch.end(f"a collective broke off in {place!r} at step {step} ({first})", blame)
    code = USER_ERROR if isinstance(error, ValueError | OSError | ImportError) else 1
    me = f"process {jax.process_index()} ({socket.gethostname()})"
    verdict = watch.tell(f"an error on {me} at step {step}: {first}", code)
    if not watch.all_failed():  # jax would wait for the others on the way out, and then abort
        traceback.print_exception(error)
        watch.leave(verdict)
