# SPDX-License-Identifier: Apache-2.0
"""A record to tokens and the mask of those that are trained, both from one tokenisation.

Trained are: of a chat, each assistant turn with its end marker; of a prompt/completion, the completion with the end
marker; of a text, everything. Never the first token: nothing comes before it.
"""

import re
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from jaxlm.data.records import BadRecord, Chat, Completion, Text
from jaxlm.data.tokenizers import adds_bos, digest, plain_backend

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """One record: tokens [n] int32, trained [n] bool."""

    tokens: np.ndarray
    trained: np.ndarray


class Encoder:
    """Turns parsed records into tokens with a tokenizer of transformers.

    Args:
      tokenizer: a fast one.
      prompts: "raw" joins prompt and completion as they are and ends with eos; "chat" makes them a turn of the user
        and one of the assistant, outer white space dropped.

    The beginning-of-sequence token is written once if the tokenizer or the template writes it. A token that straddles
    the boundary of prompt and completion is trained: it holds the completion's first letters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, prompts: Literal["raw", "chat"] = "raw"):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} gives no offsets: a fast tokenizer is needed")
        template = tokenizer.chat_template
        if prompts == "chat" and template is None:
            raise ValueError(
                "prompts='chat' needs a tokenizer with a chat template; this one has none: use prompts='raw'"
            )
        self.tokenizer = tokenizer
        self.digest = digest(tokenizer)
        self._prompts = prompts
        self._backend = plain_backend(tokenizer)
        self._bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
        self._eos = tokenizer.eos_token_id
        self._marked = isinstance(template, str) and _MARKED.search(template) is not None
        added = tokenizer.added_tokens_decoder.values()
        self._markers = tuple(token.content for token in added if token.content.strip())
        special = [token.content for token in added if token.special and token.content != tokenizer.unk_token]
        self._special = (
            re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None
        )

    def encode(self, parsed: Chat | Completion | Text) -> Encoded:
        """Tokens and mask of one record.

        Raises: BadRecord, naming what is wrong with the record or the template.
        """
        match parsed:
            case Chat(messages):
                encoded = self._chat(list(messages))
            case Completion(prompt, completion) if self._prompts == "chat":
                turns = [("user", prompt.strip()), ("assistant", completion.strip())]
                encoded = self._chat([{"role": role, "content": content} for role, content in turns])
            case Completion(prompt, completion):
                encoded = self._raw(prompt + completion, len(prompt))
            case Text(text):
                encoded = self._raw(text, 0)
        encoded.trained[:1] = False
        if not encoded.trained.any():
            raise BadRecord("no trainable token", "no token is left to train on")
        return encoded

    def _raw(self, text: str, start: int) -> Encoded:
        """The text, learnt from character `start` on, with the end marker."""
        if self._eos is None:
            raise BadRecord(
                "no eos", "the tokenizer has no eos token, so no end can be learnt: set tokenizer.eos_token"
            )
        tokens, trained = self._tokenise(text, [(start, len(text))])
        if tokens[-1:] != [self._eos]:
            tokens, trained = [*tokens, self._eos], np.append(trained, True)
        if self._bos is not None and tokens[0] != self._bos:
            tokens, trained = [self._bos, *tokens], np.insert(trained, 0, False)
        if self._bos not in (None, self._eos) and self._bos in tokens[1:]:
            name = self.tokenizer.bos_token
            raise BadRecord(
                "special token", f"the text holds {name!r}, which begins a sequence and must stand first only"
            )
        return Encoded(np.array(tokens, np.int32), trained)

    def _chat(self, messages: list[dict[str, str]]) -> Encoded:
        if self.tokenizer.chat_template is None:
            raise BadRecord("template", "messages need a chat template; the tokenizer has none: set its chat_template")
        for index, message in enumerate(messages):
            found = self._special.search(message["content"]) if self._special else None
            if found:
                what = f"message {index} holds {found[0]!r}, a special token that only the template may write"
                raise BadRecord("special token", what)
        text, spans = self._marked_spans(messages) if self._marked else self._prefix_spans(messages)
        for index, message in enumerate(messages):
            if message["role"] != "assistant" and message["content"].strip() not in text:
                what = f"{self._template} does not write message {index} of role {message['role']!r}"
                raise BadRecord("template", what)
        tokens, trained = self._tokenise(text, spans)
        if self._bos is not None and tokens[:1] != [self._bos]:
            tokens, trained = [self._bos, *tokens], np.insert(trained, 0, False)
        return Encoded(np.array(tokens, np.int32), trained)

    def _marked_spans(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered chat and the characters inside its {% generation %} blocks, each with the eos right after it."""
        names: Any = self.tokenizer.special_tokens_map
        rendered: Any
        try:
            rendered = render_jinja_template(
                [messages], chat_template=self.tokenizer.chat_template, return_assistant_tokens_mask=True, **names
            )
        except jinja2.TemplateError as error:
            raise BadRecord("template", f"{self._template} refuses the chat: {error}") from error
        (text,), (marks,) = rendered
        eos = self.tokenizer.eos_token
        spans = [(start, self._end(text, start, end)) for start, end in marks]
        if eos:
            spans = [(start, end + len(eos) * text.startswith(eos, end)) for start, end in spans]
        return text, spans

    def _prefix_spans(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered chat and, for each assistant turn, what the render with it adds to the prompt before it."""
        text = self._render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise BadRecord("template", f"the chat begins with the assistant, which {self._template} cannot prompt")
            before = self._render(messages[:index], add_generation_prompt=True)
            after = text if index == len(messages) - 1 else self._render(messages[: index + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise BadRecord(
                    "template",
                    f"{self._template} rewrites earlier text as message {index} is added, so its part is unknown; "
                    "mark the assistant's text with {% generation %} in the template",
                )
            end = self._end(after, len(before), len(after))
            if not after.endswith(self._markers, 0, end):
                raise BadRecord("template", f"{self._template} writes no end-of-turn token after message {index}")
            spans.append((len(before), end))
        return text, spans

    def _end(self, text: str, start: int, end: int) -> int:
        """`end` without the white space that follows an end marker."""
        stripped = start + len(text[start:end].rstrip())
        return stripped if text.endswith(self._markers, start, stripped) else end

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except jinja2.TemplateError as error:
            raise BadRecord("template", f"{self._template} refuses the chat: {error}") from error

    def _tokenise(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], np.ndarray]:
        """Ids, and whether each overlaps one of the spans of characters."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        trained = np.zeros(len(encoding.ids), bool)
        if len(trained):
            starts, ends = np.array(encoding.offsets).T
            for start, end in spans:
                trained |= (starts < end) & (ends > start)
        return encoding.ids, trained

    @property
    def _template(self) -> str:
        """How errors name the chat template."""
        opening = str(self.tokenizer.chat_template)[:40]
        return f"the chat template of {self.tokenizer.name_or_path or 'this tokenizer'!r} ({opening!r}...)"
