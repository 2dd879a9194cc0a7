# SPDX-License-Identifier: Apache-2.0
"""From any checkpoint that jaxlm reads to a Hugging Face folder."""

import os

from jaxlm.checkpoints.export import save
from jaxlm.checkpoints.hub import load
from jaxlm.checkpoints.sources import config_values


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], *, max_shard_bytes: float = 5e9) -> str:
    """Loads `source` and saves it to `target` in the same family, with its tokenizer and special ids.

    Returns: one line that says what was written.
    Raises: as `load` and `save`.
    """
    family = config_values(source)["model_type"]
    model, params = load(source)
    save(target, model, params, tokenizer=source, family=family, max_shard_bytes=max_shard_bytes)
    config = model.config
    return (
        f"{target}: {family}, {model.num_parameters(params):,} parameters in float32, {config.num_layers} layers, "
        f"width {config.width}, vocabulary {config.vocab_size:,}"
    )
