# SPDX-License-Identifier: Apache-2.0
"""Functions of a parameter tree: names and rules over them, overlaps of sets of entries, merging."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "chance_jaccard": "overlap",
        "check_alike": "alike",
        "core_groups": "overlap",
        "interpolate": "merging",
        "jaccard": "overlap",
        "label_by_path": "names",
        "label_table": "names",
        "named_leaves": "names",
        "overlap_table": "overlap",
        "path_of": "names",
        "slerp": "merging",
        "transplant": "transplanting",
    },
)
