# SPDX-License-Identifier: Apache-2.0
"""What one train step holds beside its state, on one device, as a model of the step.

t tokens of a micro-batch on the device, D width, F inner width, N query heads, K key heads, H head width, V vocabulary;
F, N, K and V are the device's share where tensor divides them.
"""

import math
from typing import NamedTuple

from jaxlm.kernels.blocked_attention import MAX_BLOCKS
from jaxlm.kernels.cross_entropy import CHUNK, CPU_CHUNK
from jaxlm.nn.attention import TILED_FROM
from jaxlm.nn.config import ModelConfig

FLOAT32 = 4


class Work(NamedTuple):
    """The sizes that decide.

    Attributes:
      config: of the model.
      rows: of a micro-batch on one device.
      length: tokens of a row that the device holds: of a piece, where tokens are divided.
      sequence: devices that divide the tokens of a row.
      tensor: devices that divide heads, inner width and vocabulary.
      divided: whether parameters are gathered before they are used (fsdp or sequence above 1).
      on_cpu: the step as the CPU backend builds it: smaller chunks of logits, all score blocks at once.
    """

    config: ModelConfig
    rows: int
    length: int
    sequence: int
    tensor: int
    divided: bool
    on_cpu: bool

    @property
    def tokens(self) -> int:
        """t."""
        return self.rows * self.length

    @property
    def item(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.config.dtype == "bfloat16" else FLOAT32

    @property
    def heads(self) -> tuple[float, float]:
        """Width of queries, N * H, and of keys, K * H, on the device."""
        config = self.config
        return config.num_heads * config.head_size / self.tensor, config.kv_heads * config.head_size / self.tensor

    @property
    def inner(self) -> float:
        """F on the device."""
        return self.config.mlp_size / self.tensor


def saved_width(work: Work, remat: str, *, adapted: bool = False) -> float:
    """Numbers a token that the forward pass of one layer leaves for the backward pass.

        full: x            what enters the layer, D
        dots: x, query, key, value, out, gate and up: D + NH + 2 KH + D + 2F
        none: the same and the attention's result and its log-sums: + NH + N / item

    Args:
      work: the sizes.
      remat: of `ModelConfig`.
      adapted: LoRA's products beside the kernels' are products too: with "dots" both are kept.
    """
    config = work.config
    queries, keys = work.heads
    width = float(config.width)
    if remat == "full":
        return width
    products = queries + 2 * keys + config.width + (2 if config.gated else 1) * work.inner
    if config.norm_placement != "pre":
        products += config.width  # the norm behind a branch is made again from what the branch gave
    width += products * (2 if adapted and remat == "dots" else 1)
    if remat == "none":
        width += queries + config.num_heads / work.tensor * FLOAT32 / work.item
        if config.query_key_norm != "none":
            width += queries + keys  # before the norm, beside what the attention saves
    return width


def saved(work: Work, *, adapted: bool = False) -> float:
    """Bytes that the forward pass of all layers leaves for the backward pass."""
    config = work.config
    return config.num_layers * work.tokens * saved_width(work, config.remat, adapted=adapted) * work.item


# Arrays of one layer's backward pass that are alive together, counted in the buffers of compiled CPU steps
# (docs/benchmarks/plan.md), which write down much that an accelerator fuses.
WIDE, INNER, MIXED = 7.0, 4.5, 2.0
WHOLE = 1.0  # of the keys and values of whole rows, where tokens are divided: how often they lie gathered
GATHERED = 1.0  # of a layer's kernels: how often they lie gathered at one time
UPDATED = 1.0  # float32 numbers a trained entry that the optimizer writes down beside gradients and state


def layer(work: Work, *, trains: bool = True) -> float:
    """Bytes that the backward pass of one layer holds at its fullest, beside what is saved and the gradients.

    That is in the feed-forward branch: the residual stream before and inside the layer with their cotangents and what
    the norms keep (WIDE of width D), the two products, what is made of them and their cotangents (INNER of width F),
    queries, keys, values and their copies for the attention (MIXED of width NH + 2 KH), what remat makes again, the
    scores of a block, the kernels of the layer gathered, and the largest gradient of one before it is divided again.

    Args:
      work: the sizes.
      trains: whether the kernels have a gradient.
    """
    config = work.config
    queries, keys = work.heads
    wide = WIDE * config.width + INNER * work.inner + MIXED * (queries + 2 * keys)
    wide += max(0.0, saved_width(work, "none") - saved_width(work, config.remat))
    largest = config.width * max(work.inner, queries) if trains else 0.0
    kernels = 2 * config.width * (queries + keys) + (3 if config.gated else 2) * config.width * work.inner
    gathered = GATHERED * kernels * work.item if work.divided else 0.0
    return work.tokens * wide * work.item + scores(work) + whole_keys(work) + gathered + largest * FLOAT32


def whole_keys(work: Work) -> float:
    """Bytes of keys and values of whole rows, where tokens are divided: gathered, and their gradients in float32."""
    if work.sequence == 1:
        return 0.0
    numbers = 2 * work.heads[1] * work.tokens * work.sequence
    return numbers * (WHOLE * work.item + FLOAT32)


def scores(work: Work) -> float:
    """Bytes of the attention's scores in float32: of one block of queries, or of all where CPU makes them early."""
    config = work.config
    heads = config.num_heads / work.tensor
    tiled = config.attention == "auto" and (work.length >= TILED_FROM or work.sequence > 1)
    if tiled or config.attention in ("tiled", "pallas", "cudnn"):
        return 2 * work.rows * heads * 128 * 128 * FLOAT32
    block = max(64, -(-work.length // (MAX_BLOCKS * 64)) * 64)
    blocks = [(min(start + block, work.length) - start) * min(start + block, work.length)
              for start in range(0, work.length, block)]  # fmt: skip
    return work.rows * heads * (sum(blocks) if work.on_cpu else 2 * max(blocks)) * FLOAT32


def head(work: Work, *, trains: bool = True) -> float:
    """Bytes of the head and the loss at their fullest: a chunk of logits, the head gathered, its gradient.

    Args:
      work: the sizes.
      trains: whether the head has a gradient; its cotangent is made all the same.
    """
    config = work.config
    vocabulary = config.vocab_size / work.tensor
    chunk = CPU_CHUNK if work.on_cpu else CHUNK
    count = math.ceil(work.length / max(1, chunk // work.rows))
    rows = work.rows * math.ceil(work.length / count)
    logits = rows * vocabulary * (2 * FLOAT32 + 1)  # logits, their exponentials, a mask
    kernel = config.width * vocabulary
    gathered = kernel * work.item if work.divided or config.tied or work.item != FLOAT32 else 0.0
    gradient = kernel * FLOAT32 if trains else 0.0
    fullest = max(logits, rows * vocabulary * FLOAT32 + gradient)  # then only their cotangents, and its share of it
    hidden = 3 * work.tokens * config.width * work.item
    return fullest + gathered + (gradient if count > 1 else 0.0) + hidden
