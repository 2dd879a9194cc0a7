# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint: from a folder's files, or built from the metadata of a GGUF file."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxlm.checkpoints.gguf import GgufFile
from jaxlm.checkpoints.sources import is_gguf
from jaxlm.data.tokenizers import load_tokenizer as load_from_folder

_CONTROL, _USER_DEFINED = 3, 4  # kinds of token in GGUF


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hugging Face folder or a .gguf file, chat template and special tokens included.

    Raises: ValueError for a folder without a fast tokenizer, or a GGUF tokenizer of another kind than byte-level BPE.
    """
    if not is_gguf(path):
        return load_from_folder(pathlib.Path(path))
    file = GgufFile(pathlib.Path(path))
    return _from_metadata(file.metadata, str(path))


def _pre_tokenizer(kind: Any, path: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging, by GGUF's name for it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in ("gpt-2", "default"):
        return byte_level
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    raise ValueError(f"{path}: tokenizer.ggml.pre {kind!r} is not supported, only smollm and gpt-2: load the folder")


def _from_metadata(metadata: Mapping[str, Any], path: str) -> PreTrainedTokenizerFast:
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if get.get("model") != "gpt2":
        raise ValueError(
            f"{path}: tokenizer.ggml.model {get.get('model')!r} is not supported, only 'gpt2' (byte-level BPE)"
        )
    pieces = get["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in get["merges"]]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = _pre_tokenizer(get.get("pre", "default"), path)
    core.decoder = decoders.ByteLevel()
    kinds = get["token_type"]
    for kind in (_CONTROL, _USER_DEFINED):
        special = kind == _CONTROL
        added = [
            AddedToken(p, special=special, normalized=False) for p, k in zip(pieces, kinds, strict=True) if k == kind
        ]
        core.add_special_tokens(added) if special else core.add_tokens(added)
    tokens = {
        f"{ours}_token": pieces[get[f"{theirs}_token_id"]]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if get.get(f"{theirs}_token_id") is not None
    }
    if get.get("add_bos_token"):
        bos = tokens["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, get["bos_token_id"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata.get("llama.context_length", int(1e30)),
        clean_up_tokenization_spaces=False,
        **tokens,
    )
