# SPDX-License-Identifier: Apache-2.0
"""Whether parameter trees can be combined entry by entry, and if not, which leaf stands in the way."""

import re
from collections.abc import Mapping
from typing import Any

from jaxlm.weights.names import named_leaves

_ROWS_ARE_TOKENS = re.compile(r"(.*[./])?(embed/table|embed_tokens\.weight|wte\.weight|lm_head\.weight)")
_COLUMNS_ARE_TOKENS = re.compile(r"(.*/)?head/kernel")


def check_alike(first: Any, other: Any, called: tuple[str, str], *, dtypes: bool = True) -> None:
    """Refuses trees whose paths, shapes or types differ.

    Args:
      first, other: trees of arrays, or of whatever has `shape` and `dtype`.
      called: what the message calls them, such as ("the base", "model 2").
      dtypes: whether types must agree too.
    Raises: ValueError that names the first leaf that differs and both its shapes, types or vocabulary sizes.

    >>> import numpy as np
    >>> check_alike({"scale": np.ones(2)}, {}, ("the base", "model 1"))
    Traceback (most recent call last):
    ...
    ValueError: model 1 lacks scale, which the base has
    """
    here, there = named_leaves(first), named_leaves(other)
    check_same_shapes({k: v.shape for k, v in here.items()}, {k: v.shape for k, v in there.items()}, called)
    for path in here:
        if dtypes and here[path].dtype != there[path].dtype:
            raise ValueError(
                f"{path} is {there[path].dtype} in {called[1]} and {here[path].dtype} in {called[0]}: "
                "cast one of them first"
            )


def check_same_shapes(
    first: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]], called: tuple[str, str]
) -> None:
    """`check_alike` of tensors known by name and shape."""
    for path in sorted(first.keys() | other.keys()):
        if path not in other:
            raise ValueError(f"{called[1]} lacks {path}, which {called[0]} has")
        if path not in first:
            raise ValueError(f"{called[1]} has {path}, which {called[0]} lacks")
    for path, shape in first.items():
        if tuple(other[path]) == tuple(shape):
            continue
        sizes = _vocabulary(path, tuple(other[path])), _vocabulary(path, tuple(shape))
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"the vocabularies differ: {sizes[0]} tokens in {called[1]}, {sizes[1]} in {called[0]} ({path}); "
                "models with different tokenizers share no meaning entry by entry: take models of one base, or resize "
                "the embeddings of both to one vocabulary first"
            )
        raise ValueError(f"{path} is {tuple(other[path])} in {called[1]} and {tuple(shape)} in {called[0]}")


def _vocabulary(path: str, shape: tuple[int, ...]) -> int | None:
    if _ROWS_ARE_TOKENS.fullmatch(path):
        return shape[0]
    return shape[-1] if _COLUMNS_ARE_TOKENS.fullmatch(path) else None
