# SPDX-License-Identifier: Apache-2.0
"""Between text and tokens: prompts in, completions out as they grow, stop strings."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxlm.generate.engine import Completion, Prompt

_BROKEN = "�"  # what an unfinished character decodes to


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> np.ndarray:
    """A prompt as int32 [n]: text with the tokenizer's special tokens, messages through its template, ids as they are.

    Raises: ValueError for a prompt without tokens, or messages where there is no template.
    """
    if isinstance(prompt, str):
        tokens: Any = tokenizer.encode(prompt)
    elif prompt and isinstance(prompt[0], Mapping):
        if tokenizer.chat_template is None:
            raise ValueError("messages need a tokenizer with a chat template; this one has none: give text")
        messages: Any = list(prompt)
        text: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer.encode(text, add_special_tokens=False)
    else:
        tokens = prompt
    if len(tokens) == 0:
        raise ValueError(f"prompt {prompt!r} has no tokens: begin with at least one")
    return np.asarray(tokens, np.int32)


class Piece(NamedTuple):
    """Tokens of one sample on the host: ids int32 [n], and log-probs float32 [n] as in `Completion`."""

    tokens: np.ndarray
    log_probs: np.ndarray
    raw_log_probs: np.ndarray


class TextSoFar:
    """A completion that grows, and the text of it that is final.

    Text is held back while it could still change: an unfinished character, or the beginning of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._pieces: list[Piece] = []
        self._text = ""  # all that is decoded
        self._said = 0  # characters handed out
        self.num_tokens = 0
        self.reason: Literal["stop", "length"] | None = None

    def add(self, new: Piece, *, stops: np.ndarray) -> str:
        """Takes tokens [n] and returns the text that became final; what follows a stop is left out."""
        if self.reason is not None or len(new.tokens) == 0:
            return ""
        where = np.flatnonzero(np.isin(new.tokens, stops))
        if len(where):
            new = Piece(*(x[: where[0] + 1] for x in new))
            self.reason = "stop"
        before = self.num_tokens
        self._pieces.append(new)
        self.num_tokens += len(new.tokens)
        self._text = self._decode(self.num_tokens)
        found = [at for at in (self._text.find(word) for word in self._stop) if at >= 0]
        if found:
            self._cut(min(found), before)
            self.reason = "stop"
        return self.rest() if self.reason else self._advance(len(self._text) - self._unsure())

    def end(self, reason: Literal["stop", "length"]) -> None:
        """Ends it where nothing else has."""
        self.reason = self.reason or reason

    def rest(self) -> str:
        """All text that was not handed out yet."""
        return self._advance(len(self._text))

    def completion(self) -> Completion:
        """What has come of it; it must have ended."""
        assert self.reason is not None
        tokens, log_probs, raw = self._joined()
        return Completion(self._text, tokens, log_probs, raw, self.reason)

    def _advance(self, to: int) -> str:
        said, self._said = self._text[self._said : to], max(self._said, to)
        return said

    def _joined(self) -> Piece:
        return Piece(*(np.concatenate(parts)[: self.num_tokens] for parts in zip(*self._pieces, strict=True)))

    def _decode(self, count: int) -> str:
        tokens = np.concatenate([piece.tokens for piece in self._pieces])[:count]
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _cut(self, at: int, known: int) -> None:
        """Drops the text from `at` on, and the tokens behind the one that completed the stop string."""
        for count in range(known + 1, self.num_tokens + 1):
            if any(word in self._decode(count) for word in self._stop):
                self.num_tokens = count
                break
        self._text = self._text[:at]

    def _unsure(self) -> int:
        """Characters at the end that may still change."""
        broken = len(self._text) - len(self._text.rstrip(_BROKEN))
        starts = [n for word in self._stop for n in range(1, len(word)) if self._text.endswith(word[:n])]
        return max([broken, *starts])
