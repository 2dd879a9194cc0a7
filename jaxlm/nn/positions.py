# SPDX-License-Identifier: Apache-2.0
"""What every kind of positions does to scores, as arrays.

B batch, T tokens, N heads, K key heads, H head width (channel i and channel i + H/2 are a pair).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.config import ModelConfig
from jaxlm.nn.hope import learned_gap, learned_slopes, model_rates, model_theta
from jaxlm.nn.position_kinds import (
    Alibi,
    DynamicScaling,
    Hope,
    LinearScaling,
    Llama3Scaling,
    Rope,
    Xpos,
    YarnScaling,
)

Table = tuple[jax.Array, jax.Array]  # cosine and sine


class Encoding(NamedTuple):
    """What one forward pass needs to know of its positions; made once, used by every layer.

    Attributes:
      rotation: cosine and sine of each token, or None where nothing rotates.
      clock: [B or 1, T] int32, of `relative_clock`, or None where scores do not fall with distance.
    """

    rotation: Table | None = None
    clock: jax.Array | None = None


NOWHERE = Encoding()


class Falloff(NamedTuple):
    """How the scores of a layer fall with distance.

    Attributes:
      rates: float32 [H] or [K, H], of the decay of each channel's product; None: none.
      max_rate: what no rate exceeds, a Python number; None: not known before the program runs.
      slopes: float32 [N], of the linear bias; None: none.
    """

    rates: jax.Array | None = None
    max_rate: float | None = None
    slopes: jax.Array | None = None


def encoding(
    config: ModelConfig, length: int, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
) -> Encoding:
    """The encoding of rows of `length` tokens.

    Args:
      config: reads `positions` and `head_size`.
      length: T.
      positions: [B, T] int32; None: 0 .. T - 1.
      segment_ids: [B, T] int32; None: one segment.
    """
    kind = config.positions
    count = jnp.arange(length, dtype=jnp.int32)[None, :]
    frequencies, sharpness = rotation_of(config, length)
    rotation = None
    if frequencies is not None:
        rotation = rotary_table(count if positions is None else positions, frequencies, sharpness)
    if not isinstance(kind, Alibi | Xpos | Hope):
        return Encoding(rotation)
    return Encoding(rotation, count if positions is None else relative_clock(positions, segment_ids))


def rotation_of(config: ModelConfig, length: int) -> tuple[np.ndarray | None, float]:
    """Radians a token for each pair, [H/2] float32, and what rotated vectors are multiplied by; None: no rotation."""
    kind, width = config.positions, config.head_size
    if isinstance(kind, Rope):
        return rotary_frequencies(width, kind.base, kind.scaling, length=length), sharpness_of(kind.scaling)
    if isinstance(kind, Xpos):
        return rotary_frequencies(width, kind.base), 1.0
    if isinstance(kind, Hope) and kind.rotating:
        rotating = model_theta(kind, width) == 0
        return np.where(rotating, rotary_frequencies(width, kind.rotary_base), 0.0).astype(np.float32), 1.0
    return None, 1.0


def falloff(p: Mapping[str, Any], config: ModelConfig) -> Falloff:
    """Rates and slopes of one layer.

    Args:
      p: the layer's attention parameters; reads `positions`, where something is learned.
      config: reads `positions`, `num_heads` and `head_size`.
    """
    kind = config.positions
    if isinstance(kind, Alibi):
        return Falloff(slopes=jnp.asarray(alibi_slopes(config.num_heads)))
    if isinstance(kind, Xpos):
        rates = xpos_rates(config.head_size, kind.scale_base)
        return Falloff(jnp.asarray(rates), float(rates.max()))
    if not isinstance(kind, Hope):
        return Falloff()
    gap, bound = learned_gap(kind, p)
    rates = model_rates(kind, config.head_size, gap)
    max_rate = None if bound is None else float(np.max(model_rates(kind, config.head_size, bound)))
    slopes = jnp.asarray(alibi_slopes(config.num_heads)) if kind.slopes == "alibi" else learned_slopes(kind, p)
    return Falloff(jnp.asarray(rates), max_rate, slopes)


def relative_clock(positions: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Positions that go on from segment to segment, [B, T] int32, so that differences inside one are the positions'.

    0 at the first token; then the step of the positions inside a segment, and 1 where a segment begins.

    >>> print(relative_clock(jnp.array([[7, 8, 9, 0, 1]]), jnp.array([[1, 1, 1, 2, 2]])))
    [[0 1 2 3 4]]
    """
    step = jnp.diff(positions.astype(jnp.int32), axis=1)
    if segment_ids is not None:
        step = jnp.where(jnp.diff(segment_ids, axis=1) == 0, step, 1)
    return jnp.pad(jnp.cumsum(step, axis=1), ((0, 0), (1, 0)))


def check_positions(positions: jax.Array, shape: tuple[int, ...], segment_ids: jax.Array | None) -> None:
    """Refuses positions that are no positions of these rows; their order is looked at outside of jit only.

    Raises: ValueError for another shape than [B, L] (or [1, L]), or positions that decrease inside a segment, with the
      first index and both values.
    """
    if positions.shape not in (tuple(shape), (1, shape[1])):
        raise ValueError(f"positions must be {list(shape)}, one for each token, got {list(positions.shape)}")
    if isinstance(positions, jax.core.Tracer) or isinstance(segment_ids, jax.core.Tracer):
        return
    back = np.diff(np.asarray(positions), axis=1) < 0
    if segment_ids is not None:
        back = back & (np.diff(np.asarray(segment_ids), axis=1) == 0)
    if back.any():
        row, index = (int(i) for i in np.argwhere(back)[0])
        row = min(row, positions.shape[0] - 1)
        before, after = int(positions[row, index]), int(positions[row, index + 1])
        raise ValueError(
            f"positions must not decrease inside a segment: {before} then {after} at index {index + 1} of row {row}; "
            "give rows that hold several texts segment_ids"
        )


