# SPDX-License-Identifier: Apache-2.0
"""Records to batches: sources, chat templates, exact masks, packing once, then random access to packed rows."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "BadRecord": "records",
        "BatchStream": "stream",
        "DataConfig": "config",
        "Encoder": "encode",
        "GENERATORS": "procedural",
        "Hub": "config",
        "JsonLines": "config",
        "LongText": "config",
        "Parquet": "config",
        "Prepared": "prepared",
        "Procedural": "config",
        "ProceduralPairs": "config",
        "ProceduralPlans": "config",
        "ReasoningGym": "config",
        "Rows": "config",
        "Source": "config",
        "Task": "config",
        "batches": "stream",
        "byte_tokenizer": "tokenizers",
        "finite_batches": "stream",
        "leaks_answer": "records",
        "load_tokenizer": "tokenizers",
        "open_prepared": "prepared",
        "prepare": "preparation",
        "score": "procedural",
        "text_tokens": "windows",
        "windows_of": "windows",
    },
)
