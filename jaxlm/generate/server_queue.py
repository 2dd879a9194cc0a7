# SPDX-License-Identifier: Apache-2.0
"""The requests of a server in line for its one sampler: a single thread owns the device.

They run in one session of the sampler: each prompt has its own options and seed, and gets what `Sampler.sample` would
give it.  A request leaves the line once the session has a slot for it; between two chunks of tokens those that only
score are answered, and those whose clients left give their slots back.
"""

import dataclasses
import queue
import random
import threading
import time
from collections import deque
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.generate.engine import Completion, Sampling
from jaxlm.generate.sampler import Sampler
from jaxlm.generate.session import Session


class Busy(Exception):
    """There is no place in line: `seconds` later there may be."""

    seconds = 1


class Stopping(Exception):
    """The server takes no more requests."""


class Event(NamedTuple):
    """What has come of a request: new text of a sample, the whole result, or the error that ended it."""

    kind: Literal["text", "done", "error"]
    value: Any
    prompt: int = 0
    sample: int = 0


class Work:
    """A request in line.

    Args:
      prompts: int32 [n] each.
      sampling: how; None scores the prompts themselves.
      seeded: whether `sampling.seed` is the client's; else one is drawn.
      streams: whether new text is told.
    Attributes:
      events: what comes of it; the last is "done", with lists of completions or arrays of log-probs, or "error".
      cancelled: set it when nobody waits any more.
    """

    def __init__(self, prompts: list[np.ndarray], sampling: Sampling | None, *, seeded: bool, streams: bool):
        self.prompts, self.sampling, self.seeded, self.streams = prompts, sampling, seeded, streams
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.cancelled = threading.Event()


class DeviceQueue:
    """The line, and the thread that serves it.

    Args:
      sampler: used by this thread alone.
      most: requests that may wait.
    """

    def __init__(self, sampler: Sampler, *, most: int = 1024):
        self._sampler, self._most = sampler, most
        self._waiting: deque[Work] = deque()
        self._change = threading.Condition()
        self._stopping = False
        self._until = float("inf")  # when what runs is broken off
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are being served."""
        return self._thread.is_alive() and not self._stopping

    def put(self, work: Work) -> None:
        """Gets in line. Raises: Busy, Stopping."""
        with self._change:
            if self._stopping:
                raise Stopping("the server is stopping: ask another one")
            if len(self._waiting) >= self._most:
                raise Busy(f"{self._most} requests are waiting already: try again")
            self._waiting.append(work)
            self._change.notify()

    def close(self, grace_seconds: float) -> None:
        """Refuses those in line, lets those that run end within the grace."""
        with self._change:
            self._stopping, self._until = True, time.monotonic() + grace_seconds
            for work in self._waiting:
                work.events.put(Event("error", Stopping("the server is stopping: ask another one")))
            self._change.notify()
        self._thread.join(grace_seconds)

    def _serve(self) -> None:
        while True:
            run = _Run(self._sampler)
            try:
                while self._turn(run):
                    pass
                return
            except Exception as error:  # the thread must outlive whatever a request does to the sampler
                run.fail(error)

    def _turn(self, run: "_Run") -> bool:
        """One look at the line and one step of what runs; False when the server stops."""
        with self._change:
            while True:
                self._waiting = deque(work for work in self._waiting if not work.cancelled.is_set())
                if self._waiting or not run.idle or self._stopping:
                    break
                self._change.wait()
            scores = [] if self._stopping else [work for work in self._waiting if work.sampling is None]
            for work in scores:
                self._waiting.remove(work)
            run.drop_cancelled()
            while self._waiting and run.session.num_free and not self._stopping:
                run.begin(self._waiting.popleft())
            stopping, late = self._stopping, time.monotonic() > self._until
        if stopping and (run.idle or late):
            run.fail(Stopping("the server stopped before the answer was complete"))
            return False
        if scores:
            run.score(scores)
        run.step()
        return True


class _Run:
    """A session and the requests that are in it."""

    def __init__(self, sampler: Sampler):
        self._sampler, self.session = sampler, Session(sampler)
        self._works: dict[Work, dict[int, int]] = {}  # to ticket -> place of the prompt
        self._found: dict[Work, dict[int, list[Completion]]] = {}

    @property
    def idle(self) -> bool:
        return not self._works

    def begin(self, work: Work) -> None:
        """All prompts of a request get in the session's line."""
        assert work.sampling is not None
        sampling = work.sampling
        if not work.seeded:
            sampling = dataclasses.replace(sampling, seed=random.getrandbits(31))
        self._works[work], self._found[work] = {}, {}
        for i, prompt in enumerate(work.prompts):

            def said(sample: int, text: str, i: int = i) -> None:
                work.events.put(Event("text", text, i, sample))

            ticket = self.session.submit(prompt.tolist(), sampling, place=i, stream=said if work.streams else None)
            self._works[work][ticket] = i

    def drop_cancelled(self) -> None:
        """Frees the slots of those who left."""
        for work in [work for work in self._works if work.cancelled.is_set()]:
            self._end(work)

    def step(self) -> None:
        """A chunk of tokens; tells those that are complete."""
        owners = {ticket: work for work, tickets in self._works.items() for ticket in tickets}
        for ticket, completions in self.session.step():
            work = owners[ticket]
            self._found[work][self._works[work][ticket]] = completions
            if len(self._found[work]) == len(work.prompts):
                work.events.put(Event("done", [self._found[work][i] for i in range(len(work.prompts))]))
                self._end(work)

    def score(self, works: list[Work]) -> None:
        """Answers those that score."""
        prompts = [prompt.tolist() for work in works for prompt in work.prompts]
        try:
            found: list[Any] = self._sampler.score([p[:1] for p in prompts], [p[1:] for p in prompts])
        except Exception as error:  # theirs alone
            for work in works:
                work.events.put(Event("error", error))
            return
        for work in works:
            mine, found = found[: len(work.prompts)], found[len(work.prompts) :]
            work.events.put(Event("done", mine))

    def fail(self, error: Exception) -> None:
        """Tells all who are in the session that they get nothing."""
        for work in list(self._works):
            work.events.put(Event("error", error))
            self._end(work)

    def _end(self, work: Work) -> None:
        for ticket in self._works.pop(work):
            self.session.cancel(ticket)
        del self._found[work]
