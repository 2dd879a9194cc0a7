# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: one of plain bytes that needs no file, and any fast tokenizer from a folder."""

import hashlib
import json
from pathlib import Path

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte: ids 0..255 are the bytes of UTF-8, 256 pads, 257 begins and 258 ends a turn; speaks ChatML.

    It is an ordinary fast tokenizer: `save_pretrained` writes it, `load_tokenizer` reads it back equal.

    >>> byte_tokenizer()("A~").input_ids
    [65, 126]
    """
    # The byte-level pre-tokenizer writes printable bytes as themselves and the others, in order, from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|pad|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer saved in a folder; looks nowhere else and runs no code from it.

    Raises: ValueError where there is no folder, or its tokenizer is not a fast one.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"no folder {str(folder)!r} to read a tokenizer from")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"the tokenizer in {str(folder)!r} has no tokenizer.json: masks need a fast tokenizer's offsets"
        )
    return tokenizer


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> tokenizers.Tokenizer:
    """A copy of the tokenizer's core that adds no token, cuts and pads nothing, and whose offsets keep white space.

    The post-processor of byte-level tokenizers trims white space from offsets, which would move mask boundaries.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    return backend


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer itself, asked to encode a text, writes a beginning-of-sequence token before it."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("").input_ids[:1]) == [bos]


def digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that decides how text becomes tokens, chat template included."""
    parts = [
        plain_backend(tokenizer).to_str(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        adds_bos(tokenizer),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
