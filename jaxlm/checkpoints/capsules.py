# SPDX-License-Identifier: Apache-2.0
"""A model's capsule beside its Hugging Face files: capsule/numbers.json and capsule/leaves.safetensors.

A folder of their own, so that the model's loads without them: then it is the decoder alone.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxlm.nn.capsule_config import CapsuleConfig, PlanDecoderConfig
from jaxlm.weights.names import named_leaves, nested

NUMBERS, LEAVES = "numbers.json", "leaves.safetensors"


class Capsules(NamedTuple):
    """What a folder knows of capsules.

    Attributes:
      config: how they are made.
      decoder: numbers of the plan decoder; None: it was dropped.
      cap, end: ids of `<cap>` and `</cap>`.
      leaves: {"capsule": ..., "plan_decoder": ...}, what to put beside the model's parameters.
    """

    config: CapsuleConfig
    decoder: PlanDecoderConfig | None
    cap: int
    end: int
    leaves: dict[str, Any]


def save_capsules(folder: str | os.PathLike[str], capsules: Capsules) -> None:
    """Writes both files into a model's folder."""
    folder = pathlib.Path(folder) / "capsule"
    folder.mkdir()
    leaves = {name: np.array(x, order="C") for name, x in named_leaves(capsules.leaves).items()}
    save_file(leaves, folder / LEAVES, metadata={"format": "np"})
    (folder / LEAVES).chmod((folder.parent / "config.json").stat().st_mode)
    numbers = {
        "capsule": dataclasses.asdict(capsules.config),
        "plan_decoder": None if capsules.decoder is None else dataclasses.asdict(capsules.decoder),
        "cap": capsules.cap,
        "end": capsules.end,
    }
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n")


def load_capsules(folder: str | os.PathLike[str]) -> Capsules | None:
    """What `save_capsules` wrote, or None where the folder has no capsule.

    Raises: ValueError, naming the file, where one of the two is missing or does not fit the other.
    """
    folder = pathlib.Path(folder) / "capsule"
    if not (folder / NUMBERS).is_file():
        return None
    if not (folder / LEAVES).is_file():
        raise ValueError(f"{folder / LEAVES} is missing: {NUMBERS} says that the model has capsules")
    try:
        numbers = json.loads((folder / NUMBERS).read_text())
        config = CapsuleConfig(**numbers["capsule"])
        decoder = None if numbers["plan_decoder"] is None else PlanDecoderConfig(**numbers["plan_decoder"])
        cap, end = int(numbers["cap"]), int(numbers["end"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / NUMBERS} is damaged: {error!r}") from error
    leaves = nested({name: jnp.asarray(x) for name, x in load_file(folder / LEAVES).items()})
    if (decoder is not None) != ("plan_decoder" in leaves):
        raise ValueError(f"{folder / LEAVES} and {NUMBERS} disagree about a plan decoder: save the model again")
    return Capsules(config, decoder, cap, end, leaves)
