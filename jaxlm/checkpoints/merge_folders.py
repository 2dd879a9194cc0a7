# SPDX-License-Identifier: Apache-2.0
"""Merges folders of safetensors, tensor by tensor: memory holds a few pieces of one tensor, of any size."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoints.mapped_tensors import TYPES, Entry, MappedTensors, shards, write_header, write_index
from jaxlm.checkpoints.merge_recipes import Recipe, Tensor, Transplant, merged_piece
from jaxlm.weights.alike import check_same_shapes

_COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_SAME = (  # what must agree beyond the shapes of the tensors
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "tie_word_embeddings",
    "hidden_act",
)
_OUT = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def merge_folders(
    recipe: Recipe,
    models: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    max_shard_bytes: float = 5e9,
) -> str:
    """Merges models on disk into a new folder, which appears whole or not at all.

    Arithmetic is float32 and that of `jaxlm.weights`, one vector a tensor: their layout has one tensor a layer, ours
    one slice, so both give the same model. Beside the maps of the files a few pieces of 2^18 entries are in memory;
    where a cut of `Ties` falls among equal task vector entries, 4 bytes for each of those.

    Args:
      recipe: `Linear`, `Soup`, `Slerp`, `TaskArithmetic`, `Ties`, `Dare` or `Transplant` with its numbers.
      models: folders (or single safetensors files) with the same tensors.
      target: a folder that does not exist yet or is empty; config and tokenizer are copied from the base, or the first.
      base: folder of the common base, for the recipes that have one.
      dtype: "float32", "bfloat16" or "float16" of the result; None: what holds the types of all models, each tensor.
      max_shard_bytes: > 0, size of one file.
    Returns: one line that says what was done.
    Raises: ValueError that names the tensor (both shapes or vocabulary sizes), the key of the config, the token, or the
      NaN, that stands in the way; OSError if the disk is full. Nothing is left behind.
    """
    target = pathlib.Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is not an empty folder: nothing is overwritten, give another path")
    if dtype is not None and dtype not in _OUT:
        raise ValueError(f"dtype must be one of {', '.join(_OUT)}, got {dtype!r}")
    if recipe.based != (base is not None):
        need = "needs the common base" if recipe.based else "has no base"
        raise ValueError(f"{type(recipe).__name__.lower()} {need}: see its options")
    recipe = _hashable(recipe)
    recipe.check(len(models))
    given = ([] if base is None else [base]) + list(models)
    sources = [MappedTensors(path) for path in given]
    for other in sources[1:]:
        _check_tensors(sources[0], other)
        _check_texts(pathlib.Path(sources[0].called), pathlib.Path(other.called))
    sources += _more_sources(recipe, sources[0])
    entries = [_merged_entry(name, sources[: len(given)], dtype) for name in sources[0].entries]
    files = shards(entries, max_shard_bytes)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        for file, held in files.items():
            with (partial / file).open("wb") as stream:
                write_header(stream, held)
                for entry in held:
                    _write(stream, entry, recipe, sources, len(given))
                stream.flush()
                os.fsync(stream.fileno())
        if len(files) > 1:
            write_index(partial, files)
        _copy_texts(pathlib.Path(sources[0].called), partial, dtype)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    size = sum(entry.num_bytes for entry in entries)
    return f"{recipe} of {len(models)} models: {len(entries)} tensors, {size / 1e6:.1f} MB in {len(files)} files"


def _hashable(recipe: Any) -> Any:
    """With tuples for lists: the compiler's cache looks recipes up."""
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return dataclasses.replace(recipe, **{name: tuple(v) for name, v in values.items() if isinstance(v, list)})


