# SPDX-License-Identifier: Apache-2.0
"""Causal attention with segments, windows and shared key heads.

B batch, L queries, M keys, N query heads, K key heads, G = N / K queries a key head, H head width, D model width.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.kernels.blocked_attention import blocked_attention
from jaxlm.kernels.decay import centred, centred_refusal
from jaxlm.kernels.tiled_attention import tiled_attention
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.dense import dense
from jaxlm.nn.hope import check_rates, to_lightcone
from jaxlm.nn.norm import rms_norm
from jaxlm.nn.position_kinds import Hope
from jaxlm.nn.positions import NOWHERE, Encoding, check_positions, encoding, falloff, relative_clock, rotate

TILED_FROM = 4096  # tokens; from there on tiles take a twentieth of the memory for a fifth more time on CPU
IMPLEMENTATIONS = ("auto", "xla", "cudnn", "tiled", "pallas")


class Pieces(Protocol):
    """Cuts rows into pieces, as rows of their own, and attends across the cuts (`jaxlm.train.pieces`)."""

    @property
    def count(self) -> int:
        """Pieces of a row."""

    def cut(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] to [count * B, T / count, ...]."""

    def join(self, x: jax.Array) -> jax.Array:
        """The inverse of `cut`."""

    @property
    def attend(self) -> Callable[..., jax.Array]:
        """Attention of queries in pieces to keys and values in pieces."""


