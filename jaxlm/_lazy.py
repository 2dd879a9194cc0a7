# SPDX-License-Identifier: Apache-2.0
"""Public names that are imported when first asked for, so that a config or `--help` never waits for jax."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def attach(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose public names live in its submodules.

    Args:
      package: `__name__` of the package.
      names: public name -> submodule that defines it.

    >>> __getattr__, __dir__ = attach("jaxlm.losses", {"Term": "term"})
    >>> __getattr__("Term").__name__
    'Term'
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{names[name]}"), name)

    return get, lambda: sorted(names)
