# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens without ever holding the logits of all of them.

Tokens go through the head in chunks along T, so that a batch whose rows lie on several devices stays where it is.
B rows, T tokens of a row, P pieces that a row is cut into, each then a row of its own, C chunks, S tokens of a row in a
chunk, R = P*B*S tokens of a chunk, G groups of rows, D width, V vocabulary.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Tokens of a group of rows whose logits are held at once. On CPU as many as its caches like (docs/benchmarks/step.md);
# accelerators want taller products.
CHUNK, CPU_CHUNK = 1024, 256


class NllResult(NamedTuple):
    """What one pass through the head gives; only `total` carries a gradient.

    Attributes:
      total: [] float32, `sum_bt w * (-log p + z_loss * lse**2)` in nats.
      z_total: [] float32, `sum_bt w * lse**2`, the part of `total` that `z_loss` scales.
      log_probs_BT: [B, T] float32, log p(target), nats.
      correct_BT: [B, T] bool, the target is the first argmax of the logits.
    """

    total: jax.Array
    z_total: jax.Array
    log_probs_BT: jax.Array
    correct_BT: jax.Array


class _Options(NamedTuple):
    """The static numbers: hashable, so that they can stay outside of differentiation."""

    chunk: int
    softcap: float | None
    z_loss: float
    groups: int  # of pieces of rows
    pieces: int  # of a row


def weighted_nll(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    groups: int | tuple[int, int] = 1,
) -> NllResult:
    """Weighted negative log-likelihood of the targets; the gradient is made in the forward pass, nothing is recomputed.

        logits = hidden @ head, or softcap * tanh(hidden @ head / softcap);  lse = logsumexp(logits)
        total = sum_bt w_bt * (lse_bt - logits_bt[target_bt] + z_loss * lse_bt ** 2)

    Products take the dtype of `hidden` and accumulate in float32; everything after them is float32. When nothing is
    differentiated no gradient is computed.

    Args:
      hidden_BTD: [B, T, D], float32 or bfloat16.
      head_DV: [D, V], any float; cast to the dtype of `hidden`, its gradient is summed in float32.
      targets_BT: [B, T] int32 in [0, V); where the weight is 0 any such value does.
      weights_BT: [B, T] float32, 0 leaves a token out. Differentiable.
      chunk: tokens whose logits are held at once, counted over the rows of a group; at least one token a row is taken.
        None: 256 on CPU, else 1024.
      softcap: > 0, or None for none (Gemma 2).
      z_loss: >= 0, pulls the log-partition to 0 (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, section 5).
      groups: consecutive rows are cut into that many, and the head's gradient is summed apart in each: with a group a
        device it crosses devices once, and not once a chunk. Divides B. A pair: the second number is of the pieces that
        the tokens of each row are cut into, where these too lie on several devices; it divides T.
    Returns: `NllResult`.
    Raises: ValueError for shapes that do not fit or numbers out of range.

    >>> result = weighted_nll(jnp.ones((1, 2, 4)), jnp.zeros((4, 8)), jnp.array([[1, 2]]), jnp.ones((1, 2)))
    >>> print(f"{result.total:.4f}")  # 2 * log(8)
    4.1589
    """
    options = _check(hidden_BTD, head_DV, targets_BT, chunk, softcap, groups)._replace(z_loss=z_loss)
    if weights_BT.shape != targets_BT.shape:
        raise ValueError(
            f"weights have the shape {weights_BT.shape}, targets {targets_BT.shape}: give one weight a token"
        )
    if z_loss < 0:
        raise ValueError(f"z_loss must be >= 0, got {z_loss}: a negative one drives the log-partition away from 0")
    total, (z_total, log_probs_BT, correct_BT) = _nll(hidden_BTD, head_DV, targets_BT, weights_BT, options)
    return NllResult(total, *jax.lax.stop_gradient((z_total, log_probs_BT)), correct_BT)


