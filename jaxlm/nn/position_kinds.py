# SPDX-License-Identifier: Apache-2.0
"""How a decoder knows where its tokens are: one class for each kind, the value of `ModelConfig.positions`.  No jax.

Scores of query position m and key position n <= m, with D = m - n, are
`scale * sum_c exp(-rate_c D) rotated(q)_c rotated(k)_c - slope D`; each kind sets some of rotation, rates and slopes.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` before rotation (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float  # > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """The base grows with rows longer than `original_length` ("dynamic NTK"); shorter rows are left alone.

    The length is that of the row of a forward pass, or of the cache, so that all tokens of it have one base.
    """

    factor: float  # >= 1
    original_length: int  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths slowed by `factor`, short ones kept, a ramp between."""

    factor: float  # > 0
    low_frequency_factor: float
    high_frequency_factor: float  # > low_frequency_factor
    original_length: int  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): pairs that turn seldom are slowed, and scores sharpened.

    Attributes:
      factor: how much longer rows may become, >= 1.
      original_length: tokens of a row in pretraining.
      fast: turns over the original length from which a pair is kept as it is.
      slow: turns under which it is slowed by the whole factor; between the two lies a ramp.
      sharpness: what rotated queries and keys are each multiplied by; None: 0.1 ln(factor) + 1.
      truncate: whether the ramp's ends are rounded outwards to whole pairs, as published.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    sharpness: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): pair i turns by base ** (-2 i / H) radians a token."""

    base: float = 10_000.0
    scaling: LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """A learned vector for each of `max_length` positions, added to the embedding (GPT-2)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nope:
    """No positions at all: order is known from the causal mask alone (Kazemnejad et al. 2023, arXiv:2305.19466)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alibi:
    """Scores fall linearly with distance, each head with a slope of its own (Press et al. 2021, arXiv:2108.12409)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Xpos:
    """Rotation and a slow decay of each pair (Sun et al. 2022, arXiv:2212.10554)."""

    base: float = 10_000.0
    scale_base: float = 512.0  # tokens; the larger, the slower the decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hope:
    """Hyperbolic rotary positions (Dai et al. 2025, arXiv:2509.05218): pairs are boosted and damped, not rotated.

    Pair i has rapidity theta_i = theta_scale * theta_base ** (-2 i / H) and a damping above it; in the light-cone basis
    each channel of a pair then decays by itself, at damping - theta_i and damping + theta_i (`jaxlm.nn.hope`).

    Attributes:
      theta_scale: rapidity of the fastest pair, 1/token, > 0.  Times the training length it should be 1 to 80: slower
        ones learn slowly, faster ones forget distant tokens.
      theta_base: how much slower the later pairs are, >= 1.
      damping: "global", max theta + gap for all pairs, as published; "per_pair", theta_i + gap, so that every pair
        keeps one slow channel.
      gap: the slowest rate of all, as a multiple of theta_scale, > 0.
      learn_gap: "fixed", or a learned gap for each "layer" or key "head", kept positive by a softplus.
      gap_max: multiple of theta_scale that a learned gap stays under (by a sigmoid); None: no bound, and then only
        attention that is exact at any range can be used.
      slopes: a linear bias beside the decay, against dilution by far tokens: "none" as published, "alibi", or
        "learned" for each head, starting from ALiBi's.
      rotating: share of pairs, the fastest first, that rotate as in `Rope` instead of being boosted, with the damping
        (per_pair: the gap) as rate of both channels; 0 as published.
      rotary_base: of those.
      basis: "lightcone", the model's queries and keys are in that basis (any isotropic start is unchanged by it);
        "boost", they are in the published one and are turned at run time.
    """

    theta_scale: float = 0.005
    theta_base: float = 10_000.0
    damping: Literal["global", "per_pair"] = "global"
    gap: float = 0.05
    learn_gap: Literal["fixed", "layer", "head"] = "fixed"
    gap_max: float | None = None
    slopes: Literal["none", "alibi", "learned"] = "none"
    rotating: float = 0.0
    rotary_base: float = 10_000.0
    basis: Literal["lightcone", "boost"] = "lightcone"

    def __post_init__(self):
        for name, least in {"theta_scale": 0.0, "gap": 0.0}.items():
            if not getattr(self, name) > least:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not self.theta_base >= 1:
            raise ValueError(f"theta_base must be >= 1, got {self.theta_base}: pairs get slower, not faster")
        if not 0 <= self.rotating <= 1:
            raise ValueError(f"rotating is a share of the pairs in [0, 1], got {self.rotating}")
        if self.damping not in ("global", "per_pair"):
            raise ValueError(f"damping must be 'global' or 'per_pair', got {self.damping!r}")
        if self.gap_max is not None and not self.gap_max > self.gap:
            raise ValueError(f"gap_max {self.gap_max} must exceed gap {self.gap}, where learning starts")
        if self.gap_max is not None and self.learn_gap == "fixed":
            raise ValueError("gap_max bounds a learned gap: set learn_gap to 'layer' or 'head', or leave it out")


Positions = Rope | Learned | Nope | Alibi | Xpos | Hope
