# SPDX-License-Identifier: Apache-2.0
"""One train step, one loop; knows no method."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "AdamW": "options",
        "MeshOptions": "options",
        "Phase": "phase",
        "Preempted": "stop",
        "RunOptions": "options",
        "State": "state",
        "evaluate": "held_out",
        "learning_rate": "optimizer",
        "make_mesh": "mesh",
        "make_optimizer": "optimizer",
        "make_train_step": "step",
        "train": "loop",
    },
)
