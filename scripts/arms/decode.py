# SPDX-License-Identifier: Apache-2.0
"""Decoding, ours beside others: arms take turns; and ours alone: shared prompts, compilations, the roof-line."""

import json
import os
import statistics
import sys
from typing import Any

from arms.measure import Arms
from arms.shapes import SHAPES, Shape

WARM_UP = 1  # calls that are not counted: they compile
PROMPT, NEW, ROWS = 64, 128, 8
LONG, SHARED_NEW = 512, (1, 32, 128)  # tokens of the prompt that samples share, and those drawn of each


def ask(arms: Arms, name: str, **what: Any) -> dict[str, Any]:
    """One timed call of an arm."""
    given = {"what": "generate", "rows": ROWS, "length": PROMPT, "new": NEW, "samples": 1, "seed": 0}
    answer = arms.ask(name, json.dumps(given | what))
    print(f"{name} {what}: {answer['seconds']:.2f} s, {answer['cpu_seconds']:.2f} CPU s", file=sys.stderr, flush=True)
    return answer


def beside_others(arms: Arms, *, steps: int, length: int = PROMPT, new: int = NEW) -> dict[str, dict[str, Any]]:
    """Seconds of every arm for the same prompts, in turns, and the share of its tokens that are the first arm's.

    Args:
      arms: started.
      steps: timed calls of each, after one that is not.
      length: tokens of a prompt.
      new: tokens of each completion.
    Returns: name -> seconds, cpu_seconds, compiled (lists, one a call), alike, peak_gib, versions; or absent.
    """
    import numpy as np  # here, so that --help needs no numpy

    results: dict[str, dict[str, Any]] = {name: {"absent": why} for name, why in arms.absent.items()}
    for name in arms.processes:
        results[name] = {"seconds": [], "cpu_seconds": [], "compiled": [], "alike": []}
    for turn in range(WARM_UP + steps):
        tokens = {}
        for name in arms.processes:
            answer = ask(arms, name, seed=turn, length=length, new=new)
            tokens[name] = np.load(answer["tokens"])
            first = next(iter(tokens.values()))
            if tokens[name].shape != first.shape:
                raise ValueError(f"{name} drew {tokens[name].shape} tokens and {next(iter(tokens))} {first.shape}")
            results[name]["alike"].append(float(np.mean(tokens[name] == first)))
            if turn >= WARM_UP:
                for what in ("seconds", "cpu_seconds", "compiled"):
                    results[name][what].append(answer[what])
    return results


def shared_prompts(arms: Arms, *, steps: int, long: int, news: tuple[int, ...]) -> list[dict[str, Any]]:
    """8 samples of one prompt beside 8 prompts, in turns, for each number of new tokens."""
    found = []
    for new in news:
        seconds: dict[str, list[float]] = {"shared": [], "separate": []}
        for turn in range(1 + steps):
            for kind, how in (("shared", {"rows": 1, "samples": ROWS}), ("separate", {"rows": ROWS})):
                answer = ask(arms, "ours", seed=turn, length=long, new=new, **how)
                seconds[kind] += [answer["cpu_seconds"]] if turn else []
        found.append({"new": new} | seconds)
    return found


