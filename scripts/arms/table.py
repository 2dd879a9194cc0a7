# SPDX-License-Identifier: Apache-2.0
"""Measurements as a Markdown table."""

import statistics
from typing import Any


def markdown(shape: str, results: dict[str, dict[str, Any]]) -> str:
    """Medians with quartiles, ratios of the first arm that is there to each of the others, peak memory, MFU.

    >>> print(markdown("tiny", {"a": {"seconds": [1, 2, 3], "cpu_seconds": [2, 2, 2], "peak_gib": 1.0, "loss": [4.0]},
    ...                         "b": {"absent": "no b"}}))
    | tiny | seconds | quartiles | CPU seconds | a / arm | CPU ratio | peak GiB | last loss |
    |---|---|---|---|---|---|---|---|
    | a | 2.000 | 1.000-3.000 | 2.000 | 1.00 | 1.00 | 1.00 | 4.00000 |
    | b | absent: no b | | | | | | |
    """
    present = [name for name, result in results.items() if "seconds" in result]
    leader = present[0] if present else "first"
    first = results.get(leader, {})
    lines = [
        f"| {shape} | seconds | quartiles | CPU seconds | {leader} / arm | CPU ratio | peak GiB | last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, result in results.items():
        if "absent" in result:
            lines.append(f"| {name} | absent: {result['absent']} | | | | | | |")
            continue
        median, cpu = statistics.median(result["seconds"]), statistics.median(result["cpu_seconds"])
        low, _, high = statistics.quantiles(result["seconds"], n=4) if len(result["seconds"]) > 1 else (median,) * 3
        wall_ratio = statistics.median(first["seconds"]) / median
        cpu_ratio = statistics.median(first["cpu_seconds"]) / cpu
        lines.append(
            f"| {name} | {median:.3f} | {low:.3f}-{high:.3f} | {cpu:.3f} | {wall_ratio:.2f} | {cpu_ratio:.2f} | "
            f"{result.get('device_gib', result['peak_gib']):.2f} | {result['loss'][-1]:.5f} |"
        )
        if "flops" in result:
            rate = result["flops"] / median
            notes.append(
                f"\nMFU of {name}: {100 * rate / result['peak_flops']:.1f} % ({rate / 1e12:.4g} TFLOP/s of "
                f"{result['peak_name']}; causal attention counted: each token's products with the keys it sees)"
            )
    return "\n".join(lines + notes)