def token_log_probs(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    chunk: int | None = None,
    softcap: float | None = None,
    groups: int | tuple[int, int] = 1,
) -> jax.Array:
    """log p(target) of every token, differentiable with any cotangent; the backward pass makes the logits again.

    For losses that are no weighted sum of log-probs (preferences, ratios); for weighted sums `weighted_nll` is
    cheaper by one product. Arguments and errors as there.

    Returns: [B, T] float32, nats.

    >>> token_log_probs(jnp.ones((1, 2, 4)), jnp.zeros((4, 8)), jnp.array([[1, 2]])).round(4).tolist()
    [[-2.079400062561035, -2.079400062561035]]
    """
    options = _check(hidden_BTD, head_DV, targets_BT, chunk, softcap, groups)
    return _log_probs(hidden_BTD, head_DV, targets_BT, options)


def _check(hidden_BTD, head_DV, targets_BT, chunk, softcap, groups) -> _Options:
    """The options to use; raises ValueError for what does not fit."""
    if hidden_BTD.ndim != 3 or head_DV.ndim != 2 or hidden_BTD.shape[2] != head_DV.shape[0]:
        raise ValueError(f"hidden [B, T, D] and head [D, V] do not fit: {hidden_BTD.shape} and {head_DV.shape}")
    if targets_BT.shape != hidden_BTD.shape[:2]:
        raise ValueError(
            f"targets have the shape {targets_BT.shape}, hidden {hidden_BTD.shape}: give one target a token"
        )
    if chunk is None:
        chunk = CPU_CHUNK if jax.default_backend() == "cpu" else CHUNK
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be > 0, got {softcap}: None switches it off")
    rows, pieces = groups if isinstance(groups, tuple) else (groups, 1)
    if rows < 1 or hidden_BTD.shape[0] % rows or pieces < 1 or hidden_BTD.shape[1] % pieces:
        raise ValueError(
            f"groups must be at least 1 and divide the {hidden_BTD.shape[0]} rows, of a pair the second number the "
            f"{hidden_BTD.shape[1]} tokens, got {groups}"
        )
    return _Options(chunk, softcap, 0.0, rows * pieces, pieces)


