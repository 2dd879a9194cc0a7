# SPDX-License-Identifier: Apache-2.0
"""Saving: a Model and its parameters as a folder that transformers loads."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxlm.checkpoints.config_writing import write_config
from jaxlm.checkpoints.families import FAMILIES, Row
from jaxlm.checkpoints.hub import stacked
from jaxlm.checkpoints.safetensors_folder import INDEX
from jaxlm.checkpoints.sources import config_values, is_gguf
from jaxlm.checkpoints.tokenizer import load_tokenizer
from jaxlm.nn.decoder import Model
from jaxlm.weights.names import named_leaves

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_Piece = tuple[str, list[Row], int | None]  # their name, our rows joined along the last dimension, layer


def save(
    path: str | os.PathLike[str],
    model: Model,
    params: Any,
    *,
    tokenizer: Any = None,
    family: str | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes config.json, float32 safetensors and the tokenizer; the folder appears whole or not at all.

    Every process calls it and joins the gathers; process 0 writes.

    Args:
      path: a folder that does not exist yet or is empty.
      model: gives the config.
      params: as `load` or `init` made them, on any devices; adapters must be merged first.
      tokenizer: a transformers tokenizer, or a folder or .gguf file to take it (and the special ids) from.
      family: a model_type; None: the first that expresses the config.
      max_shard_bytes: > 0, size of one file; what exceeds it goes to numbered files and an index.
    Raises: ValueError if the folder is not empty, no family holds the config, the parameters are not the model's, or
      the tokenizer has more tokens than the model; OSError if the disk is full, and then nothing is left behind.
    """
    path = pathlib.Path(path)
    config = write_config(model.config, family=family)
    _check_params(model, params)
    files = _shards(_pieces(config["model_type"], params), named_leaves(params), max_shard_bytes)
    with _Folder(path) as folder:
        if folder.writes:
            _write_texts(folder.partial, config, tokenizer)
        for file, pieces in files.items():
            arrays = {}
            for name, rows, layer in pieces:
                array = _gather(named_leaves(params), rows, layer)
                if folder.writes:
                    arrays[name] = array
            if folder.writes:
                _write_tensors(arrays, folder.partial / file)
        if folder.writes and len(files) > 1:
            _write_index(folder.partial, files)


class _Folder:
    """A folder under a temporary name that gets its own on success and vanishes on failure."""

    def __init__(self, path: pathlib.Path):
        self.path, self.writes = path, jax.process_index() == 0
        self.partial = path.parent / f".{path.name}.partial-{os.getpid()}"

    def __enter__(self) -> "_Folder":
        refused = self.writes and self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))
        if jax.process_count() > 1:  # all stop together, none waits in a gather
            refused = bool(multihost_utils.broadcast_one_to_all(np.int32(refused)))
        if refused:
            raise ValueError(f"{self.path} is not an empty folder: nothing is overwritten, give another path")
        if self.writes:
            self.partial.mkdir(parents=True)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.writes and kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
        elif self.writes:
            for file in self.partial.iterdir():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            self.partial.rename(self.path)
        if kind is None and jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"saved {self.path}")


def _check_params(model: Model, params: Any) -> None:
    """The tree is the model's: same paths, same shapes."""
    expected = {name: leaf.shape for name, leaf in named_leaves(jax.eval_shape(model.init, jax.random.key(0))).items()}
    found = {name: leaf.shape for name, leaf in named_leaves(params).items()}
    if adapters := [name for name in found if name.endswith(("/lora_a", "/lora_b"))]:
        raise ValueError(f"{adapters[0]} is an adapter, which this format cannot hold: merge it first (merge_lora)")
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            there, here = found.get(name, "absent"), expected.get(name, "absent")
            raise ValueError(
                f"parameter {name} is {there}, the model's config makes it {here}: save params of this model"
            )


def _pieces(family: str, params: Any) -> list[_Piece]:
    """Their tensors in the order embedding, layers, head."""
    leaves = named_leaves(params)
    groups: dict[str, list[Row]] = {}
    for row in FAMILIES[family].rows:
        if row.ours in leaves:
            groups.setdefault(row.theirs, []).append(row)
    single: list[_Piece] = [(name, rows, None) for name, rows in groups.items() if not stacked(rows[0])]
    layered = {name: rows for name, rows in groups.items() if stacked(rows[0])}
    depth = leaves[next(iter(layered.values()))[0].ours].shape[0]
    return single + [(name.format(layer), rows, layer) for layer in range(depth) for name, rows in layered.items()]


def _shards(pieces: list[_Piece], leaves: Mapping[str, Any], limit: float) -> dict[str, list[_Piece]]:
    """File name -> its tensors, filled in order."""
    files: list[list[_Piece]] = [[]]
    filled = 0
    for piece in pieces:
        _, rows, layer = piece
        size = sum(4 * leaves[row.ours].size // (1 if layer is None else leaves[row.ours].shape[0]) for row in rows)
        if files[-1] and filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(piece)
        filled += size
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": held for i, held in enumerate(files, 1)}


def _layer(stack: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def _on_host(leaf: Any, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of it, whole on this host; all processes must call it."""
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and not leaf.is_fully_addressable:
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        if layer is None:
            return np.asarray(jax.device_put(leaf, everywhere))
        return np.asarray(jax.jit(_layer, out_shardings=everywhere)(leaf, layer))
    return np.asarray(leaf if layer is None else jax.jit(_layer)(leaf, layer))


def _gather(leaves: Mapping[str, Any], rows: list[Row], layer: int | None) -> np.ndarray:
    """One tensor of theirs."""
    parts = [_on_host(leaves[row.ours], layer).astype(np.float32) for row in rows]
    parts = [part.T if row.how == "transpose" else part for part, row in zip(parts, rows, strict=True)]
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1))


def _write_tensors(arrays: dict[str, np.ndarray], file: pathlib.Path) -> None:
    try:
        save_file(arrays, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}; free some space or give another path") from error
    file.chmod((file.parent / "config.json").stat().st_mode)  # safetensors makes its files private


def _write_texts(folder: pathlib.Path, config: dict[str, Any], tokenizer: Any) -> None:
    """config.json with the special ids, the tokenizer's files, generation_config.json."""
    ids: dict[str, Any] = {}
    if isinstance(tokenizer, str | os.PathLike):
        ids = {key: value for key, value in config_values(tokenizer).items() if key in _IDS}
        if is_gguf(tokenizer):
            load_tokenizer(tokenizer).save_pretrained(folder)
        else:
            for name in _COPIED:
                if (source := pathlib.Path(tokenizer) / name).is_file():
                    shutil.copyfile(source, folder / name)
    elif tokenizer is not None:
        if len(tokenizer) > config["vocab_size"]:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {config['vocab_size']}: "
                "save the tokenizer that the model was made with"
            )
        ids = {key: getattr(tokenizer, key) for key in _IDS}
        tokenizer.save_pretrained(folder)
    ids = {key: value for key, value in ids.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config | ids, indent=2, sort_keys=True) + "\n")
    if ids and not (folder / "generation_config.json").exists():
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2, sort_keys=True) + "\n")


def _write_index(folder: pathlib.Path, files: Mapping[str, list[_Piece]]) -> None:
    where = {name: file for file, pieces in files.items() for name, _, _ in pieces}
    total = sum((folder / file).stat().st_size for file in files)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
