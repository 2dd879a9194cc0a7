# SPDX-License-Identifier: Apache-2.0
"""jaxlm: adapting language models in JAX, fourteen methods on one train step.  Importing it imports nothing heavy.

>>> import jaxlm
>>> jaxlm.nn.ModelConfig(vocab_size=8, width=4, num_layers=1, num_heads=1).head_size
4
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

_PARTS = ("checkpoints", "data", "kernels", "losses", "methods", "nn", "rewards", "train", "transforms", "weights")


def __getattr__(name: str) -> ModuleType:
    """The parts of the library, imported when first asked for."""
    if name not in _PARTS:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}; its parts are {', '.join(_PARTS)}")
    return importlib.import_module(f"jaxlm.{name}")


def __dir__() -> list[str]:
    return sorted([*_PARTS, "__version__"])
