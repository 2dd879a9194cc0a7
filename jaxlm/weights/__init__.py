# SPDX-License-Identifier: Apache-2.0
"""Functions of a parameter tree: names and rules over them."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {"label_by_path": "names", "label_table": "names", "named_leaves": "names", "path_of": "names"},
)
