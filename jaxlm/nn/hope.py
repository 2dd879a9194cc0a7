# SPDX-License-Identifier: Apache-2.0
"""Hyperbolic rotary positions: rates, and the basis in which they are plain decays.

A pair of channels (i, i + H/2) is boosted by B(x) = [[cosh x, sinh x], [sinh x, cosh x]], x = position * theta_i, and
damped by exp(-position * damping); for keys both change sign.  U = [[1, 1], [1, -1]] / sqrt 2 is symmetric and
orthogonal, and U B(x) U = diag(exp x, exp -x).  So with u = (x0 + x1) / sqrt 2, v = (x0 - x1) / sqrt 2, the light-cone
basis, the score of query m and key n is `sum_c exp(-rate_c (m - n)) q_c k_c` with the rates damping - theta_i for u and
damping + theta_i for v: no cosh, no large terms that cancel.  With imaginary rapidity a boost is a rotation (RoPE);
with all rates 0 nothing is left (NoPE).

Source: Dai, Shan, Song, Liang 2025, arXiv:2509.05218; the basis as in arXiv:2610.10154.
H head width, K key heads, N heads, T tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.position_kinds import Hope


def hope_theta(width: int, *, scale: float, base: float) -> np.ndarray:
    """Rapidity of each pair, [H/2] float64, 1/token: scale * base ** (-2 i / H).

    >>> print(hope_theta(4, scale=0.01, base=100.0))
    [0.01  0.001]

    Raises: ValueError if the width is odd, naming it.
    """
    if width % 2:
        raise ValueError(f"head width must be even, got {width}: channels are boosted in pairs")
    return scale * float(base) ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def hope_rates(theta: Any, gap: Any, *, damping: Literal["global", "per_pair"] = "global") -> Any:
    """Decay of each channel in the light-cone basis, [..., H], 1/token: damping - theta, then damping + theta.

    Args:
      theta: [H/2], rapidities >= 0.
      gap: > 0, how far the damping lies above the rapidity; a scalar or [K, 1], an array of jax or a number.
      damping: "global": max theta + gap for all pairs (the paper's constraint, met by every gap > 0); "per_pair":
        theta_i + gap, so that each pair keeps a channel as slow as the gap.
    Returns: [H], or [K, H], in the type of `gap` (differentiable), NumPy float64 for a number.
    Raises: ValueError for an unknown damping, or a gap that is a number and not positive.

    >>> print(hope_rates(np.array([0.02, 0.01]), 0.5), hope_rates(np.array([0.02, 0.01]), 0.5, damping="per_pair"))
    [0.5  0.51 0.54 0.53] [0.5  0.5  0.54 0.52]
    """
    theta = np.asarray(theta, np.float64)
    if damping not in ("global", "per_pair"):
        raise ValueError(f"damping must be 'global' or 'per_pair', got {damping!r}")
    if isinstance(gap, int | float | np.ndarray) and not np.all(np.asarray(gap) > 0):
        raise ValueError(
            f"damping {theta.max() + np.min(gap):g} <= max theta {theta.max():g}: give gap > 0, got {np.min(gap):g}"
        )
    top = theta.max() if damping == "global" else theta
    slow, fast = top - theta, top + theta
    steady = np.concatenate([slow, fast])
    if not isinstance(gap, jax.Array):
        return gap + steady
    return gap + jnp.asarray(steady, jnp.float32).reshape((1,) * max(gap.ndim - 1, 0) + steady.shape)


def check_rates(rates: Any, *, num_heads: int, num_kv_heads: int, width: int) -> None:
    """Refuses rates that cannot be; values are looked at only where they are known (outside of jit).

    Raises: ValueError for a shape that is none of [H], [K, H], [N, H], or a rate that is negative or not finite.
    """
    if rates.shape not in ((width,), (num_kv_heads, width), (num_heads, width)):
        raise ValueError(
            f"rates must be [{width}], [{num_kv_heads}, {width}] or [{num_heads}, {width}] (channels; key heads; "
            f"heads), got {list(rates.shape)}"
        )
    if isinstance(rates, jax.core.Tracer):
        return
    values = np.asarray(rates, np.float64)
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        channel = where[-1] if len(where) == 1 else where
        raise ValueError(
            f"rates must be finite and >= 0, got {values[where]:g} at channel {channel}: "
            "the score would grow with distance; damping must exceed theta"
        )


def to_lightcone(x: jax.Array, *, pairing: Literal["half", "interleaved"] = "half") -> jax.Array:
    """Queries or keys [..., H] from the paper's basis: channels [u_0 .. u_{H/2-1}, v_0 .. v_{H/2-1}].

    Args:
      x: [..., H]; in float32 whatever the dtype, which is kept.
      pairing: "half": channel i is paired with i + H/2, as in Llama; "interleaved": 2 i with 2 i + 1, as in the paper.
    """
    even, odd = _pairs(x.astype(jnp.float32), pairing)
    return (jnp.concatenate([even + odd, even - odd], axis=-1) * np.float32(0.5**0.5)).astype(x.dtype)


def fold_lightcone(kernel: jax.Array, *, num_heads: int, pairing: Literal["half", "interleaved"] = "half") -> jax.Array:
    """A query or key projection [D, N * H] (or bias [N * H]) whose output is in the light-cone basis, once and for all.

    Not for a projection whose output is normalised with a learned scale a channel: that does not commute.
    """
    heads = kernel.reshape(*kernel.shape[:-1], num_heads, kernel.shape[-1] // num_heads)
    return to_lightcone(heads, pairing=pairing).reshape(kernel.shape)


def _pairs(x: Any, pairing: str) -> tuple[Any, Any]:
    if pairing == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    if pairing != "half":
        raise ValueError(f"pairing must be 'half' or 'interleaved', got {pairing!r}")
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def channel_survival(rates: Any, distances: Sequence[int], threshold: float = 0.01) -> dict[int, int]:
    """How many channels still carry more than `threshold` of a product at each distance: distance -> count.

    >>> channel_survival(hope_rates(hope_theta(64, scale=0.005, base=1e4), 0.00025), (1024, 4096))
    {1024: 7, 4096: 1}
    """
    rates = np.asarray(rates, np.float64)
    return {int(d): int(np.sum(np.exp(-rates * d) > threshold)) for d in distances}


def model_theta(kind: Hope, width: int) -> np.ndarray:
    """Rapidities of a model's pairs, [H/2] float64; 0 for those that rotate."""
    theta = hope_theta(width, scale=kind.theta_scale, base=kind.theta_base)
    theta[: round(kind.rotating * len(theta))] = 0.0
    return theta


def model_rates(kind: Hope, width: int, gap: Any) -> Any:
    """Rates of a model's channels for a gap, as `hope_rates`."""
    return hope_rates(model_theta(kind, width), gap, damping=kind.damping)


def learned_gap(kind: Hope, p: Mapping[str, Any]) -> tuple[Any, float | None]:
    """A layer's gap, a number or float32 [] or [K, 1], and what it cannot exceed (None: nothing bounds it).

    A learned gap is theta_scale * softplus(leaf), or theta_scale * gap_max * sigmoid(leaf) where it is bounded.
    """
    if kind.learn_gap == "fixed":
        return kind.theta_scale * kind.gap, kind.theta_scale * kind.gap
    leaf = p["positions"]["gap"].astype(jnp.float32)
    leaf = leaf[:, None] if kind.learn_gap == "head" else leaf
    if kind.gap_max is None:
        return kind.theta_scale * jax.nn.softplus(leaf), None
    return kind.theta_scale * kind.gap_max * jax.nn.sigmoid(leaf), kind.theta_scale * kind.gap_max


def gap_leaf(kind: Hope) -> float:
    """Where a learned gap's leaf starts, so that the gap is `kind.gap`."""
    if kind.gap_max is None:
        return float(np.log(np.expm1(kind.gap)))
    return float(np.log(kind.gap) - np.log(kind.gap_max - kind.gap))


def learned_slopes(kind: Hope, p: Mapping[str, Any]) -> jax.Array | None:
    """A layer's learned slopes, [N] float32 > 0, or None."""
    if kind.slopes != "learned":
        return None
    return jax.nn.softplus(p["positions"]["slope"].astype(jnp.float32))
