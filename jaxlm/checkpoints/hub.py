# SPDX-License-Identifier: Apache-2.0
"""Loading: a Hugging Face folder or a GGUF file to a Model and its parameters, each process reading its own slices."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoints.config_reading import override, read_config
from jaxlm.checkpoints.families import HEAD, Family, Row, find_family
from jaxlm.checkpoints.sources import Tensors, config_values, open_tensors
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import Model
from jaxlm.weights.names import named_leaves, path_of

Shardings = Callable[[Any], Any]


def load(path: str | os.PathLike[str], *, shardings: Shardings | None = None, **overrides: Any) -> tuple[Model, Any]:
    """The model a checkpoint holds, and its parameters as float32.

    Args:
      path: a Hugging Face folder with safetensors, or a .gguf file.
      shardings: from the tree of parameter shapes to a congruent tree of shardings; a process then reads only the
        slices that its devices hold. None: all on this process's first device.
      overrides: fields of ModelConfig to change, such as dtype="bfloat16"; tied=False gives a tied model a head of its
        own, a copy of the embedding.
    Returns: `(model, params)`.
    Raises: ValueError for whatever would make the model another one than the checkpoint's: an unknown family or
      feature, tensors that are missing, unexpected or of another shape, a file that is missing or broken.
    """
    values = config_values(path)
    stored = read_config(values)
    model = Model(override(stored, overrides))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    tensors = open_tensors(path)
    rows = _rows(find_family(values["model_type"]), named_leaves(shapes), tensors.shapes, stored, model.config)
    _check_names(rows, named_leaves(shapes), tensors, find_family(values["model_type"]), str(path))
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(lambda _: here, shapes)
    else:
        placed = shardings(shapes)

    def leaf(key_path: Any, shape: Any, sharding: Any) -> jax.Array:
        row = rows[path_of(key_path)]
        return jax.make_array_from_callback(shape.shape, sharding, _reader(tensors, row, shape.shape))

    return model, jax.tree.map_with_path(leaf, shapes, placed)


def stacked(row: Row) -> bool:
    """Whether our leaf holds all layers."""
    return "{}" in row.theirs


def _rows(
    family: Family,
    leaves: Mapping[str, Any],
    names: Iterable[str],
    stored: ModelConfig,
    config: ModelConfig,
) -> dict[str, Row]:
    """Our path -> row, for the leaves of this model, under the names that this checkpoint uses."""
    rows = {row.ours: row for row in family.rows if row.ours in leaves}
    if absent := sorted(leaves.keys() - rows.keys()):
        raise ValueError(f"a {family.name} checkpoint holds no {absent[0]}: drop the override that asks for it")
    if stored.tied and not config.tied and HEAD.theirs not in names:
        rows[HEAD.ours] = dataclasses.replace(HEAD, theirs=rows["embed/table"].theirs)
    if not any(name.startswith(family.prefix) for name in names):  # saved without the model's outer class
        rows = {
            ours: dataclasses.replace(row, theirs=row.theirs.removeprefix(family.prefix)) for ours, row in rows.items()
        }
    return rows


def _their_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one tensor of theirs, from that of our leaf."""
    one = shape[1:] if stacked(row) else shape
    if row.how == "transpose":
        return one[::-1]
    return (*one[:-1], 3 * one[-1]) if row.how.startswith("third") else one


def _check_names(
    rows: Mapping[str, Row], leaves: Mapping[str, Any], tensors: Tensors, family: Family, path: str
) -> None:
    """Every tensor is wanted and there, with the shape that the config says."""
    expected: dict[str, tuple[int, ...]] = {}
    for ours, row in rows.items():
        shape = leaves[ours].shape
        for layer in range(shape[0] if stacked(row) else 1):
            expected[row.theirs.format(layer)] = _their_shape(row, shape)
    found = {name: shape for name, shape in tensors.shapes.items() if not _ignored(family, name)}
    if HEAD.theirs in found and HEAD.ours not in rows:
        _check_tied_head(tensors, rows["embed/table"].theirs, path)
        del found[HEAD.theirs]
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing == [HEAD.theirs]:
        raise ValueError(f"{path} lacks {HEAD.theirs}: if the embedding is to be the head, load with tied=True")
    if missing:
        raise ValueError(f"{path} lacks {_some(missing)}: do config.json and weights belong together?")
    if unknown:
        raise ValueError(f"{path} holds unknown tensors {_some(unknown)}: do config.json and weights belong together?")
    for ours in ("embed/table", "head/kernel"):
        if ours in rows and found[rows[ours].theirs][0] != expected[rows[ours].theirs][0]:
            name, has = rows[ours].theirs, found[rows[ours].theirs][0]
            raise ValueError(
                f"{path}: {name} has {has} rows, the config says vocab_size {expected[name][0]}: "
                f"if the difference is padding, load with vocab_size={has}"
            )
    if wrong := [f"{name} {found[name]} for {shape}" for name, shape in expected.items() if found[name] != shape]:
        raise ValueError(f"{path} has tensors of another shape, {_some(wrong)}: is config.json of the same checkpoint?")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _ignored(family: Family, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in family.ignored)


def _check_tied_head(tensors: Tensors, embedding: str, path: str) -> None:
    """A tied checkpoint may carry its head as well, if it is the embedding."""
    rows, width = shape = tensors.shapes[embedding]
    blocks = [(slice(i, min(i + 4096, rows)), slice(0, width)) for i in range(0, rows, 4096)]
    same = tensors.shapes[HEAD.theirs] == shape
    if not same or any((tensors.read(HEAD.theirs, at) != tensors.read(embedding, at)).any() for at in blocks):
        raise ValueError(f"{path}: the config ties head and embedding but {HEAD.theirs} differs: load with tied=False")


def _reader(tensors: Tensors, row: Row, shape: tuple[int, ...]) -> Callable[[Any], np.ndarray]:
    """Reads any slice of our leaf; asked twice for one slice (a replicated leaf), it reads once."""
    last: dict[Any, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in last:
            last.clear()
            last[bounds] = _read(tensors, row, bounds, shape)
        return last[bounds]

    return read


def _read(tensors: Tensors, row: Row, bounds: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> np.ndarray:
    """One slice of our leaf, layer by layer."""
    if not stacked(row):
        return _read_one(tensors, row, row.theirs, bounds, shape)
    (first, stop), *rest = bounds
    out = np.empty((stop - first, *(b - a for a, b in rest)), np.float32)
    for layer in range(first, stop):
        out[layer - first] = _read_one(tensors, row, row.theirs.format(layer), tuple(rest), shape[1:])
    return out


def _read_one(
    tensors: Tensors, row: Row, name: str, bounds: tuple[tuple[int, int], ...], shape: tuple[int, ...]
) -> np.ndarray:
    if row.how == "transpose":
        return np.ascontiguousarray(tensors.read(name, tuple(slice(*b) for b in bounds[::-1])).T)
    if row.how.startswith("third"):
        offset = int(row.how[-1]) * shape[-1]
        bounds = (*bounds[:-1], (bounds[-1][0] + offset, bounds[-1][1] + offset))
    return tensors.read(name, tuple(slice(*b) for b in bounds))
