# SPDX-License-Identifier: Apache-2.0
"""Layers and models: pure functions of a plain tree of arrays, and thin Flax classes over them."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Attention": "nnx_modules",
        "Decoder": "nnx_modules",
        "Alibi": "position_kinds",
        "DynamicScaling": "position_kinds",
        "Hope": "position_kinds",
        "Learned": "position_kinds",
        "LinearScaling": "position_kinds",
        "LinenAttention": "linen_modules",
        "LinenDecoder": "linen_modules",
        "LinenMLP": "linen_modules",
        "LinenRMSNorm": "linen_modules",
        "Llama3Scaling": "position_kinds",
        "Lora": "config",
        "MLP": "nnx_modules",
        "Model": "decoder",
        "ModelConfig": "config",
        "Nope": "position_kinds",
        "RMSNorm": "nnx_modules",
        "Rope": "position_kinds",
        "Xpos": "position_kinds",
        "YarnScaling": "position_kinds",
        "adapted": "lora",
        "add_lora": "lora",
        "attend": "attention",
        "channel_survival": "hope",
        "fold_lightcone": "hope",
        "hope_attention": "attention",
        "hope_rates": "hope",
        "hope_theta": "hope",
        "logical_axes": "axes",
        "merge_drift": "lora",
        "merge_lora": "lora",
        "relative_clock": "positions",
        "to_lightcone": "hope",
    },
)