def attend(
    query_BLNH: jax.Array,
    key_BMKH: jax.Array,
    value_BMKH: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    window: int | jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rates: jax.Array | None = None,
    max_rate: float | None = None,
    slopes: jax.Array | None = None,
    sink: jax.Array | None = None,
    clock: jax.Array | None = None,
    implementation: str = "auto",
    pieces: Pieces | None = None,
) -> jax.Array:
    """softmax(cap(scale * s_ij) - slope * D_ij) v: s_ij = sum_c exp(-rate_c D_ij) q_ic k_jc, D_ij = clock_i - clock_j.

    Token i sees token j when j <= i, i - j < window, and both are of one segment.  Padding (segment 0) is a segment as
    any other here: no real token sees it, and its own rows are finite.

    Args:
      query_BLNH: [B, L, N, H].
      key_BMKH: [B, M, K, H] with M = L and K dividing N; head n reads key head n // (N / K).
      value_BMKH: [B, M, K, H].
      segment_ids: [B, L] int32, or None for one segment.
      window: number of tokens seen, itself included; an int, a traced int32 scalar, or None for all of the past.
      scale: of the scores; None: H ** -0.5.
      softcap: scores become softcap * tanh(scores / softcap); None leaves them.
      rates: float32 [H], [K, H] or [N, H], 1/token, >= 0: how fast each channel's product decays; None: not at all.
      max_rate: a Python number that no rate exceeds; None: read from rates whose values are known, else unknown.
      slopes: float32 [N], 1/token, >= 0: a bias that falls with distance; None: none.
      sink: float32 [N], a score of each head that takes weight and gives nothing; None: none.
      clock: [B or 1, L] int32, what distances are measured in, never decreasing; None: indices.
      implementation: "xla" (any device; scores in blocks of rows), "cudnn" (NVIDIA, bf16 or fp16, neither softcap nor
        slopes nor sink), "tiled" (any device; memory linear in L, rates of any size), "pallas" (TPU, the same as one
        kernel; elsewhere interpreted, which is slow; not divided over a mesh by itself). "xla" and "cudnn" fold rates
        into queries and keys, which needs max_rate * (L - 1) <= 80 (rows that reach further, by gaps in their
        clock, become NaN: force "tiled" for those). "auto": cudnn where it can, xla for rows shorter
        than `TILED_FROM`, else tiled.
      pieces: queries, keys and values are pieces of longer rows, and segments and clock those of the whole rows;
        "tiled" alone does it, and "auto", which folds rates as far as "xla" would.  None: rows are whole.
    Returns: [B, L, N, H] in the dtype of the query.
    Raises: ValueError if a forced implementation cannot do it, naming the reason, and for rates that cannot be.
    """
    _, L, N, H = query_BLNH.shape
    L = L if pieces is None else L * pieces.count
    scale = H**-0.5 if scale is None else scale
    masked = segment_ids is not None or not (window is None or isinstance(window, int))
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    reason = cudnn_refusal(query_BLNH, softcap=softcap, masked=masked, biased=slopes is not None or sink is not None)
    if implementation == "cudnn" and reason:
        raise ValueError(f"attention 'cudnn' cannot do this: {reason}; use attention='auto' or 'xla'")
    if rates is not None:
        check_rates(rates, num_heads=N, num_kv_heads=key_BMKH.shape[2], width=H)
        if max_rate is None and not isinstance(rates, jax.core.Tracer):
            max_rate = float(np.max(np.asarray(rates)))
        rates = rates[None] if rates.ndim == 1 else rates
        if rates.shape[0] not in (1, key_BMKH.shape[2]):
            key_BMKH, value_BMKH = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (key_BMKH, value_BMKH))
    common: dict[str, Any] = {"scale": scale, "softcap": softcap, "segment_ids": segment_ids, "window": window}
    common |= {"slopes": slopes, "sink": sink, "clock": clock}
    refusal = None if rates is None else centred_refusal(max_rate, L - 1, query_BLNH.dtype)
    if pieces is not None:
        if implementation not in ("auto", "tiled"):
            raise ValueError(
                f"attention {implementation!r} cannot attend across mesh.sequence={pieces.count}: use 'auto' or 'tiled'"
            )
        common["fold"] = rates is not None and implementation == "auto" and not refusal and L < TILED_FROM
        return pieces.attend(query_BLNH, key_BMKH, value_BMKH, rates=rates, **common)
    if implementation in ("xla", "cudnn") and refusal:
        raise ValueError(f"attention {implementation!r} cannot fold these rates: {refusal}; use 'auto' or 'tiled'")
    if implementation == "auto" and (refusal or (reason and L >= TILED_FROM)):
        implementation = "tiled"
    if implementation == "tiled":
        return tiled_attention(query_BLNH, key_BMKH, value_BMKH, rates=rates, **common)
    if implementation == "pallas":
        from jaxlm.kernels.pallas_attention import pallas_attention  # late: pallas is slow to import

        return pallas_attention(query_BLNH, key_BMKH, value_BMKH, rates=rates, **common)
    if rates is not None:
        count = jnp.arange(L, dtype=jnp.int32)[None] if clock is None else clock
        query_BLNH, key_BMKH = centred(query_BLNH, key_BMKH, rates, count)
    if implementation == "xla" or reason:
        return blocked_attention(query_BLNH, key_BMKH, value_BMKH, **common)
    return _attend_cudnn(query_BLNH, key_BMKH, value_BMKH, segment_ids, window, scale)


def cudnn_refusal(
    query_BLNH: jax.Array, *, softcap: float | None = None, masked: bool = False, biased: bool = False
) -> str | None:
    """Why cuDNN's attention cannot take this query on the default backend, or None if it can.

    Args:
      query_BLNH: [B, L, N, H].
      softcap: of the scores.
      masked: whether segments, or a traced window, need a mask.
      biased: whether there are slopes or a sink.
    """
    if (backend := jax.default_backend()) != "gpu":
        return f"it needs an NVIDIA GPU and the backend is {backend!r}"
    if softcap is not None:
        return f"it has no soft-cap and the model caps scores at {softcap}"
    if biased:
        return "it has neither slopes nor a sink"
    if query_BLNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16 and the query is {query_BLNH.dtype}"
    _, length, _, head_width = query_BLNH.shape
    widest = 256 if float(getattr(jax.devices()[0], "compute_capability", "0")) >= 9 else 128
    if head_width % 8 or head_width > widest:
        return f"on this device it needs a head width that is a multiple of 8 and at most {widest}, got {head_width}"
    if masked and length % 2:
        return f"with segments it needs an even length, got {length}"
    return None


