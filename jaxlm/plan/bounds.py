# SPDX-License-Identifier: Apache-2.0
"""From FLOPs and bytes to time and MFU, at the rates that vendors publish: what no run on such chips can exceed."""

import collections
from collections.abc import Iterable
from typing import NamedTuple

from jaxlm.nn.flops import model_flops
from jaxlm.plan.hlo import Collective
from jaxlm.plan.outline import Outline
from jaxlm.train.chips import Chip


class Bounds(NamedTuple):
    """Of one step, on one device.

    Attributes:
      compute: seconds of its matrix products at the dense bf16 peak, recomputation included.
      collective: seconds of its collectives at the bandwidth of the links.
      overlapped: MFU if all collectives hide behind products, or products behind collectives.
      apart: MFU if none does.
    """

    compute: float
    collective: float
    overlapped: float
    apart: float


def training_flops(outline: Outline, *, executed: bool) -> float:
    """FLOPs of one update over all devices: three forward passes' worth, and with `executed` what remat adds.

    "full" runs every layer forward twice (the head once), but for its last product, unless a norm reads that; of the
    others only attention may run again, which is left out. LoRA does not make gradients of the kernels: a product less
    for each.
    """
    config, batch = outline.model.config, outline.batch["tokens"]
    rows, length = batch.shape
    forward = model_flops(config, tokens=rows * length, length=length)
    head = 2.0 * rows * length * config.width * config.vocab_size
    last = 0.0 if config.norm_placement in ("post", "both") else 2.0 * config.mlp_size * config.width
    again = forward - head - rows * length * config.num_layers * last
    return 3 * forward + (again if executed and config.remat == "full" else 0.0)


def mfu_bounds(
    outline: Outline, chip: Chip, collectives: Iterable[Collective], *, flops: float, share: float = 1.0
) -> Bounds:
    """The bounds.

    Args:
      outline: of the run; its model's FLOPs are what MFU counts.
      chip: whose published rates are used.
      collectives: of the compiled step; those of branches that not every step takes are left out.
      flops: that one device executes in a step.
      share: of the collectives' bytes that are sent. The CPU backend sends twice what an accelerator does where the
        computation is bfloat16: float32 for kernels and activations, and whole gradients where others scatter them.
    """
    compute = flops / (chip.tflops * 1e12)
    rates = {False: chip.link_gb_s * 1e9, True: chip.beyond_gb_s * 1e9}
    collective = share * sum(c.times * c.sent / rates[c.leaves(chip.joined)] for c in collectives if not c.sometimes)
    ideal = training_flops(outline, executed=False) / outline.mesh.size / (chip.tflops * 1e12)
    return Bounds(compute, collective, ideal / max(compute, collective), ideal / (compute + collective))


def by_kind(collectives: Iterable[Collective]) -> dict[str, tuple[int, float, float]]:
    """Kind -> (how many run in a step, bytes of their arrays, bytes that leave a device); branches left out."""
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for one in collectives:
        if not one.sometimes:
            for index, value in enumerate((1, one.payload, one.sent)):
                sums[one.kind][index] += one.times * value
    return {kind: (int(count), payload, sent) for kind, (count, payload, sent) in sorted(sums.items())}
