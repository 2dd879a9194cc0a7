# SPDX-License-Identifier: Apache-2.0
"""Layers and models: pure functions of a plain tree of arrays, and thin Flax classes over them."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "LinearScaling": "config",
        "Llama3Scaling": "config",
        "Lora": "config",
        "Model": "decoder",
        "ModelConfig": "config",
        "adapted": "lora",
        "add_lora": "lora",
        "attend": "attention",
        "logical_axes": "axes",
        "merge_drift": "lora",
        "merge_lora": "lora",
    },
)
