# SPDX-License-Identifier: Apache-2.0
"""Names of parameters: paths joined by "/", and rules over them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

Rules = Sequence[tuple[str, str]]  # (regular expression that matches a whole path, label)


def path_of(key_path: Sequence[Any]) -> str:
    """A jax key path as one string, such as "blocks/mlp/up/kernel"."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, in the tree's order.

    >>> named_leaves({"b": {"scale": 2}, "a": 1})
    {'a': 1, 'b/scale': 2}
    """
    return {path_of(key_path): leaf for key_path, leaf in jax.tree.leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of dicts with those leaves: the inverse of `named_leaves`, where a tree has dicts alone.

    Args:
      leaves: by path; none of the paths lies inside of another one.

    >>> nested({"a": 1, "b/scale": 2})
    {'a': 1, 'b': {'scale': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree


def label_by_path(tree: Any, rules: Rules) -> Any:
    """A label for every leaf: that of the first rule whose pattern matches the leaf's whole path.

    Args:
      tree: parameters, or shapes of them. A tree without leaves is passed through.
      rules: they must cover every leaf, and each must be the first to match some leaf.
    Returns: a tree like `tree` of labels.
    Raises: ValueError, naming the leaf that no rule covers or the rules that no leaf uses.

    >>> label_by_path({"embed": {"table": 0}, "head": {"kernel": 0}}, [("head/.*", "trained"), (".*", "frozen")])
    {'embed': {'table': 'frozen'}, 'head': {'kernel': 'trained'}}
    """
    used = set()

    def label(key_path: Any, _: Any) -> str:
        path = path_of(key_path)
        for index, (pattern, name) in enumerate(rules):
            if re.fullmatch(pattern, path):
                used.add(index)
                return name
        raise ValueError(f"no rule matches parameter {path!r}; end the rules with ('.*', ...)")

    labels = jax.tree.map_with_path(label, tree)
    idle = [pattern for index, (pattern, _) in enumerate(rules) if index not in used]
    if idle and jax.tree.leaves(tree):
        raise ValueError(
            f"rules that match no parameter first: {idle}; paths look like {next(iter(named_leaves(tree)))!r}"
        )
    return labels


def label_table(tree: Any, rules: Rules) -> str:
    """What the rules did, as text: label, leaves, parameters.

    >>> print(label_table({"a": jax.ShapeDtypeStruct((2, 3), "float32")}, [(".*", "trained")]))
    label    leaves  parameters
    trained       1           6
    """
    counts: dict[str, list[int]] = {}
    for leaf, label in zip(jax.tree.leaves(tree), jax.tree.leaves(label_by_path(tree, rules)), strict=True):
        row = counts.setdefault(label, [0, 0])
        row[0] += 1
        row[1] += leaf.size
    width = max(5, *(len(label) for label in counts))
    lines = [f"{'label':<{width}}  leaves  parameters"]
    lines += [f"{label:<{width}}  {leaves:6d}  {size:10,d}" for label, (leaves, size) in counts.items()]
    return "\n".join(lines)
