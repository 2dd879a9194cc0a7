# SPDX-License-Identifier: Apache-2.0
"""Numbers of a capsule and of the decoder that reads a plan out of it; no jax."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapsuleConfig:
    """What stands between `<cap>` and `</cap>`, and how it is made.

    Attributes:
      num_capsules: K >= 0, tokens of a capsule; 0: there is none.
      width: d, of a capsule token; less than the model's width.
      source: "capsule"; or a control: "pause", K learned constants (the same compute, no content), "hidden", hidden
        states of full width fed back as they are (Coconut, Hao et al. 2024, arXiv:2412.06769, without its stages).
      mode: "autoregressive": token k + 1 is made after token k has been read, K short steps; "parallel": learned
        queries give all of them at once, in a second pass.
      embed_scale: "rms": embeddings have the mean RMS of the embedding table's rows; "none": the bare projection.
      hidden: which hidden state is projected, before ("last") or after ("normed") the final norm.
    """

    num_capsules: int = 2
    width: int = 128
    source: Literal["capsule", "pause", "hidden"] = "capsule"
    mode: Literal["autoregressive", "parallel"] = "autoregressive"
    embed_scale: Literal["rms", "none"] = "rms"
    hidden: Literal["last", "normed"] = "last"

    def __post_init__(self):
        if self.num_capsules < 0:
            raise ValueError(f"num_capsules must be at least 0, got {self.num_capsules}: 0 is plain fine-tuning")
        if self.width < 1:
            raise ValueError(f"capsule width must be at least 1, got {self.width}")
        if self.source == "hidden" and self.mode == "parallel":
            raise ValueError("source 'hidden' feeds states back one by one: leave mode at 'autoregressive'")

    @property
    def in_steps(self) -> bool:
        """Whether tokens are made one after the other."""
        return self.num_capsules > 0 and self.mode == "autoregressive" and self.source != "pause"

    @property
    def has_queries(self) -> bool:
        """Whether there are K learned rows of the model's width."""
        return self.num_capsules > 0 and (self.source == "pause" or self.mode == "parallel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanDecoderConfig:
    """The shallow decoder that must rebuild the plan from the capsule alone.

    Attributes:
      layers, width, heads: of the Transformer.
      max_plan: tokens of a plan with its end marker; the size of the table of learned positions.
    """

    layers: int = 2
    width: int = 256
    heads: int = 4
    max_plan: int = 128

    def __post_init__(self):
        for name in ("layers", "width", "heads", "max_plan"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the plan decoder must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"decoder width {self.width} is not a multiple of its {self.heads} heads")
