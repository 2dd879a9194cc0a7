# SPDX-License-Identifier: Apache-2.0
"""Long text as tokens, and as windows of any length over the same tokens.  W windows, L tokens of one."""

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxlm.data.config import Source
from jaxlm.data.encode import Encoder
from jaxlm.data.records import parse, parts_of
from jaxlm.data.sources import open_source


def text_tokens(source: Source, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All records of a source one after the other, each with its end marker, [n] int32.

    Raises: `BadRecord`, a ValueError, for a record that cannot be read.
    """
    encoder = Encoder(tokenizer)
    parts = [part for _, record in open_source(source).records() for part in parts_of(parse(record))]
    return np.concatenate([encoder.encode(part).tokens for part in parts])


def windows_of(tokens: np.ndarray, length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows that do not overlap, and the token that follows each of their tokens: inputs, targets, each [W, L].

    Targets are tokens 1 .. count, whatever the length: the same ones are predicted in windows of every length.

    Args:
      tokens: [n], n > count.
      length: L, divides `count`.
      count: tokens predicted.
    Raises: ValueError for a text that is too short, or a length that does not divide.

    >>> inputs, targets = windows_of(np.arange(6), 2, 4)
    >>> inputs.tolist(), targets.tolist()
    ([[0, 1], [2, 3]], [[1, 2], [3, 4]])
    """
    if count % length:
        raise ValueError(f"{count} tokens are no whole number of windows of {length}")
    if len(tokens) <= count:
        raise ValueError(f"the text has {len(tokens)} tokens, {count + 1} are needed: give a longer one, or test fewer")
    return tokens[:count].reshape(-1, length), tokens[1 : count + 1].reshape(-1, length)
