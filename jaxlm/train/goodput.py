# SPDX-License-Identifier: Apache-2.0
"""Where the wall time of a run goes: every second in one part, the parts of all its lives added up.

    goodput = seconds in updates that count / wall seconds

A life is one process of the run, from its start to its end or death. What the host sees is what is measured:

step      an update was handed to the devices, or awaited: on accelerators the host runs one update ahead, so most of it
          is the host's wait for them
repeated  the same in updates that were lost with a life and done again; they do not count
init      from the start of the script to the first batch: imports, meeting the other processes, opening the data,
          making or loading parameters and state
compile   of the train step; whatever else is compiled counts where it is needed
data      the host waited for the next batch, or put it on the devices, and the devices had nothing to do. If they are
          still busy when the batch is there, it has cost nothing and the time is that of a step; if they ended in
          between, all of the wait counts as data, at most one step too much
evaluate  held-out records, before, on the way and after, with what they compile
save      what held the run up: the copy to the host, the wait for the save before, the last one until it is written
restore   reading a checkpoint and setting the data to where it stood
other     reports, traces, what a method does between its stages, the export

Every process has its clock; process 0 reports its own. It sees the late data of another one as step: its devices wait.
Not seen are the start of Python itself, the time between a life and the next, what a killed life did after its last
report, and what comes after the last one: drawing the page.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

MEASURED = ("step", "init", "compile", "data", "evaluate", "save", "restore", "other")
PARTS = ("step", "repeated", *MEASURED[1:])
OTHER = "other"
# What the places that the watchdog knows (`Watch.at`) are in this account; any other is OTHER.
PART_OF = {
    "start": "init",
    "prepare": "init",
    "batch": "data",
    "compile": "compile",
    "update": "step",
    "evaluate": "evaluate",
    "save": "save",
    "close": "save",
    "restore": "restore",
}


class Clock:
    """The seconds of this life by part; since one part ends where the next begins, they add up to its wall time.

    Args:
      began: when it began, on the clock `now`; None: now.
      now: seconds on a clock that never goes back.

    >>> ticks = iter([0.0, 0.0, 2.0, 5.0, 5.0])
    >>> clock = Clock(now=lambda: next(ticks))
    >>> clock.at("step")
    >>> spent = clock.record()
    >>> spent["parts"]["init"], spent["parts"]["step"], spent["wall"]
    (2.0, 3.0, 5.0)
    """

    def __init__(self, began: float | None = None, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._began = self._since = now() if began is None else began
        self._life = round(time.time() - (now() - self._began), 3)  # tells lives apart, and says when they began
        self._part = "init"
        self._seconds = dict.fromkeys(MEASURED, 0.0)

    def at(self, part: str) -> None:
        """From now on the time is that of `part`, one of MEASURED."""
        now = self._now()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def was(self, part: str) -> None:
        """The time since the last `at` turns out to have been that of `part`, and what comes now is too."""
        self._part = part

    def record(self) -> dict[str, Any]:
        """The life so far, as fields of an event: when it began (unix seconds), wall seconds, seconds by part."""
        self.at(self._part)
        parts = {part: round(seconds, 3) for part, seconds in self._seconds.items()}
        return {"life": self._life, "wall": round(self._now() - self._began, 3), "parts": parts}


class Goodput(NamedTuple):
    """What all lives of a run have spent.

    Attributes:
      seconds: by part, in the order of PARTS.
      lives: how many have reported.
      repeated: updates done again.
    """

    seconds: Mapping[str, float]
    lives: int
    repeated: int

    @property
    def wall(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """The goodput, in [0, 1]."""
        return self.seconds["step"] / self.wall if self.wall > 0 else 0.0

    def __str__(self) -> str:
        """One line.

        >>> print(Goodput({"step": 30.0, "compile": 8.0, "data": 2.0}, lives=1, repeated=0))
        goodput 75.0 %: 30.0 of 40.0 s in updates that count; compile 8.0, data 2.0 s
        """
        rest = {part: seconds for part, seconds in self.seconds.items() if part != "step" and seconds >= 0.05}
        told = "; " + ", ".join(f"{part} {seconds:,.1f}" for part, seconds in rest.items()) + " s" if rest else ""
        lives = f" ({self.lives} starts)" if self.lives > 1 else ""
        return (
            f"goodput {100 * self.share:.1f} %: {self.seconds['step']:,.1f} of {self.wall:,.1f} s in updates that "
            f"count{lives}{told}"
        )


def add_lives(events: Iterable[Mapping[str, Any]]) -> Goodput | None:
    """Adds up the lives of a run; None if nobody has reported.

    A life that goes on at step s makes the updates after s of all lives before it repeated ones: they were not saved.
    What they took is known exactly where a life has reported at step s, which it does whenever it saves.

    Args:
      events: of `metrics.jsonl`, in order; those named "goodput" are `Clock.record()` with a step.

    >>> said = {"name": "goodput", "life": 1.0}
    >>> first = [said | {"step": n, "parts": {"step": 2.0 * n, "init": 5.0}} for n in (0, 4, 6)]
    >>> second = [said | {"life": 9.0, "step": 4, "parts": {"step": 0.0, "init": 3.0}}]
    >>> found = add_lives(first + second)
    >>> found.seconds["step"], found.seconds["repeated"], found.seconds["init"], found.repeated
    (8.0, 4.0, 8.0, 2)
    """
    lives: dict[float, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("name") == "goodput":
            lives.setdefault(event["life"], []).append(event)
    if not lives:
        return None
    seconds = dict.fromkeys(PARTS, 0.0)
    repeated = 0
    kept: float = float("inf")  # the step that a later life went on from
    for records in reversed(lives.values()):
        first, last = records[0], records[-1]
        for part, value in last["parts"].items():
            seconds[part] += value
        if last["step"] > kept:
            before = [record for record in records if record["step"] <= kept]
            lost = last["parts"]["step"] - (before[-1]["parts"]["step"] if before else 0.0)
            seconds["step"] -= lost
            seconds["repeated"] += lost
            repeated += last["step"] - int(max(kept, first["step"]))
        kept = min(kept, first["step"])
    return Goodput(seconds, len(lives), repeated)