def visible(length: int, segment_ids: jax.Array | None, window: int | jax.Array | None) -> jax.Array:
    """Which key each query sees, bool [B or 1, L, M]."""
    index = jnp.arange(length)
    distance = index[:, None] - index[None, :]
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    seen = seen[None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return seen


def _attend_cudnn(query_BLNH, key_BMKH, value_BMKH, segment_ids, window, scale):
    B, L, _, _ = query_BLNH.shape
    static = window is None or isinstance(window, int)
    mask = None
    if segment_ids is not None or not static:  # cuDNN wants a mask that truly has its last two dimensions
        mask = jnp.broadcast_to(visible(L, segment_ids, window)[:, None], (B, 1, L, L))
    return jax.nn.dot_product_attention(
        query_BLNH,
        key_BMKH,
        value_BMKH,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if static and window is not None else None,
        implementation="cudnn",
    )


def attention(
    p: Mapping[str, Any],
    x_BLD: jax.Array,
    config: ModelConfig,
    *,
    encoding: Encoding = NOWHERE,
    segment_ids: jax.Array | None = None,
    window: int | jax.Array | None = None,
    pieces: Pieces | None = None,
) -> jax.Array:
    """The attention branch of one layer: project, normalise and rotate queries and keys, attend, project back.

    Args:
      p: `query`, `key`, `value`, `out` and, where configured, `query_norm`, `key_norm`, `positions`, `sink`; one layer,
        not stacked.
      x_BLD: [B, L, D].
      config: reads the heads, `positions`, `query_key_norm`, `attention*`, `norm_*` and `adapter_scale`.
      encoding: of `positions.encoding`, for this config.
      segment_ids: [B, L] int32, or None for one segment.
      window, pieces: see `attend`.
    Returns: [B, L, D] in the dtype of `x_BLD`.
    """
    query, key, value = project(p, x_BLD, config, encoding=encoding)
    seen: dict[str, Any] = {"segment_ids": segment_ids, "window": window, "pieces": pieces}
    mixed = mix(p, query, key, value, config, encoding=encoding, **seen)
    return dense(p["out"], mixed.reshape(*mixed.shape[:2], -1), config.adapter_scale)


def project(
    p: Mapping[str, Any], x_BLD: jax.Array, config: ModelConfig, *, encoding: Encoding = NOWHERE
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, L, N, H], keys and values [B, L, K, H], normalised and placed: what `mix` and a cache take."""

    def norm(name, x):
        return rms_norm(p[name], x, epsilon=config.norm_epsilon, offset=config.norm_offset)

    heads = {"query": config.num_heads, "key": config.kv_heads, "value": config.kv_heads}
    projected = {}
    for name, count in heads.items():
        x = dense(p[name], x_BLD, config.adapter_scale)
        if config.query_key_norm == "full" and name != "value":
            x = norm(f"{name}_norm", x)
        x = x.reshape(*x.shape[:-1], count, config.head_size)
        if config.query_key_norm == "head" and name != "value":
            x = norm(f"{name}_norm", x)
        projected[name] = x if name == "value" else place(x, config, encoding)
    return projected["query"], projected["key"], projected["value"]


def place(x_BLNH: jax.Array, config: ModelConfig, encoding: Encoding) -> jax.Array:
    """Queries or keys with what of their positions does not depend on the other one: the basis and the rotation."""
    if isinstance(config.positions, Hope) and config.positions.basis == "boost":
        x_BLNH = to_lightcone(x_BLNH)
    return x_BLNH if encoding.rotation is None else rotate(x_BLNH, encoding.rotation)


def mix(
    p: Mapping[str, Any],
    query_BLNH: jax.Array,
    key_BLKH: jax.Array,
    value_BLKH: jax.Array,
    config: ModelConfig,
    *,
    encoding: Encoding = NOWHERE,
    segment_ids: jax.Array | None = None,
    window: int | jax.Array | None = None,
    pieces: Pieces | None = None,
) -> jax.Array:
    """`attend` with the rates, slopes, sink and numbers of a layer: [B, L, N, H].

    Args:
      p: reads `positions` and `sink`, where configured.
      query_BLNH: placed, as `project` gives it; keys and values alike.
      key_BLKH: [B, L, K, H].
      value_BLKH: [B, L, K, H].
      config: reads `positions`, `attention*` and the heads.
      encoding: of `positions.encoding`, for this config.
      segment_ids: [B, L] int32, or None for one segment.
      window, pieces: see `attend`.
    """
    fall = falloff(p, config)
    return attend(
        query_BLNH,
        key_BLKH,
        value_BLKH,
        segment_ids=segment_ids,
        window=window,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        rates=fall.rates,
        max_rate=fall.max_rate,
        slopes=fall.slopes,
        sink=p["sink"] if config.attention_sink else None,
        clock=encoding.clock,
        implementation=config.attention,
        pieces=pieces,
    )


def place_and_mix(
    p: Mapping[str, Any],
    query_BLNH: jax.Array,
    key_BLKH: jax.Array,
    value_BLKH: jax.Array,
    config: ModelConfig,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """A layer's attention between projections: `place` on queries and keys, then `mix`; window: the config's first."""
    places = encoding(config, query_BLNH.shape[1], positions, segment_ids)
    query, key = place(query_BLNH, config, places), place(key_BLKH, config, places)
    window = config.windows[0]
    return mix(p, query, key, value_BLKH, config, encoding=places, segment_ids=segment_ids, window=window)


def hope_attention(
    query_BLNH: jax.Array,
    key_BLKH: jax.Array,
    value_BLKH: jax.Array,
    rates: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    causal: bool = True,
    **options: Any,
) -> jax.Array:
    """Attention with hyperbolic rotary positions, queries and keys in the light-cone basis (`to_lightcone`).

    >>> from jaxlm.nn.hope import hope_rates, hope_theta
    >>> rates = hope_rates(hope_theta(8, scale=0.01, base=100.0), 0.0005)
    >>> x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    >>> print(hope_attention(x, x, x, jnp.asarray(rates, jnp.float32)).shape)
    (1, 5, 2, 8)

    Args:
      query_BLNH: [B, L, N, H].
      key_BLKH: [B, L, K, H], K divides N.
      value_BLKH: [B, L, K, H].
      rates: float32 [H], [K, H] or [N, H] of `hope_rates`, 1/token; with a gradient.
      positions: [B, L] int32, never decreasing inside a segment (checked outside of jit); only differences matter.
        None: 0 .. L - 1.
      segment_ids: [B, L] int32, or None for one segment.
      causal: must be True.
      options: `window`, `scale`, `softcap`, `slopes`, `sink`, `max_rate`, `implementation`, as in `attend`.
    Returns: [B, L, N, H] in the dtype of the query.
    Raises: ValueError for non-causal use, positions of another shape or order, and whatever `attend` refuses.

    Source: Dai et al. 2025, arXiv:2509.05218, section 3; scores in the basis of `jaxlm.nn.hope`.
    """
    if not causal:
        raise ValueError("HoPE is causal: scores decay from query to past key; give an encoder Rope() or Nope()")
    clock = None
    if positions is not None:
        check_positions(positions, query_BLNH.shape[:2], segment_ids)
        clock = relative_clock(positions, segment_ids)
    return attend(query_BLNH, key_BLKH, value_BLKH, rates=rates, clock=clock, segment_ids=segment_ids, **options)