def roof_line(name: str, *, steps: int, new: int = NEW, batches: tuple[int, ...] = (1, 64)) -> list[dict[str, Any]]:
    """Tokens/s of the decoding loop by batch, and the share of what the memory's bandwidth allows.

    A step must read all weights, and keys and values of what is in the cache; those bytes over the bandwidth bound it.
    The time of a call with one new token is taken off: prompts are not decoded.
    """
    import time

    import jax
    import numpy as np

    from arms import decode_ours

    shape: Shape = SHAPES[name]
    bandwidth = bytes_per_second(jax.devices()[0].device_kind)
    found = []
    for batch in batches:
        generate = decode_ours.build(shape, batch)
        prompts = np.random.default_rng(0).integers(3, shape.V, (batch, PROMPT))
        seconds: dict[int, list[float]] = {1: [], new: []}
        for turn in range(2 + steps):
            for count in seconds:
                start = time.perf_counter()
                generate(prompts, count)
                seconds[count] += [time.perf_counter() - start] if turn >= 2 else []
        step = (statistics.median(seconds[new]) - statistics.median(seconds[1])) / (new - 1)
        size = jax.numpy.dtype(shape.dtype).itemsize
        attention = shape.D * shape.H * (2 * shape.N + 2 * shape.K)
        weights = size * (shape.L * (attention + 3 * shape.D * shape.F) + shape.D * shape.V)
        cache = size * 2 * shape.L * batch * shape.K * shape.H * (PROMPT + new // 2)
        found.append({"batch": batch, "rate": batch / step, "bytes": weights + cache, "step": step})
        if bandwidth is not None:
            found[-1]["share"] = (weights + cache) / bandwidth / step
        found[-1]["device"] = jax.devices()[0].device_kind
    return found


# Bytes a second of memory, from the vendors' data sheets.
_BANDWIDTHS = {
    "H200": 4.8e12,
    "H100 80GB HBM3": 3.35e12,
    "H100 PCIe": 2.0e12,
    "A100-SXM4-80GB": 2.04e12,
    "A100-SXM4-40GB": 1.56e12,
    "L4": 3.0e11,
    "TPU v4": 1.2e12,
    "TPU v5 lite": 8.1e11,
    "TPU v5p": 2.77e12,
    "TPU v6 lite": 1.64e12,
}


def bytes_per_second(kind: str) -> float | None:
    """Of the memory of a kind of device, as JAX calls it; None if the list has none."""
    return next((rate for name, rate in _BANDWIDTHS.items() if kind.endswith(name)), None)


def table(name: str, arm_names: list[str], *, steps: int, tunix_python: str | None) -> tuple[str, dict[str, Any]]:
    """Markdown, and the numbers that it is made of."""
    small = name == "tiny"  # for the tests
    length, new, long, news = (8, 8, 16, (1, 4)) if small else (PROMPT, NEW, LONG, SHARED_NEW)
    # Threads that wait without spinning, so that CPU seconds mean work on a busy machine too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["DECODE_SLOTS"] = str(ROWS)
    with Arms(arm_names, name, tunix_python=tunix_python, worker="arms.decode_worker") as arms:
        results = beside_others(arms, steps=steps, length=length, new=new)
        shared = shared_prompts(arms, steps=steps, long=long, news=news) if "ours" in arms.processes else []
        for arm in arms.processes:
            results[arm] |= arms.ask(arm, json.dumps({"what": "stop"}))
    lines = [
        f"| {name}, {ROWS} x {length} + {new} | seconds | range | CPU seconds | range | arm / first, wall | CPU "
        "| tokens alike | compiled | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    present = [arm for arm in results if "seconds" in results[arm]]
    for arm, result in results.items():
        if "absent" in result:
            lines.append(f"| {arm} | absent: {result['absent']} | | | | | | | | |")
            continue
        ratios = {}
        for what in ("seconds", "cpu_seconds"):
            pairs = zip(result[what], results[present[0]][what], strict=True)
            ratios[what] = statistics.median(mine / first for mine, first in pairs)
        wall, cpu = (f"{statistics.median(result[w]):.3g} | {span(result[w])}" for w in ("seconds", "cpu_seconds"))
        lines.append(
            f"| {arm} | {wall} | {cpu} | {ratios['seconds']:.2f} | {ratios['cpu_seconds']:.2f} "
            f"| {statistics.mean(result['alike']):.4f} | {sum(result['compiled'])} | {result['peak_gib']:.2f} |"
        )
    if shared:
        lines += ["", f"| {ROWS} samples of {long} tokens, new tokens | one prompt, CPU s | {ROWS} prompts, CPU s "
                  "| ratio | range |", "|---|---|---|---|---|"]  # fmt: skip
    for row in shared:
        ratios_ = [one / many for one, many in zip(row["shared"], row["separate"], strict=True)]
        one, many = statistics.median(row["shared"]), statistics.median(row["separate"])
        lines.append(f"| {row['new']} | {one:.2f} | {many:.2f} | {statistics.median(ratios_):.2f} | {span(ratios_)} |")
    return "\n".join(lines), {"arms": results, "shared": shared}


def span(values: list[float]) -> str:
    """Least and most."""
    return f"{min(values):.2f}-{max(values):.2f}"


def roof_table(name: str, rows: list[dict[str, Any]]) -> str:
    """The roof-line as Markdown."""
    lines = [f"| {name}: batch | tokens/s | ms a step | GB read a step | of the bandwidth |", "|---|---|---|---|---|"]
    for row in rows:
        share = f"{100 * row['share']:.0f} %" if "share" in row else f"unknown for {row['device']}"
        lines.append(
            f"| {row['batch']} | {row['rate']:.1f} | {1e3 * row['step']:.2f} | {row['bytes'] / 1e9:.3f} | {share} |"
        )
    return "\n".join(lines)
