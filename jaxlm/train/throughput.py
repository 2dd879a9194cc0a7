# SPDX-License-Identifier: Apache-2.0
"""What the devices could do, what share of it a run uses, and how much memory it took.

MFU is model FLOP/s over peak FLOP/s. The peak is the vendor's dense bf16 rate, never the sparse one; a device that is
not in the table is measured, and the result says so.
"""

import re
import resource
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.train.chips import CHIPS

# Dense bf16 TFLOP/s of one JAX device, by `device_kind`; the first match counts. Vendors' data sheets.
PEAK_TFLOPS = (
    (r"TPU v4", 275.0),
    (r".*A100.*", 312.0),
    (r".*H100 PCIe.*", 756.0),
    (r".*H100 NVL.*", 835.0),
    (r".*B200.*", 2250.0),
    *((chip.kinds, chip.tflops) for chip in CHIPS.values()),
)


class Peak(NamedTuple):
    """What all devices of a run could do together.

    Attributes:
      flops: FLOP/s.
      name: says which peak this is, for reports: `8 x TPU v4, dense bf16, 2200 TFLOP/s`.
    """

    flops: float
    name: str


def peak(devices: Sequence[jax.Device], *, tflops: float | None = None) -> Peak:
    """The peak that MFU is reckoned with.

    Args:
      devices: of the run, over all processes.
      tflops: of one device, where the user states it; None looks the device up, or measures it.

    CPU devices share one machine, however many there are, so a measured rate counts once a process.
    """
    kind = devices[0].device_kind
    if tflops is not None:
        if tflops <= 0:
            raise ValueError(f"run.peak_tflops must be above 0, got {tflops}")
        return _stated(len(devices), tflops, f"{len(devices)} x {kind}, as stated")
    for pattern, known in PEAK_TFLOPS:
        if re.fullmatch(pattern, kind):
            return _stated(len(devices), known, f"{len(devices)} x {kind}, dense bf16")
    machines = len({d.process_index for d in devices}) if devices[0].platform == "cpu" else len(devices)
    local = next(d for d in devices if d.process_index == jax.process_index())
    return _stated(machines, matmul_rate(local) / 1e12, f"{machines} x {kind}, measured float32 matmul")


def _stated(count: int, tflops: float, what: str) -> Peak:
    return Peak(count * tflops * 1e12, f"{what}, {count * tflops:.4g} TFLOP/s")


def matmul_rate(device: jax.Device, *, size: int = 1024, repeats: int = 8) -> float:
    """FLOP/s of a square float32 product on one device, the best of a few tries."""
    square = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(square, square).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def utilisation(flops_per_second: float, peak: Peak) -> float:
    """MFU, a share in [0, 1].

    Raises: ValueError above 1: then the count of FLOPs or the peak is wrong.

    >>> utilisation(55e12, Peak(275e12, "1 x TPU v4"))
    0.2
    """
    share = flops_per_second / peak.flops
    if share > 1:
        raise ValueError(
            f"MFU of {100 * share:.0f} % is impossible: {flops_per_second / 1e12:.4g} TFLOP/s against a peak of "
            f"{peak.name}; set run.peak_tflops to what one device can do"
        )
    return share


def memory_gib() -> float:
    """The most memory used so far: of the fullest local device where it tells, else of this process. GiB."""
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
