# SPDX-License-Identifier: Apache-2.0
"""What distinguishes one decoder from another: numbers and choices, no jax.

One decoder serves every family (Llama, Mistral, Qwen, OLMo 2, Gemma 2, GPT-2); a family is a setting of these fields.
"""

import dataclasses
from typing import Any, Literal

from jaxlm.nn.position_kinds import Hope, Positions, Rope, Xpos


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Every field has one reader, in `nn/`."""

    vocab_size: int
    width: int  # D, of the residual stream
    num_layers: int
    num_heads: int  # N
    num_kv_heads: int | None = None  # K, divides N; None: N
    head_width: int | None = None  # H; None: width // num_heads
    mlp_width: int | None = None  # F; None: 4 * width
    max_length: int = 2048  # tokens the model was made for; the size of the table of learned positions

    positions: Positions = Rope()

    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0  # y = x * (offset + scale); Gemma: 1
    norm_placement: Literal["pre", "post", "both"] = "pre"  # post: on the branch's output, before it is added (OLMo 2)
    query_key_norm: Literal["none", "head", "full"] = "none"  # head: over H (Qwen 3); full: over N*H (OLMo 2)

    attention_bias: bool = False  # of query, key and value
    attention_out_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True  # down(activation(gate(x)) * up(x)); else down(activation(up(x)))

    windows: tuple[int | None, ...] = (None,)  # sliding windows, repeated over the layers; None: all of the past
    attention_scale: float | None = None  # on query @ key; None: head_width ** -0.5
    attention_softcap: float | None = None  # cap * tanh(scores / cap)
    attention_sink: bool = False  # a learned score for each head that takes weight and gives nothing
    logit_softcap: float | None = None
    embedding_scale: float = 1.0  # Gemma: sqrt(width), rounded to the compute dtype
    tied: bool = True  # the head is the embedding's transpose

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters stay float32
    remat: Literal["none", "full", "dots"] = (
        "none"  # what the backward pass recomputes: nothing dear (no product), a whole layer, all but dense products
    )
    attention: Literal["auto", "xla", "cudnn", "tiled", "pallas"] = "auto"  # implementation, see `attend`
    adapter_scale: float = 1.0  # of LoRA leaves, alpha / rank

    def __post_init__(self):
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.kv_heads}")
        if self.head_width is None and self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}: give head_width")
        if self.head_size % 2 and isinstance(self.positions, Rope | Xpos | Hope):
            raise ValueError(
                f"head width must be even for {type(self.positions).__name__}, whose channels go in pairs, "
                f"got {self.head_size}: set head_width"
            )

    @property
    def kv_heads(self) -> int:
        """K, the number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """H, the width of one head."""
        return self.width // self.num_heads if self.head_width is None else self.head_width

    @property
    def mlp_size(self) -> int:
        """F, the width inside the feed-forward block."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer, `num_layers` long."""
        return tuple(self.windows[i % len(self.windows)] for i in range(self.num_layers))


def attention_config(width: int, *, num_heads: int, use_bias: bool = False, **fields: Any) -> ModelConfig:
    """The config of one attention layer, for those who import layers and have no model.

    Args:
      width: D.
      num_heads: N.
      use_bias: whether all four projections have one.
      fields: further ones of `ModelConfig`; the first of `windows` is the layer's.
    """
    shape: dict[str, Any] = {"vocab_size": 1, "num_layers": 1, "width": width, "num_heads": num_heads}
    return ModelConfig(**(shape | {"attention_bias": use_bias, "attention_out_bias": use_bias} | fields))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters beside chosen kernels (Hu et al. 2021, arXiv:2106.09685): W + alpha / rank * A @ B."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"blocks/attention/(query|key|value|out)", r"blocks/mlp/(gate|up|down)")  # full matches

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank
