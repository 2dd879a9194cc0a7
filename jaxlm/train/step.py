# SPDX-License-Identifier: Apache-2.0
"""The one train step: the only place that differentiates, and the only place that divides.

terms: {name: Term(total, weight)}, sums over the rows of one part; parts: micro-batches of one update.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.losses.term import Term
from jaxlm.train.mesh import ROWS, check_rows, replicated, rows
from jaxlm.train.phase import Batch, Phase
from jaxlm.train.state import State
from jaxlm.transforms.isolation import isolation_metrics

Metrics = dict[str, Any]


def make_train_step(
    phase: Phase, *, mesh: jax.sharding.Mesh, shardings: State, num_parts: int = 1
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Compiles `phase` into `(state, batch) -> (state, metrics)`. The state handed in is donated.

        weight_i = sum over parts of weight_i(part)
        gradient = d/dparams sum over parts and i of coefficient_i * total_i(params, part) / weight_i

    Args:
      phase: its `loss_fn`, `tx` and `extra`; the other slots are the loop's.
      mesh: axes data, fsdp, tensor.
      shardings: of the state, from `state_shardings`.
      num_parts: micro-batches; part p takes every num_parts-th row, so that no row leaves its device.
    Returns: a jitted function. Leaves of `batch` are `[rows, ...]`, rows divided over data and fsdp. Metrics, float32
      and whole on every device: each term's `total / weight` (NaN where a metric's weight is 0), "objective",
      "gradient_norm" (of the leaves that train), "update_norm", "learning_rate" if `tx` tells it, "isolation/..." if
      `tx` holds entries (`jaxlm.transforms.isolation_metrics`), "finite" (bool), "empty" (bool, no term of the
      objective has any weight), "weights" (name -> weight) and, if the batch has `segment_ids`, "tokens" (those in a
      segment).

    A term without weight adds nothing. Key of part p at step s: `fold_in(fold_in(state.rng, s), p)`.
    """
    whole = replicated(mesh)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        check_rows(mesh, jax.tree.leaves(batch)[0].shape[0], num_parts)
        rng = jax.random.fold_in(state.rng, state.step)
        tx, extra = optax.with_extra_args_support(phase.tx), phase.extra(batch)
        trained = trained_leaves(tx, state, extra)
        leaves, treedef = jax.tree.flatten(state.params)

        def terms_of(chosen: list[jax.Array], part: Batch, index: jax.Array | int) -> dict[str, Term]:
            those = iter(chosen)
            merged = [next(those) if t else x for t, x in zip(trained, leaves, strict=True)]
            return phase.loss_fn(jax.tree.unflatten(treedef, merged), part, jax.random.fold_in(rng, index))

        chosen = [x for t, x in zip(trained, leaves, strict=True) if t]
        if num_parts == 1:
            grads, totals, weights = differentiate(lambda x: terms_of(x, batch, 0), chosen, None)
        else:
            places = [s for t, s in zip(trained, jax.tree.leaves(shardings.params), strict=True) if t]
            grads, totals, weights = accumulate(terms_of, chosen, cut(batch, num_parts, mesh), num_parts, places)
        # A leaf that does not train is not differentiated; what stands in its place is never read.
        found = iter(grads)
        full = [next(found) if t else jnp.zeros_like(x) for t, x in zip(trained, leaves, strict=True)]
        updates, opt_state = tx.update(jax.tree.unflatten(treedef, full), state.opt_state, state.params, **extra)
        metrics = reduce(totals, weights)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        metrics["update_norm"] = optax.tree.norm(updates)
        metrics["finite"] = jnp.isfinite(metrics["objective"]) & jnp.isfinite(metrics["update_norm"])
        if rates := optax.tree.get_all_with_path(opt_state, "learning_rate"):
            metrics["learning_rate"] = rates[0][1]
        metrics |= isolation_metrics(opt_state)
        if "segment_ids" in batch:
            metrics["tokens"] = jnp.sum(batch["segment_ids"] != 0)
        return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.rng), metrics

    return jax.jit(step, donate_argnums=0, in_shardings=(shardings, rows(mesh)), out_shardings=(shardings, whole))


