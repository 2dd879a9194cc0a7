# SPDX-License-Identifier: Apache-2.0
"""What isolation adds to a training step: seconds of an update, of a choice of the held set, and bytes of state."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from arms import ours, shapes
from arms.shapes import Shape
from jaxlm.transforms import evolving_isolation, isolate
from jaxlm.weights.select import random_entries

FRACTION = 0.01
REFRESH_EVERY = 3  # of three updates one chooses, so that both kinds are seen under one load


def evolving(**kwargs: Any) -> Callable[[Any], Any]:
    """A wrapper of an optimizer."""
    return lambda tx: evolving_isolation(tx, fraction=FRACTION, warmup=1, refresh_every=REFRESH_EVERY, **kwargs)


ARMS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda tx: tx,
    "isolate, a given mask": lambda tx: isolate(tx, lambda params: random_entries(params, FRACTION), moments="dense"),
    "evolving, gradient": evolving(),
    "evolving, bfloat16": evolving(importance_dtype="bfloat16"),
    "evolving, adam_nu": evolving(importance_source="adam_nu"),
}


def table(name: str, shape: Shape, *, steps: int) -> str:
    """Medians over updates that take turns; the first row is what the others are compared with.

    Args:
      name: of the shape.
      shape: what is trained.
      steps: timed updates of each arm.
    """
    arms: dict[str, list[Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for arm, wrap in ARMS.items():
        _, state, step = ours.prepared(shape, wrap)
        batch = ours.batch_of(shape, next(shapes.batches(shape)))
        begin = time.perf_counter()
        compiled = step.lower(state, batch).compile()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - begin
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
        temporary = compiled.memory_analysis().temp_size_in_bytes
        rows[arm] = {"compile": seconds, "bytes": num_bytes, "temporary": temporary, "update": [], "choice": []}
        arms[arm] = [state, compiled]
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(arms["AdamW"][0].params))
    batches = shapes.batches(shape)
    for turn in range(1 + REFRESH_EVERY + steps):
        batch = ours.batch_of(shape, next(batches))
        kind = "choice" if turn % REFRESH_EVERY == 0 else "update"
        for arm, (state, compiled) in arms.items():
            begin = time.perf_counter()
            arms[arm][0], _ = jax.block_until_ready(compiled(state, batch))
            if turn > REFRESH_EVERY:
                rows[arm][kind].append(time.perf_counter() - begin)
    return lines(name, rows, num_parameters)


def lines(name: str, rows: dict[str, dict[str, Any]], num_parameters: int) -> str:
    """The table. Updates that choose are compared with those of AdamW in the same turns."""
    base = rows["AdamW"]
    step = statistics.median(base["update"])
    found = [
        f"| {name} | update, s | added | a choice, in updates | state over AdamW, bytes a parameter | temporary, MB "
        "| compile, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, row in rows.items():
        added = statistics.median([x / y - 1 for x, y in zip(row["update"], base["update"], strict=True)])
        extra = statistics.median([x - y for x, y in zip(row["choice"], base["choice"], strict=True)]) / step - added
        more = (row["bytes"] - base["bytes"]) / num_parameters
        cells = [arm, f"{statistics.median(row['update']):.3f}", f"{added:+.1%}"]
        cells += [f"{extra:.2f}" if arm.startswith("evolving") else "", f"{more:.2f}"]
        cells += [f"{row['temporary'] / 1e6:.0f}", f"{row['compile']:.1f}"]
        found.append("| " + " | ".join(cells) + " |")
    return "\n".join(found)
