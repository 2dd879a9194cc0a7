# SPDX-License-Identifier: Apache-2.0
"""Attention with HoPE beside attention with RoPE, through one dispatcher: seconds and memory by length."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn.attention import attend, place_and_mix
from jaxlm.nn.config import attention_config
from jaxlm.nn.position_kinds import Alibi, Hope, Positions, Rope

HEADS, WIDTH = 4, 64
RATE = 0.001  # of the fastest channel; 16,384 tokens of it lie within what folding reaches
HOPE = Hope(theta_scale=RATE, damping="per_pair")


def positioned(positions: Positions, implementation: str) -> Callable[..., Any]:
    """What a layer does between its projections: place queries and keys, attend."""
    config = attention_config(HEADS * WIDTH, num_heads=HEADS, positions=positions, attention=implementation)
    return lambda query, key, value: place_and_mix({}, query, key, value, config)


def arms() -> dict[str, tuple[Callable[..., Any], int]]:
    """Name -> function, and the longest row that it is asked for; the first is what ratios mean."""
    fused = "cudnn" if jax.default_backend() == "gpu" else "xla"
    own = "pallas" if jax.default_backend() == "tpu" else "tiled"
    found = {
        "RoPE": (positioned(Rope(), fused), 16_384),
        "HoPE, folded": (positioned(HOPE, fused), 16_384),
        "ALiBi": (positioned(Alibi(), "xla"), 16_384),
        f"RoPE, {own}": (positioned(Rope(), own), 65_536),
        f"HoPE, {own}": (positioned(HOPE, own), 65_536),
        "jax.nn, no positions": (jax_nn, 4_096),
        "no positions": (lambda q, k, v: attend(q, k, v), 16_384),
    }
    return found


def jax_nn(query: Any, key: Any, value: Any) -> Any:
    """The attention that comes with JAX, by its own choice of implementation."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def table(*, lengths: tuple[int, ...], steps: int) -> str:
    """Markdown: medians over runs that take turns, forward and with gradients; temporary memory of the gradient.

    Args:
      lengths: tokens of the one row.
      steps: timed runs of each arm at each length, after one that is not.
    """
    device = jax.devices()[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    lines = [
        f"One row, {HEADS} heads of {WIDTH}, {dtype.__name__}, on {device.device_kind}; medians of {steps}.",
        "",
        "| tokens | arm | forward, s | x RoPE | with gradients, s | x RoPE | spread | temporary, MiB | compile, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for length in lengths:
        rows = _measure(length, dtype, steps)
        first = next(iter(rows.values()))
        for name, row in rows.items():
            forward, both = (statistics.median(row[what]) for what in ("forward", "both"))
            first_forward, first_both = (statistics.median(first[what]) for what in ("forward", "both"))
            spread = (max(row["both"]) - min(row["both"])) / both
            lines.append(
                f"| {length:,} | {name} | {forward:.4f} | {forward / first_forward:.2f} | {both:.4f} "
                f"| {both / first_both:.2f} | {spread:.0%} | {row['temporary'] / 2**20:.1f} | {row['compile']:.1f} |"
            )
    return "\n".join(lines)


def _measure(length: int, dtype: Any, steps: int) -> dict[str, dict[str, Any]]:
    keys = jax.random.split(jax.random.key(0), 4)
    *inputs, cotangent = (jax.random.normal(key, (1, length, HEADS, WIDTH), dtype) for key in keys)
    compiled, rows = {}, {}
    for name, (function, longest) in arms().items():
        if length > longest:
            continue

        def both(query: Any, key: Any, value: Any, cotangent: Any, function: Any = function) -> Any:
            out, pull = jax.vjp(function, query, key, value)
            return out, pull(cotangent)

        begin = time.perf_counter()
        gradient = jax.jit(both).lower(*inputs, cotangent).compile()
        seconds = time.perf_counter() - begin
        forward = jax.jit(function).lower(*inputs).compile()
        memory: Any = gradient.memory_analysis()
        rows[name] = {"compile": seconds, "temporary": memory.temp_size_in_bytes, "forward": [], "both": []}
        compiled[name] = {"forward": (forward, inputs), "both": (gradient, [*inputs, cotangent])}
    for turn in range(1 + steps):
        for name, programs in compiled.items():
            for what, (program, arguments) in programs.items():
                begin = time.perf_counter()
                jax.block_until_ready(program(*arguments))
                if turn:
                    rows[name][what].append(time.perf_counter() - begin)
    return rows
