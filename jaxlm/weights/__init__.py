# SPDX-License-Identifier: Apache-2.0
"""Functions of a parameter tree: names and rules over them, the largest entries, overlaps of sets, merging."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "chance_jaccard": "overlap",
        "check_alike": "alike",
        "core_groups": "overlap",
        "dare": "task_vectors",
        "dare_ties": "task_vectors",
        "interpolate": "merging",
        "jaccard": "overlap",
        "label_by_path": "names",
        "label_table": "names",
        "largest": "select",
        "linear": "task_vectors",
        "named_leaves": "names",
        "nested": "names",
        "num_held": "select",
        "overlap_table": "overlap",
        "path_of": "names",
        "random_entries": "select",
        "slerp": "merging",
        "soup": "task_vectors",
        "task_arithmetic": "task_vectors",
        "ties": "task_vectors",
        "transplant": "transplanting",
    },
)
