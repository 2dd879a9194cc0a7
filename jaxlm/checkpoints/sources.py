# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint comes from: a Hugging Face folder or a GGUF file, seen alike. No jax."""

import json
import os
import pathlib
from typing import Any, Protocol

import numpy as np

from jaxlm.checkpoints.config_reading import override, read_config
from jaxlm.checkpoints.gguf import GgufFile
from jaxlm.checkpoints.safetensors_folder import SafetensorsFolder
from jaxlm.nn.config import ModelConfig


class Tensors(Protocol):
    """Named tensors of which slices can be read."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one tensor as float32."""
        ...


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether the path names a GGUF file."""
    return pathlib.Path(path).suffix == ".gguf"


def config_values(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a checkpoint as a dict; for a GGUF file, the one it would have."""
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the folder of a Hugging Face checkpoint or a .gguf file")
    if is_gguf(path):
        return GgufFile(path).config()
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: give the folder of a Hugging Face checkpoint or a .gguf file")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}): fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, not an object: fetch it again")
    return values


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of a checkpoint; only headers are read."""
    path = pathlib.Path(path)
    return GgufFile(path) if is_gguf(path) else SafetensorsFolder(path)


def load_config(path: str | os.PathLike[str], **overrides: Any) -> ModelConfig:
    """The model a checkpoint holds, without its weights.

    Args:
      path: a Hugging Face folder or a .gguf file.
      overrides: fields of ModelConfig to change.
    Raises: ValueError for an unknown family, any feature that jaxlm would drop, an unknown field.
    """
    return override(read_config(config_values(path)), overrides)
