# SPDX-License-Identifier: Apache-2.0
"""Rotary positions.  B batch, T tokens, N heads, H head width (halves are rotated against each other)."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.config import LinearScaling, Llama3Scaling, ModelConfig

Table = tuple[jax.Array, jax.Array]  # cosine and sine


def rotary_frequencies(width: int, base: float, scaling: LinearScaling | Llama3Scaling | None = None) -> np.ndarray:
    """Radians a token for each pair of channels, [width / 2] float32: base ** (-2 i / width), then scaled.

    Llama 3.1's scaling, with wavelength = 2 pi / frequency: those above `original_length / low_frequency_factor` are
    slowed by `factor`, those below `original_length / high_frequency_factor` are kept, and in between the frequency
    is a blend that is linear in 1 / wavelength.

    >>> print(rotary_frequencies(4, 100.0), rotary_frequencies(4, 100.0, LinearScaling(factor=2.0)))
    [1.  0.1] [0.5  0.05]

    Source: Su et al. 2021, arXiv:2104.09864; the scalings as in transformers' `ROPE_INIT_FUNCTIONS`.
    Raises: ValueError if `width` is odd.
    """
    if width % 2:
        raise ValueError(f"rotary positions need an even head width, got {width}: set head_width, or another positions")
    frequency = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if isinstance(scaling, LinearScaling):
        frequency = frequency / scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        turns = scaling.original_length * frequency / (2 * np.pi)  # over the original length
        kept = (turns - scaling.low_frequency_factor) / (scaling.high_frequency_factor - scaling.low_frequency_factor)
        kept = np.clip(kept, 0.0, 1.0)
        frequency = kept * frequency + (1 - kept) * frequency / scaling.factor
    elif scaling is not None:
        raise ValueError(f"rope_scaling must be LinearScaling, Llama3Scaling or None, got {scaling!r}")
    return frequency.astype(np.float32)


def rotary_table(positions_BT: jax.Array, frequencies: np.ndarray) -> Table:
    """Cosine and sine of position * frequency, each [B, T, 1, H/2] float32; made once, used by every layer."""
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * jnp.asarray(frequencies)[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, table: Table) -> jax.Array:
    """Turns channel i against channel i + H/2 by the table's angle, in float32; keeps shape and dtype."""
    cos, sin = table
    low, high = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x_BTNH.dtype)


def rotary(config: ModelConfig, length: int, positions_BT: jax.Array | None = None) -> Table | None:
    """The table of a model for [B, T] positions (None: 0 .. length - 1), or None if its positions are not rotary."""
    if config.positions != "rope":
        return None
    if positions_BT is None:
        positions_BT = jnp.arange(length, dtype=jnp.int32)[None, :]
    return rotary_table(positions_BT, rotary_frequencies(config.head_size, config.rope_base, config.rope_scaling))