def _write(stream: IO[bytes], entry: Entry, recipe: Recipe, sources: Sequence[MappedTensors], num_checked: int) -> None:
    """One tensor of the result."""
    flats = [source.flat(entry.name) for source in sources]
    if not _is_float(entry.dtype):
        for source, flat in zip(sources[1:num_checked], flats[1:num_checked], strict=True):
            if not np.array_equal(flat, flats[0]):
                raise ValueError(f"{entry.name} is {entry.dtype} and differs in {source.called}: it cannot be merged")
        stream.write(flats[0].data)
        return
    tensor = Tensor(entry.name, flats)
    known = recipe.look(tensor)
    waiting: list[tuple[Any, int]] = []  # one piece is made while the one before is written
    finite = []
    for start, count in tensor.starts():
        merged, fine = merged_piece(
            recipe,
            known,
            np.uint32(start % 2**32),
            tensor.piece(start, count),
            num_checked=num_checked,
            dtype=entry.dtype,
        )
        finite.append(fine)
        waiting.append((merged, count))
        if len(waiting) > 1:
            _flush(stream, waiting)
    _flush(stream, waiting)
    bad = ~np.all(np.array(finite, bool).reshape(-1, num_checked), axis=0)
    if bad.any():
        where = sources[int(np.argmax(bad))].called
        raise ValueError(f"{entry.name} holds a NaN or an infinity in {where}: it cannot be merged")


def _flush(stream: IO[bytes], waiting: list[tuple[Any, int]]) -> None:
    if waiting:
        piece, count = waiting.pop(0)
        stream.write(np.asarray(piece)[:count].view(np.uint8).data)


def _is_float(dtype: np.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _merged_entry(name: str, sources: Sequence[MappedTensors], dtype: str | None) -> Entry:
    found = [source.entries[name] for source in sources]
    kind = found[0].dtype
    if any(_is_float(entry.dtype) != _is_float(kind) for entry in found):
        raise ValueError(f"{name} is {kind} in {sources[0].called} and not in all others: it cannot be merged")
    if _is_float(kind):
        kind = TYPES[_OUT[dtype]] if dtype else np.dtype(jnp.result_type(*(entry.dtype for entry in found)))
    return Entry(name, kind, found[0].shape)


def _more_sources(recipe: Recipe, first: MappedTensors) -> list[MappedTensors]:
    """The cores and the origin of a transplant."""
    if not isinstance(recipe, Transplant):
        return []
    cores = [MappedTensors(path) for path in recipe.cores]
    for core in cores:
        _check_tensors(first, core)
        for name, entry in core.entries.items():
            if entry.dtype != bool:
                raise ValueError(f"{name} is {entry.dtype} in {core.called}: a core holds bools")
    origin = [MappedTensors(recipe.origin)] if recipe.origin is not None else []
    for source in origin:
        _check_tensors(first, source)
    return cores + origin


def _check_tensors(first: MappedTensors, other: MappedTensors) -> None:
    here, there = ({name: entry.shape for name, entry in source.entries.items()} for source in (first, other))
    check_same_shapes(here, there, (first.called, other.called))


def _check_texts(first: pathlib.Path, other: pathlib.Path) -> None:
    """Configs agree where the shapes cannot tell, and tokens have the same numbers."""
    ours, theirs = _read(first / "config.json"), _read(other / "config.json")
    for key in _SAME:
        if key in ours and key in theirs and ours[key] != theirs[key]:
            raise ValueError(
                f"{key} is {theirs[key]!r} in {other}/config.json and {ours[key]!r} in {first}/config.json"
            )
    ours, theirs = _tokens(first), _tokens(other)
    if ours and theirs and ours != theirs:
        token = next(t for t in [*ours, *theirs] if ours.get(t) != theirs.get(t))
        raise ValueError(
            f"the tokenizers differ: {token!r} is token {theirs.get(token)} of {len(theirs)} in {other}, "
            f"{ours.get(token)} of {len(ours)} in {first}"
        )


def _read(file: pathlib.Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _tokens(folder: pathlib.Path) -> dict[str, int]:
    tokenizer = _read(folder / "tokenizer.json")
    known = tokenizer.get("model", {}).get("vocab", {})
    listed = known if isinstance(known, dict) else {piece[0]: number for number, piece in enumerate(known)}
    return listed | {added["content"]: added["id"] for added in tokenizer.get("added_tokens", [])}


def _copy_texts(source: pathlib.Path, target: pathlib.Path, dtype: str | None) -> None:
    """Config and tokenizer, with the new type in the config."""
    if not source.is_dir():
        return
    for pattern in _COPIED:
        for file in sorted(source.glob(pattern)):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)
    config = _read(target / "config.json")
    if dtype and config:
        for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
            config[key] = dtype
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