def rotary_frequencies(
    width: int,
    base: float,
    scaling: LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | None = None,
    *,
    length: int = 0,
) -> np.ndarray:
    """Radians a token for each pair of channels, [width / 2] float32: base ** (-2 i / width), then scaled.

    Llama 3.1's scaling, with wavelength = 2 pi / frequency: those above `original_length / low_frequency_factor` are
    slowed by `factor`, those below `original_length / high_frequency_factor` are kept, and in between the frequency
    is a blend that is linear in 1 / wavelength.  YaRN's ramp is linear in the index of the pair.

    >>> print(rotary_frequencies(4, 100.0), rotary_frequencies(4, 100.0, LinearScaling(factor=2.0)))
    [1.  0.1] [0.5  0.05]

    Args:
      width: H.
      base: > 0.
      scaling: one of the four, or None.
      length: of the row, read by `DynamicScaling`.
    Source: Su et al. 2021, arXiv:2104.09864; the scalings as in transformers' `ROPE_INIT_FUNCTIONS`.
    Raises: ValueError if `width` is odd.
    """
    if width % 2:
        raise ValueError(f"rotary positions need an even head width, got {width}: set head_width, or another positions")
    if isinstance(scaling, DynamicScaling) and length > scaling.original_length:
        longer = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
        base = base * longer ** (width / (width - 2))
    frequency = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if isinstance(scaling, LinearScaling):
        frequency = frequency / scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        turns = scaling.original_length * frequency / (2 * np.pi)  # over the original length
        kept = (turns - scaling.low_frequency_factor) / (scaling.high_frequency_factor - scaling.low_frequency_factor)
        kept = np.clip(kept, 0.0, 1.0)
        frequency = kept * frequency + (1 - kept) * frequency / scaling.factor
    elif isinstance(scaling, YarnScaling):
        kept = _yarn_kept(width, base, scaling)
        frequency = kept * frequency + (1 - kept) * frequency / scaling.factor
    elif scaling is not None and not isinstance(scaling, DynamicScaling):
        raise ValueError(
            f"scaling must be one of LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling or None, got {scaling!r}"
        )
    return frequency.astype(np.float32)


def _yarn_kept(width: int, base: float, scaling: YarnScaling) -> np.ndarray:
    """How much of each pair's frequency stays, [width / 2] in [0, 1] (YaRN, section 3.2)."""

    def pair_turning(turns: float) -> float:
        return width * np.log(scaling.original_length / (turns * 2 * np.pi)) / (2 * np.log(base))

    low, high = pair_turning(scaling.fast), pair_turning(scaling.slow)
    if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0.0), min(high, width - 1.0)
    high = high + 0.001 if low == high else high  # as published: no division by zero
    return 1.0 - np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)


def sharpness_of(scaling: Any) -> float:
    """What rotated queries and keys are each multiplied by: 1 but for YaRN."""
    if not isinstance(scaling, YarnScaling):
        return 1.0
    return 0.1 * float(np.log(scaling.factor)) + 1.0 if scaling.sharpness is None else scaling.sharpness


def rotary_table(positions_BT: jax.Array, frequencies: np.ndarray, sharpness: float = 1.0) -> Table:
    """Cosine and sine of position * frequency, each [B, T, 1, H/2] float32; made once, used by every layer."""
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequencies)[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if sharpness == 1.0 else (cos * sharpness, sin * sharpness)


def rotate(x_BTNH: jax.Array, table: Table) -> jax.Array:
    """Turns channel i against channel i + H/2 by the table's angle, in float32; keeps shape and dtype."""
    cos, sin = table
    low, high = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x_BTNH.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """What a head's scores lose a token, [N] float32: 2 ** (-8 (h + 1) / N) where N is a power of two.

    Else those of the power of two below, then every other one of the power of two above, as published.

    >>> print(alibi_slopes(4), alibi_slopes(3))
    [0.25       0.0625     0.015625   0.00390625] [0.0625     0.00390625 0.25      ]

    Source: Press et al. 2021, arXiv:2108.12409, section 3 and the authors' code.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (h + 1) / count) for h in range(count)]

    below = 1 << (num_heads.bit_length() - 1)
    return np.array(geometric(below) + geometric(2 * below)[::2][: num_heads - below], np.float32)


def xpos_rates(width: int, scale_base: float) -> np.ndarray:
    """xPos's decay of each channel, [H] float32, 1/token: -ln(zeta_i) / scale_base, zeta_i = (2i + 0.4 H) / (1.4 H).

    Both channels of a pair share it, so that it commutes with the rotation.

    Source: Sun et al. 2022, arXiv:2212.10554, algorithm 1 of the authors' code.
    """
    zeta = (np.arange(0, width, 2) + 0.4 * width) / (1.4 * width)
    return np.tile(-np.log(zeta) / scale_base, 2).astype(np.float32)