def cut(batch: Batch, num_parts: int, mesh: jax.sharding.Mesh) -> Batch:
    """`[rows, ...]` to `[num_parts, rows / num_parts, ...]`; part p takes rows p, p + num_parts, ...

    Consecutive rows lie on one device, so each device cuts what it has.
    """
    place = NamedSharding(mesh, P(None, ROWS))

    def one(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(-1, num_parts, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(x, place)

    return jax.tree.map(one, batch)


def differentiate(
    terms_of: Callable[[Any], dict[str, Term]], params: Any, weights: dict[str, jax.Array] | None
) -> tuple[Any, dict[str, Term], dict[str, jax.Array]]:
    """Gradient of the objective, the terms and their weights; `weights` None: those of these terms alone."""

    def objective(params: Any) -> tuple[jax.Array, tuple[dict[str, Term], dict[str, jax.Array]]]:
        terms = terms_of(params)
        check_terms(terms)
        shares = {name: term.weight for name, term in terms.items()} if weights is None else weights
        shares = jax.lax.stop_gradient(shares)
        parts = [t.coefficient * t.total / some(shares[name]) for name, t in terms.items() if t.coefficient]
        return sum(parts, jnp.float32(0)), (terms, shares)

    grads, (terms, shares) = jax.grad(objective, has_aux=True)(params)
    return grads, terms, shares


def accumulate(
    terms_of: Callable[[Any, Batch, Any], dict[str, Term]],
    params: Any,
    parts: Batch,
    num_parts: int,
    places: Any,
) -> tuple[Any, dict[str, Term], dict[str, jax.Array]]:
    """`differentiate` over parts, one after the other, with the weights of all of them."""
    indexed = (jnp.arange(num_parts), parts)

    def weigh(x: tuple[jax.Array, Batch]) -> dict[str, jax.Array]:
        # Weights depend on the batch only, so the compiler drops the model from this pass.
        return {name: term.weight for name, term in terms_of(params, x[1], x[0]).items()}

    weights = jax.tree.map(lambda w: jnp.sum(w, axis=0), jax.lax.map(weigh, indexed))

    def add(sums: Any, x: tuple[jax.Array, Batch]) -> tuple[Any, dict[str, Term]]:
        grads, terms, _ = differentiate(lambda p: terms_of(p, x[1], x[0]), params, weights)
        sums = jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads)
        return jax.lax.with_sharding_constraint(sums, places), terms

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    sums, terms = jax.lax.scan(add, jax.lax.with_sharding_constraint(zeros, places), indexed)
    return sums, jax.tree.map(lambda x: jnp.sum(x, axis=0), terms), weights


def reduce(terms: dict[str, Term], weights: dict[str, jax.Array]) -> Metrics:
    """Every term divided, once, and the objective they make."""
    metrics: Metrics = {name: term.total / some(weights[name]) for name, term in terms.items()}
    metrics["objective"] = sum(t.coefficient * metrics[name] for name, t in terms.items() if t.coefficient)
    for name, term in terms.items():
        if not term.coefficient:
            metrics[name] = jnp.where(weights[name] > 0, metrics[name], jnp.nan)
    metrics["empty"] = ~jnp.any(jnp.stack([weights[name] > 0 for name, t in terms.items() if t.coefficient]))
    return metrics | {"weights": weights}


def some(weight: jax.Array) -> jax.Array:
    """A weight to divide by: 1 where there is none, and there the total is 0."""
    return jnp.where(weight > 0, weight, 1.0)


def check_terms(terms: dict[str, Term]) -> None:
    """Raises ValueError, while tracing, for terms that make no objective."""
    if not any(term.coefficient for term in terms.values()):
        raise ValueError(f"the loss returns only metrics (coefficient 0): {sorted(terms)}; there is nothing to learn")
    for name, term in terms.items():
        if term.total.shape != term.weight.shape or (term.coefficient and term.total.shape):
            raise ValueError(
                f"term {name!r}: total {term.total.shape} and weight {term.weight.shape} must be scalars of one "
                "objective, or for a metric (coefficient 0) vectors of one shape"
            )


def trained_leaves(tx: optax.GradientTransformationExtraArgs, state: State, extra: Mapping[str, Any]) -> list[bool]:
    """For every parameter leaf: does anything that the optimizer returns depend on its gradient?

    Found by tracing `tx.update` and walking back from its results. A leaf for which the answer is no, as under
    `freeze`, is not differentiated at all, on every backend, inside layer scans and with micro-batches.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state.params, state.opt_state, extra))
    params, opt_state, told = shapes
    jaxpr = jax.make_jaxpr(lambda g, s, p, e: tx.update(g, s, p, **e))(params, opt_state, params, told).jaxpr
    needed = {id(v) for v in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(v) in needed for v in equation.outvars):
            needed.update(id(v) for v in equation.invars)
    return [id(v) in needed for v in jaxpr.invars[: len(jax.tree.leaves(params))]]
