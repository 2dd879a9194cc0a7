# SPDX-License-Identifier: Apache-2.0
"""Paths and rules over them."""

import jax
import pytest

from jaxlm.weights.names import label_by_path, label_table, named_leaves, nested

TREE = {
    "blocks": {"mlp": {"kernel": jax.ShapeDtypeStruct((2, 8, 8), "float32")}},
    "scale": jax.ShapeDtypeStruct((8,), "float32"),
}


def test_a_tree_is_nested_from_its_named_leaves():
    assert nested(named_leaves(TREE)) == TREE and nested({}) == {}
    assert list(nested({"b/c": 1, "a": 2, "b/a": 3})["b"]) == ["c", "a"], "in the order given"


def test_the_first_matching_rule_decides():
    labels = label_by_path(TREE, [("blocks/.*", "a"), (".*kernel", "b"), (".*", "c")][::2])
    assert named_leaves(labels) == {"blocks/mlp/kernel": "a", "scale": "c"}


def test_a_rule_matches_the_whole_path():
    with pytest.raises(ValueError, match="no rule matches parameter 'blocks/mlp/kernel'; end the rules with"):
        label_by_path(TREE, [("blocks", "a"), ("scale", "b")])


def test_a_rule_that_is_never_first_is_idle():
    with pytest.raises(
        ValueError, match=r"match no parameter first: \['.*kernel'\]; paths look like 'blocks/mlp/kernel'"
    ):
        label_by_path(TREE, [("blocks/.*", "a"), (".*kernel", "b"), (".*", "c")])


def test_a_tree_without_leaves_passes():
    assert label_by_path({"blocks": None}, [("blocks/.*", "a")]) == {"blocks": None}


def test_the_table_counts_leaves_and_parameters():
    assert label_table(TREE, [("scale", "frozen"), (".*", "trained")]).splitlines() == [
        "label    leaves  parameters",
        "trained       1         128",
        "frozen        1           8",
    ]
