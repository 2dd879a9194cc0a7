# SPDX-License-Identifier: Apache-2.0
"""The requests of a server in line for its one sampler: a single thread owns the device.

A call of the sampler takes the first request in line and all later ones that may share it, up to the sampler's slots.
Requests share a call if their sampling options are equal and their samples do not depend on their place in the batch:
those at temperature 0, those without a seed, and those that only score.  Others are alone in their call.
"""

import dataclasses
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.generate.engine import Sampling
from jaxlm.generate.sampler import Sampler


class Busy(Exception):
    """There is no place in line: `seconds` later there may be."""

    seconds = 1


class Stopping(Exception):
    """The server takes no more requests."""


class _HungUp(Exception):
    """Nobody waits for what is being sampled."""


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
      seeded: whether `sampling.seed` is the client's; else each call draws one.
      streams: whether new text is told.
    Attributes:
      events: what comes of it; the last is "done", with lists of completions or arrays of log-probs, or "error".
      cancelled: set it when nobody waits any more.
    """

    def __init__(self, prompts: list[np.ndarray], sampling: Sampling | None, *, seeded: bool, streams: bool):
        self.prompts, self.sampling, self.seeded, self.streams = prompts, sampling, seeded, streams
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.cancelled = threading.Event()

    @property
    def num_samples(self) -> int:
        return len(self.prompts) * (1 if self.sampling is None else self.sampling.num_samples)

    def shares(self) -> Hashable:
        """Equal for requests that may share a call."""
        if self.sampling is None:
            return "score"
        if self.sampling.temperature == 0:  # nothing is drawn: the other options change nothing
            s = self.sampling
            return Sampling(num_samples=s.num_samples, max_tokens=s.max_tokens, temperature=0.0, stop=s.stop)
        return id(self) if self.seeded else dataclasses.replace(self.sampling, seed=0)


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
        while batch := self._next():
            try:
                self._run(batch)
            except _HungUp:
                for work in batch:
                    work.events.put(Event("error", Stopping("the server stopped before the answer was complete")))
            except Exception as error:  # the thread must outlive whatever one batch does to the sampler
                for work in batch:
                    work.events.put(Event("error", error))

    def _next(self) -> list[Work]:
        """Waits for requests that share a call; none when the server stops."""
        with self._change:
            while True:
                self._waiting = deque(work for work in self._waiting if not work.cancelled.is_set())
                if self._stopping:
                    return []
                if self._waiting:
                    break
                self._change.wait()
            batch = [self._waiting.popleft()]
            share, room = batch[0].shares(), self._sampler.num_slots - batch[0].num_samples
            for work in list(self._waiting):
                if work.shares() == share and work.num_samples <= room:
                    room -= work.num_samples
                    batch.append(work)
                    self._waiting.remove(work)
            return batch

    def _run(self, batch: list[Work]) -> None:
        prompts = [prompt.tolist() for work in batch for prompt in work.prompts]
        sampling = batch[0].sampling
        if sampling is None:
            found: list[Any] = self._sampler.score([p[:1] for p in prompts], [p[1:] for p in prompts])
        else:
            if not batch[0].seeded:
                sampling = dataclasses.replace(sampling, seed=random.getrandbits(31))
            places = [(work, i) for work in batch for i in range(len(work.prompts))]

            def said(prompt: int, sample: int, text: str) -> None:
                if all(work.cancelled.is_set() for work in batch) or time.monotonic() > self._until:
                    raise _HungUp
                work, i = places[prompt]
                if work.streams:
                    work.events.put(Event("text", text, i, sample))

            found = self._sampler.sample(prompts, sampling, stream=said)
        for work in batch:
            mine, found = found[: len(work.prompts)], found[len(work.prompts) :]
            work.events.put(Event("done", mine))
