# SPDX-License-Identifier: Apache-2.0
"""A trace of a few updates, by jax's own profiler: `run.profile=a:b` writes it to `<directory>/profile/from-a/`.

Only process 0 is traced, with its own devices: all processes run one program, a trace grows with the hosts, and every
collective that waits for another host shows in it.
"""

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple

import jax

FOLDER = "profile"  # in the run directory; jax makes plugins/profile/<time>/ below it, which its viewers look for
STEP = "update"  # the name of an update's span in the trace
AS = 'is "a:b" for the updates from a up to, and not with, b'


class Window(NamedTuple):
    """The updates `first` to `end - 1`, counted from 1 as the metrics count them."""

    first: int
    end: int


def read_window(profile: str, *, directory: str, last: int | None) -> Window | None:
    """What `run.profile` asks for; None for "".

    Args:
      profile: "a:b".
      directory: of the run, where the trace goes.
      last: the last update of the run; None: not known here.
    Raises: ValueError for anything that could not be traced.

    >>> read_window("20:23", directory="runs/a", last=100)
    Window(first=20, end=23)
    """
    if not profile:
        return None
    first, colon, end = profile.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal()):
        raise ValueError(f"run.profile {AS}, such as 20:23, got {profile!r}")
    window = Window(int(first), int(end))
    if window.first < 1:
        raise ValueError(f"run.profile={profile} begins with update 0: the first one is 1")
    if window.first >= window.end:
        raise ValueError(
            f"run.profile={profile} holds no update: it {AS}; {first}:{window.first + 1} is update {first} alone"
        )
    if last is not None and window.end > last + 1:
        raise ValueError(
            f"run.profile={profile} ends with update {window.end - 1}, the run with update {last}: choose b of at most "
            f"{last + 1}, or more run.steps"
        )
    if not directory:
        raise ValueError(f"run.profile={profile} needs a place for the trace: set run.directory, or profile=")
    return window


class Trace:
    """Traces the updates of a window; a context manager, so that the trace is closed and written on errors too.

    Args:
      window: of the run; None: nothing is traced, and updates are only named for a profiler started by hand.
      directory: of the run.
      step: the update that this stage goes on after. Of a window that has begun the rest is traced.
      drain: waits until the devices have done all updates. Called on all processes alike.
      tell: hears `(seconds, step=, updates=, ...)` once a trace is written, or could not be: the run goes on.
    """

    def __init__(
        self, window: Window | None, directory: str, step: int, *, drain: Callable[[], None], tell: Callable[..., None]
    ):
        self._folder = pathlib.Path(directory) / FOLDER
        self._drain, self._tell = drain, tell
        self._there: set[tuple[pathlib.Path, int]] = set()  # traces of earlier lives
        self._running, self._done, self._seconds = False, step, 0.0
        self._window = None
        if window is not None and step < window.end - 1:
            self._window = Window(max(window.first, step + 1), window.end)
        elif window is not None and jax.process_index() == 0 and not self._written():
            print(
                f"warning: run.profile={window.first}:{window.end} lies before step {step}, where this run goes on: "
                "nothing is traced",
                file=sys.stderr,
            )

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._running:
            self._stop()

    @contextlib.contextmanager
    def update(self, step: int) -> Iterator[None]:
        """Around the update `step`, with the wait for its batch."""
        if self._window is not None and step == self._window.first:
            self._drain()
            self._start()
        with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
            yield
        self._done = step
        if self._window is not None and step == self._window.end - 1:
            self._drain()
            self._stop()

    def _written(self) -> set[tuple[pathlib.Path, int]]:
        """Traces that are there, and when each was written: jax names them by the second."""
        return {(path, path.stat().st_mtime_ns) for path in self._folder.rglob("*.xplane.pb")}

    def _start(self) -> None:
        if jax.process_index() or self._window is None:
            return
        begin = time.perf_counter()
        self._there = self._written()
        try:
            jax.profiler.start_trace(self._folder / f"from-{self._window.first}")
        except (OSError, RuntimeError) as error:  # such as a trace that the caller has begun
            self._say(0.0, error=str(error))
            return
        self._running, self._seconds = True, time.perf_counter() - begin

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        begin = time.perf_counter()
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # the disk is full, say: no reason to end the run
            self._say(self._seconds + time.perf_counter() - begin, error=str(error))
            return
        seconds = self._seconds + time.perf_counter() - begin
        new = sorted(self._written() - self._there)
        if not new:
            self._say(seconds, error=f"jax has written no trace to {self._folder}")
            return
        path, _ = new[-1]
        self._say(seconds, path=path.relative_to(self._folder.parent).as_posix(), bytes=path.stat().st_size)

    def _say(self, seconds: float, **fields: str | int) -> None:
        assert self._window is not None
        asked = f"{self._window.first}:{self._window.end}"
        if "error" in fields:
            print(f"warning: the trace of updates {asked} was not written: {fields['error']}", file=sys.stderr)
        updates = f"{self._window.first}:{self._done + 1}"
        self._tell(seconds, step=self._done, updates=updates, **fields)
