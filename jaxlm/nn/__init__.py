# SPDX-License-Identifier: Apache-2.0
"""Layers and models: pure functions of a plain tree of arrays, and thin Flax classes over them."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Attention": "nnx_modules",
        "Decoder": "nnx_modules",
        "LinearScaling": "config",
        "LinenAttention": "linen_modules",
        "LinenDecoder": "linen_modules",
        "LinenMLP": "linen_modules",
        "LinenRMSNorm": "linen_modules",
        "Llama3Scaling": "config",
        "Lora": "config",
        "MLP": "nnx_modules",
        "Model": "decoder",
        "ModelConfig": "config",
        "RMSNorm": "nnx_modules",
        "adapted": "lora",
        "add_lora": "lora",
        "attend": "attention",
        "logical_axes": "axes",
        "merge_drift": "lora",
        "merge_lora": "lora",
    },
)
