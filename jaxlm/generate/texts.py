# SPDX-License-Identifier: Apache-2.0
"""Between text and tokens: prompts in, completions out as they grow, stop strings."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxlm.generate.engine import Completion, Prompt

_BROKEN = "\ufffd"  # what an unfinished character decodes to
_WINDOW = 16  # tokens that are decoded again at least


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> np.ndarray:
    """A prompt as int32 [n]: text with the tokenizer's special tokens, messages through its template, ids as they are.

    Raises: ValueError for a prompt without tokens, or messages where there is no template.
    """
    if isinstance(prompt, str):
        tokens: Any = tokenizer.encode(prompt)
    elif len(prompt) and isinstance(prompt[0], Mapping):  # ids may be an array, whose truth is ambiguous
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

    Text is held back while it could still change: an unfinished character, or the beginning of a stop string.  Only the
    newest tokens are decoded again, with some before them that cancel what a tokenizer does at the beginning of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._pieces: list[Piece] = []
        self._tokens: list[int] = []
        self._text = ""  # all that is decoded
        self._said = 0  # characters handed out
        # The window: decoding begins at token `_from`; what tokens up to `_until` say is `_before`, final, and is the
        # end of the first `_settled` characters.
        self._from = self._until = self._settled = 0
        self._before = ""
        self.reason: Literal["stop", "length"] | None = None

    @property
    def num_tokens(self) -> int:
        """Of the completion so far."""
        return len(self._tokens)

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
        self._tokens += new.tokens.tolist()
        self._text = self._whole(self.num_tokens)
        # What was handed out holds no beginning of a stop string, so that none is looked for there.
        found = [at for at in (self._text.find(word, self._said) for word in self._stop) if at >= 0]
        if found:
            self._cut(min(found), before)
            self.reason = "stop"
        if self.reason:
            return self.rest()
        self._settle()
        return self._advance(len(self._text) - self._unsure())

    def end(self, reason: Literal["stop", "length"]) -> None:
        """Ends it where nothing else has."""
        self.reason = self.reason or reason

    def rest(self) -> str:
        """All text that was not handed out yet."""
        return self._advance(len(self._text))

    def completion(self) -> Completion:
        """What has come of it; it must have ended."""
        assert self.reason is not None
        tokens, log_probs, raw = (np.concatenate(parts)[: self.num_tokens] for parts in zip(*self._pieces, strict=True))
        return Completion(self._text, tokens, log_probs, raw, self.reason)

    def _advance(self, to: int) -> str:
        said, self._said = self._text[self._said : to], max(self._said, to)
        return said

    def _decode(self, start: int, stop: int) -> str:
        tokens = self._tokens[start:stop]
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _whole(self, count: int) -> str:
        """The text of the first `count` tokens; no fewer than are settled."""
        window = self._decode(self._from, count)
        if window.startswith(self._before):
            return self._text[: self._settled] + window[len(self._before) :]
        return self._decode(0, count)

    def _settle(self) -> None:
        """Moves the window to the newest tokens, if their text is whole and decodes alike from where it would begin."""
        count = self.num_tokens
        if count - self._until < _WINDOW or self._text.endswith(_BROKEN):
            return
        before = self._decode(self._until, count)
        if before.strip() and self._text.endswith(before.lstrip()):
            self._from, self._until, self._settled, self._before = self._until, count, len(self._text), before

    def _cut(self, at: int, known: int) -> None:
        """Drops the text from `at` on, and the tokens behind the one that completed the stop string."""
        for count in range(known + 1, self.num_tokens + 1):
            if any(word in self._whole(count)[self._said :] for word in self._stop):
                del self._tokens[count:]
                break
        self._text = self._text[:at]

    def _unsure(self) -> int:
        """Characters at the end that may still change."""
        broken = len(self._text) - len(self._text.rstrip(_BROKEN))
        starts = [n for word in self._stop for n in range(1, len(word)) if self._text.endswith(word[:n])]
        return max([broken, *starts])
