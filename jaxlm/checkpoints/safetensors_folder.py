# SPDX-License-Identifier: Apache-2.0
"""Tensors of a folder of safetensors files, read slice by slice. No pickle is ever opened: nothing can run code."""

import json
import pathlib
from typing import Any

import ml_dtypes  # noqa: F401 - teaches numpy bfloat16
import numpy as np
import safetensors

INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsFolder:
    """The tensors of one checkpoint, whether it is one file or many.

    Attributes:
      shapes: name -> shape, of every tensor. Only headers were read.
      files: names of the files.

    Raises: ValueError that names the file: a missing shard, a broken file, a tensor that is not where the index says, a
      folder that holds pickles only.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file, names in _files(folder).items():
            held = set(self._file(file).keys())
            if names and (lost := sorted(names - held)):
                raise ValueError(
                    f"{folder / file} lacks {lost[0]!r}, which {INDEX} says it holds: fetch the file again"
                )
            self._file_of |= dict.fromkeys(held, file)
        self.files = sorted(set(self._file_of.values()))
        self.shapes = {name: tuple(self._slice(name).get_shape()) for name in sorted(self._file_of)}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one tensor as float32; only its bytes are read."""
        piece = self._slice(name)
        if piece.get_dtype() not in _FLOATS:
            raise ValueError(
                f"{name} in {self.folder / self._file_of[name]} is {piece.get_dtype()}, not {', '.join(_FLOATS)}: "
                "save the checkpoint dequantised and load that"
            )
        return np.asarray(piece[index]).astype(np.float32)

    def _slice(self, name: str) -> Any:
        return self._file(self._file_of[name]).get_slice(name)

    def _file(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            try:
                self._open[file] = safetensors.safe_open(path, framework="np")
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
        return self._open[file]


def _files(folder: pathlib.Path) -> dict[str, set[str]]:
    """File name -> the tensors that the index puts there; an empty set where there is no index."""
    if (folder / INDEX).exists():
        files: dict[str, set[str]] = {}
        for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items():
            files.setdefault(file, set()).add(name)
        for file in files:
            if pathlib.PurePath(file).name != file:
                raise ValueError(f"{folder / INDEX} names {file!r}, a file outside of its folder")
            if not (folder / file).is_file():
                raise ValueError(f"{folder / file} is missing, {INDEX} names it: fetch the file again")
        return files
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: set()}
    if found:
        raise ValueError(f"{folder} holds {len(found)} safetensors files and no {INDEX}: fetch the index too")
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        raise ValueError(
            f"{folder} holds only {pickles[0]}: that is a pickle, which can run code, and jaxlm never opens one. "
            "Convert it to safetensors where you trust it (transformers: save_pretrained) and load that folder"
        )
    raise ValueError(f"{folder} holds no safetensors file: give the folder of a Hugging Face checkpoint")
