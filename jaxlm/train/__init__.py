# SPDX-License-Identifier: Apache-2.0
"""One train step, one loop; knows no method."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "AdamW": "options",
        "Budget": "budget",
        "Items": "held_out",
        "MeshOptions": "options",
        "Phase": "phase",
        "Preempted": "stop",
        "RunOptions": "options",
        "ScoreMatrix": "score_matrix",
        "Scores": "scores",
        "State": "state",
        "assert_equal_budget": "budget",
        "continual_metrics": "continual",
        "difference": "bootstrap",
        "evaluate": "held_out",
        "flips": "continual",
        "gradient_conflict": "conflict",
        "holm": "bootstrap",
        "item_metrics": "held_out",
        "learning_rate": "optimizer",
        "make_mesh": "mesh",
        "own_rows": "feeding",
        "to_devices": "feeding",
        "make_optimizer": "optimizer",
        "make_train_step": "step",
        "paired_bootstrap": "bootstrap",
        "score_items": "held_out",
        "summed_gradient": "conflict",
        "task_metrics": "continual",
        "train": "loop",
    },
)
