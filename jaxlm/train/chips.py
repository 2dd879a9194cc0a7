# SPDX-License-Identifier: Apache-2.0
"""What one accelerator holds and can do, as its vendor publishes it: the one table that MFU and plans read. No jax."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One JAX device.

    Attributes:
      kinds: what its `device_kind` matches, a full match.
      tflops: dense bf16 TFLOP/s, never the sparse rate.
      memory_gb: HBM, 10^9 bytes; the runtime takes some of it for itself.
      memory_gb_s: HBM bandwidth, GB/s.
      link_gb_s: what leaves a chip over all of its links to other chips, one direction, GB/s. A ring along one axis of
        a torus uses only that axis's links: bounds from this number are optimistic.
      joined: chips that those links join; 0: any number that can be had.
      beyond_gb_s: what leaves a chip to those further away, one direction, GB/s.
      source: of the numbers.
    """

    kinds: str
    tflops: float
    memory_gb: float
    memory_gb_s: float
    link_gb_s: float
    joined: int
    beyond_gb_s: float
    source: str


CHIPS = {
    # The page gives the interconnect of a chip in both directions together: half of it leaves.
    "v5e": Chip("TPU v5 lite|TPU v5e", 197.0, 16.0, 819.0, 200.0, 256, 3.1, "docs.cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip("TPU v5p?", 459.0, 102.0, 2765.0, 600.0, 6144, 6.25, "docs.cloud.google.com/tpu/docs/v5p: 95 GiB"),
    "v6e": Chip("TPU v6 lite|TPU v6e", 918.0, 32.0, 1638.0, 400.0, 256, 12.5, "docs.cloud.google.com/tpu/docs/v6e"),
    # SXM; NVLink's 900 GB/s are both directions. Beyond the eight of a node: one 400 Gb/s adapter a GPU (DGX H100).
    "h100": Chip(".*H100.*", 989.0, 80.0, 3350.0, 450.0, 8, 50.0, "nvidia.com/en-us/data-center/h100, DGX H100"),
    "h200": Chip(".*H200.*", 989.0, 141.0, 4800.0, 450.0, 8, 50.0, "nvidia.com/en-us/data-center/h200, DGX H200"),
}


def find_chip(name: str) -> Chip:
    """The chip of that name. Raises: ValueError that lists those there are."""
    if name not in CHIPS:
        raise ValueError(
            f"there are no published numbers for a chip {name!r}: choose one of {', '.join(CHIPS)}, or add a row to "
            "CHIPS in jaxlm/train/chips.py"
        )
    return CHIPS[name]