def _cut(x_BT, options: _Options):
    """[B, T, ...] -> [C, P*B, S, ...], the tails padded with zeros."""
    if options.pieces > 1:  # those of one group become neighbours, so that all stay where they are
        groups = options.groups // options.pieces
        x_BT = x_BT.reshape(groups, -1, options.pieces, x_BT.shape[1] // options.pieces, *x_BT.shape[2:])
        x_BT = jnp.moveaxis(x_BT, 2, 1).reshape(-1, *x_BT.shape[3:])
    rows, length = x_BT.shape[:2]
    count = math.ceil(length / max(1, options.chunk * options.groups // rows))
    size = math.ceil(length / count)
    padded = jnp.pad(x_BT, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x_BT.ndim - 2))
    return jnp.moveaxis(padded.reshape(rows, count, size, *x_BT.shape[2:]), 1, 0)


def _join(x_CBS, length: int, options: _Options):
    """The inverse of `_cut`."""
    joined = jnp.moveaxis(x_CBS, 0, 1)
    joined = joined.reshape(joined.shape[0], -1, *x_CBS.shape[3:])[:, : length // options.pieces]
    if options.pieces > 1:
        joined = joined.reshape(options.groups // options.pieces, options.pieces, -1, *joined.shape[1:])
        joined = jnp.moveaxis(joined, 1, 2).reshape(-1, length, *joined.shape[4:])
    return joined


def _logits(h_RD, head_DV, softcap):
    logits_RV = jnp.dot(h_RD, head_DV, preferred_element_type=jnp.float32)
    return logits_RV if softcap is None else softcap * jnp.tanh(logits_RV / softcap)


class _Measured(NamedTuple):
    """Of one chunk: exp(logits - maximum) [R, V] and its sum; log-sum-exp, log p(target), whether it is the argmax."""

    powers_RV: jax.Array
    sum_R: jax.Array
    lse_R: jax.Array
    log_probs_R: jax.Array
    correct_R: jax.Array


def _measure(logits_RV, targets_R) -> _Measured:
    top_R = jnp.max(logits_RV, axis=1)
    powers_RV = jnp.exp(logits_RV - top_R[:, None])
    sum_R = jnp.sum(powers_RV, axis=1)
    lse_R = top_R + jnp.log(sum_R)
    # A gather: a masked sum writes and reads the chunk once more (docs/benchmarks/step.md).
    target_R = jnp.take_along_axis(logits_RV, targets_R[:, None], axis=1)[:, 0]
    earlier_RV = jax.lax.broadcasted_iota(targets_R.dtype, logits_RV.shape, 1) < targets_R[:, None]
    as_high_R = jnp.any((logits_RV == top_R[:, None]) & earlier_RV, axis=1)
    return _Measured(powers_RV, sum_R, lse_R, target_R - lse_R, (target_R >= top_R) & ~as_high_R)


def _pull(logits_RV, measured: _Measured, targets_R, spread_R, picked_R, softcap):
    """`spread * softmax - picked * onehot`, through the soft-cap: the gradient of the logits."""
    is_target_RV = jax.lax.broadcasted_iota(targets_R.dtype, logits_RV.shape, 1) == targets_R[:, None]
    spread_RV = measured.powers_RV * (spread_R / measured.sum_R)[:, None]
    d_RV = spread_RV - jnp.where(is_target_RV, picked_R[:, None], 0.0)
    return d_RV if softcap is None else d_RV * (1.0 - jnp.square(logits_RV / softcap))


def _rows(part):
    """[B, S, ...] -> [B*S, ...]; B stays the slow dimension, so rows on several devices stay there."""
    return part.reshape(-1, *part.shape[2:])


def _backward_products(h_RD, head_DV, d_RV, groups: int):
    """d_hidden [R, D], and d_head [D, V] float32 or, with groups, [G, D, V], to be summed when all chunks are done."""
    d_RV = d_RV.astype(h_RD.dtype)
    d_h_RD = jnp.dot(d_RV, head_DV.T, preferred_element_type=jnp.float32)
    if groups == 1:  # on CPU rows as the one contracted dimension are the fast path
        d_head = jnp.dot(h_RD.T, d_RV, preferred_element_type=jnp.float32)
    else:
        h_GRD, d_GRV = (x.reshape(groups, -1, x.shape[1]) for x in (h_RD, d_RV))
        d_head = jnp.einsum("GRD,GRV->GDV", h_GRD, d_GRV, preferred_element_type=jnp.float32)
    return d_h_RD.astype(h_RD.dtype), d_head


def _zeros(head_DV, groups: int):
    return jnp.zeros(head_DV.shape if groups == 1 else (groups, *head_DV.shape), jnp.float32)


def _whole(d_head, head_DV):
    """The gradient of the head, its groups summed."""
    return (d_head if d_head.ndim == 2 else jnp.sum(d_head, axis=0)).astype(head_DV.dtype)


def _scan_nll(hidden_BTD, head_DV, targets_BT, weights_BT, options: _Options, differentiate: bool):
    cast_DV = head_DV.astype(hidden_BTD.dtype)

    def step(carry, part):
        h_RD, targets_R, weights_R = map(_rows, part)
        logits_RV = _logits(h_RD, cast_DV, options.softcap)
        measured = _measure(logits_RV, targets_R)
        outputs = [x.reshape(part[1].shape) for x in (measured.log_probs_R, measured.lse_R, measured.correct_R)]
        if not differentiate:
            return carry, (outputs, None)
        spread_R = weights_R * (1.0 + 2.0 * options.z_loss * measured.lse_R)
        d_RV = _pull(logits_RV, measured, targets_R, spread_R, weights_R, options.softcap)
        d_h_RD, d_head = _backward_products(h_RD, cast_DV, d_RV, options.groups)
        return carry + d_head, (outputs, d_h_RD.reshape(part[0].shape))

    parts = tuple(_cut(x, options) for x in (hidden_BTD, targets_BT, weights_BT.astype(jnp.float32)))
    zeros = _zeros(head_DV, options.groups) if differentiate else None
    d_head, (outputs, d_hidden_CBSD) = jax.lax.scan(step, zeros, parts)
    log_probs_BT, lse_BT, correct_BT = (_join(x, targets_BT.shape[1], options) for x in outputs)
    square_BT = jnp.square(lse_BT)
    cost_BT = options.z_loss * square_BT - log_probs_BT
    z_total = jnp.sum(weights_BT * square_BT)
    result = jnp.sum(weights_BT * cost_BT), (z_total, log_probs_BT, correct_BT)
    if d_head is None:
        return result, None
    return result, (_join(d_hidden_CBSD, targets_BT.shape[1], options), _whole(d_head, head_DV), cost_BT)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(hidden_BTD, head_DV, targets_BT, weights_BT, options):
    return _scan_nll(hidden_BTD, head_DV, targets_BT, weights_BT, options, False)[0]


def _nll_forward(hidden_BTD, head_DV, targets_BT, weights_BT, options):
    return _scan_nll(hidden_BTD, head_DV, targets_BT, weights_BT, options, True)


def _nll_backward(options, gradients, cotangent):
    g = cotangent[0]
    d_hidden_BTD, d_head_DV, cost_BT = gradients
    return g.astype(d_hidden_BTD.dtype) * d_hidden_BTD, g.astype(d_head_DV.dtype) * d_head_DV, None, g * cost_BT


_nll.defvjp(_nll_forward, _nll_backward)


def _scan_log_probs(hidden_BTD, head_DV, targets_BT, options: _Options):
    cast_DV = head_DV.astype(hidden_BTD.dtype)

    def step(_, part):
        h_RD, targets_R = map(_rows, part)
        measured = _measure(_logits(h_RD, cast_DV, options.softcap), targets_R)
        return None, measured.log_probs_R.reshape(part[1].shape)

    _, log_probs_CBS = jax.lax.scan(step, None, (_cut(hidden_BTD, options), _cut(targets_BT, options)))
    return _join(log_probs_CBS, targets_BT.shape[1], options)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_probs(hidden_BTD, head_DV, targets_BT, options):
    return _scan_log_probs(hidden_BTD, head_DV, targets_BT, options)


def _log_probs_forward(hidden_BTD, head_DV, targets_BT, options):
    return _scan_log_probs(hidden_BTD, head_DV, targets_BT, options), (hidden_BTD, head_DV, targets_BT)


def _log_probs_backward(options, residuals, cotangent_BT):
    hidden_BTD, head_DV, targets_BT = residuals
    cast_DV = head_DV.astype(hidden_BTD.dtype)

    def step(carry, part):
        h_RD, targets_R, g_R = map(_rows, part)
        logits_RV = _logits(h_RD, cast_DV, options.softcap)
        d_RV = _pull(logits_RV, _measure(logits_RV, targets_R), targets_R, -g_R, -g_R, options.softcap)
        d_h_RD, d_head = _backward_products(h_RD, cast_DV, d_RV, options.groups)
        return carry + d_head, d_h_RD.reshape(part[0].shape)

    parts = tuple(_cut(x, options) for x in (hidden_BTD, targets_BT, cotangent_BT))
    d_head, d_hidden_CBSD = jax.lax.scan(step, _zeros(head_DV, options.groups), parts)
    return _join(d_hidden_CBSD, targets_BT.shape[1], options), _whole(d_head, head_DV), None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)
