# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters as leaves beside kernels: added, and merged back.  I inputs, O outputs, r rank, L layers."""

import dataclasses
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn.config import Lora
from jaxlm.nn.decoder import Model

LEAVES = ("lora_a", "lora_b")


def adapted(model: Model, lora: Lora) -> Model:
    """The model that reads adapters at `lora.scale`; its other numbers stay."""
    return dataclasses.replace(model, config=dataclasses.replace(model.config, adapter_scale=lora.scale))


def add_lora(params: Mapping[str, Any], lora: Lora, key: jax.Array) -> dict[str, Any]:
    """Puts `lora_a` [.., I, r], random, and `lora_b` [.., r, O], zero, beside every kernel that a target names.

    The function of the model does not change until `lora_b` moves.  Use `adapted(model, lora)` to read them.

    Args:
      params: without adapters; not changed.
      lora: rank, and targets that must each match something.
      key: for `lora_a`; each adapter depends on it and on its own path only.
    Returns: a new tree that shares the other leaves.
    Raises: ValueError for a target without a kernel, one that names an embedding or a tied head, a rank below 1, or a
      tree that has adapters already.
    """
    if lora.rank < 1:
        raise ValueError(f"lora rank must be at least 1, got {lora.rank}")
    paths = [path for path, _ in _maps(params)]
    if adapters := [path for path, p in _maps(params) if LEAVES[0] in p]:
        raise ValueError(f"{adapters[0]!r} has an adapter already: merge it first")
    for pattern in lora.targets:
        for table in ("embed", "positions", *(() if "head" in params else ("head",))):
            if re.fullmatch(pattern, table) or re.fullmatch(pattern, f"{table}/table"):
                raise ValueError(_refusal(table, pattern))
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(f"lora target {pattern!r} matches no kernel; there are {paths}")

    def add(path, p):
        if not any(re.fullmatch(pattern, path) for pattern in lora.targets):
            return p
        *lead, inputs, outputs = p["kernel"].shape
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.normal(path_key, (*lead, inputs, lora.rank), jnp.float32) / inputs**0.5
        return {**p, "lora_a": a, "lora_b": jnp.zeros((*lead, lora.rank, outputs), jnp.float32)}

    return _replace(params, add)


def merge_lora(params: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Kernels with their adapters added, kernel + scale * lora_a @ lora_b in float32, and no adapters.

    Args:
      params: a tree with adapters; not changed.
      scale: alpha / rank, `Lora.scale`.
    Returns: a tree of the shape it had before `add_lora`, kernels in their own dtype.
    Raises: ValueError if there is no adapter, or one stands beside an embedding table.
    """
    for table in ("embed", "positions"):
        if LEAVES[0] in params.get(table, {}):
            raise ValueError(_refusal(table, f"{table}/{LEAVES[0]}"))
    if not any(LEAVES[0] in p for _, p in _maps(params)):
        raise ValueError("there is no adapter to merge: add_lora puts lora_a and lora_b beside kernels")

    def merge(path, p):
        if LEAVES[0] not in p:
            return p
        a, b = (p[name].astype(jnp.float32) for name in LEAVES)
        delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        kernel = (p["kernel"].astype(jnp.float32) + scale * delta).astype(p["kernel"].dtype)
        return {name: leaf for name, leaf in p.items() if name not in LEAVES} | {"kernel": kernel}

    return _replace(params, merge)


def merge_drift(model: Model, params: Mapping[str, Any], merged: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
    """Largest absolute difference of logits between adapters and merged kernels on `tokens` [B, T]; [] float32."""
    model = dataclasses.replace(model, pieces=None)  # the tokens are few, and as many as they are

    def drift(before: Mapping[str, Any], after: Mapping[str, Any], tokens: jax.Array) -> jax.Array:
        first, second = (model.logits(tree, model.apply(tree, tokens)) for tree in (before, after))
        return jnp.max(jnp.abs(first - second))

    return jax.jit(drift)(params, merged, tokens)


def _refusal(table: str, pattern: str) -> str:
    if table == "head":
        return f"lora target {pattern!r} names the head, tied to embed/table: untie it (tied=False) or leave it out"
    return f"an adapter on {table}/table is refused ({pattern!r}): a table that is looked up, or tied, has no kernel"


def _maps(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every dict that holds a kernel, with its path."""
    if "kernel" in tree:
        yield path, tree
        return
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _maps(value, f"{path}/{name}" if path else name)


def _replace(tree: Mapping[str, Any], change: Any, path: str = "") -> dict[str, Any]:
    """The tree with every dict that holds a kernel replaced by `change(path, dict)`."""
    if "kernel" in tree:
        return dict(change(path, tree))
    new = {}
    for name, value in tree.items():
        below = f"{path}/{name}" if path else name
        new[name] = _replace(value, change, below) if isinstance(value, Mapping) else value
    return new
