# SPDX-License-Identifier: Apache-2.0
"""Hugging Face and GGUF checkpoints, both ways."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Capsules": "capsules",
        "RunCheckpoints": "runs",
        "load": "hub",
        "load_capsules": "capsules",
        "load_config": "sources",
        "load_tokenizer": "tokenizer",
        "save": "export",
        "save_capsules": "capsules",
    },
)
