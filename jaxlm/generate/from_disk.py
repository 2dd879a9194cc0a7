# SPDX-License-Identifier: Apache-2.0
"""A sampler over what lies on disk: a Hugging Face folder, a .gguf file, or the directory of a finished run."""

import json
import os
import pathlib
from typing import Any

from jaxlm import checkpoints
from jaxlm.checkpoints.sources import config_values
from jaxlm.generate.capsules import CapsuleModel
from jaxlm.generate.sampler import Sampler


def model_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Where the model is: in a run's directory its `model` folder.

    Raises: ValueError for a run that has left no model yet.
    """
    folder = pathlib.Path(path)
    if not (folder / "metrics.jsonl").is_file():
        return folder
    if not (folder / "model" / "config.json").is_file():
        raise ValueError(f"{folder} has no model/ yet: finish the run, scripts/train.py {folder} goes on with it")
    return folder / "model"


def open_sampler(
    path: str | os.PathLike[str], *, slots: int = 16, size: int | None = None, dtype: str = "float32"
) -> Sampler:
    """An embedded sampler; a model that was saved with capsules thinks before it speaks.

    Args:
      path: a Hugging Face folder, a .gguf file or a run directory.
      slots: samples that are decoded at once.
      size: tokens of prompt and completion together; None: the model's `max_length`.
      dtype: of the computation; parameters stay float32.
    Raises: ValueError for what cannot be read as such a model.
    """
    found = model_path(path)
    model, params = checkpoints.load(found, dtype=dtype)
    tokenizer = checkpoints.load_tokenizer(found)
    speaker: Any = model
    if found.is_dir() and (capsules := checkpoints.load_capsules(found)) is not None:
        speaker, params = CapsuleModel(model, capsules.config, capsules.cap, capsules.end), params | capsules.leaves
    return Sampler(speaker, params, tokenizer, slots=slots, size=size, stop_tokens=stop_tokens(found))


def stop_tokens(path: pathlib.Path) -> list[int]:
    """Ids that end a completion by the checkpoint's own word: its config's and its generation config's."""
    given: list[Any] = [config_values(path).get("eos_token_id")]
    generation = path / "generation_config.json"
    if generation.is_file():
        given.append(json.loads(generation.read_text()).get("eos_token_id"))
    ids = {token for value in given for token in (value if isinstance(value, list) else [value])}
    return sorted(token for token in ids if isinstance(token, int))
