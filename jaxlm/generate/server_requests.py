# SPDX-License-Identifier: Apache-2.0
"""OpenAI's completions and chats, in and out: bodies of requests become work for a sampler, its results answers.

A field that is not read is refused by name, unless its value is the one that changes nothing.
"""

import math
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np

from jaxlm.generate.engine import Completion, Sampling
from jaxlm.generate.sampler import Sampler
from jaxlm.generate.texts import prompt_tokens

MOST_SAMPLES = 1024  # of one request

_BOTH = {
    *("model", "user", "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed", "stream"),
    *("stream_options", "logprobs", "return_token_ids"),
}
_READ = {
    "completion": _BOTH | {"prompt", "echo"},
    "chat": _BOTH | {"messages", "max_completion_tokens", "top_logprobs"},
}
# Fields that are not read, and the values of them that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tools": ([],),
}
_ROLES = ("system", "user", "assistant", "tool")


class BadRequest(Exception):
    """What the client can mend.

    Attributes:
      param: the field it is about.
      status: of the answer.
      code: OpenAI's short name of the mistake.
    """

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class Asked(NamedTuple):
    """A request that was understood.

    Attributes:
      kind: of endpoint.
      prompts: int32 [n] each.
      sampling: how; None scores the prompts.
      seeded: whether the client gave the seed.
      streams: whether the answer is a stream, and `usage` whether it ends with one.
      log_probs: whether they are told, and `token_ids` likewise.
    """

    kind: Literal["completion", "chat"]
    prompts: list[np.ndarray]
    sampling: Sampling | None
    seeded: bool
    streams: bool
    usage: bool
    log_probs: bool
    token_ids: bool


class Reader:
    """Understands requests to one sampler; its tokenizer is used by one thread at a time here."""

    def __init__(self, sampler: Sampler, model: str):
        self._sampler, self._model = sampler, model
        self._lock = threading.Lock()

    def read(self, kind: Literal["completion", "chat"], body: Any) -> Asked:
        """Raises: BadRequest, which names the field, its value and the remedy."""
        if not isinstance(body, dict):
            raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
        body = {name: value for name, value in body.items() if value is not None}
        for name, value in body.items():
            if name not in _READ[kind] and value not in _NEUTRAL.get(name, ()):
                raise BadRequest(f"unsupported field {name!r}: leave it out", name, code="unsupported_parameter")
        if body.get("model", self._model) != self._model:
            raise BadRequest(
                f"there is no model {body['model']!r} here, only {self._model!r}",
                "model",
                status=404,
                code="model_not_found",
            )
        prompts = self._chat(body) if kind == "chat" else self._prompts(body)
        options = _of(body, "stream_options", dict, {})
        if options.keys() - {"include_usage"}:
            raise BadRequest("stream_options has only include_usage here", "stream_options")
        log_probs = _of(body, "logprobs", bool, False) if kind == "chat" else "logprobs" in body
        for name in ("logprobs", "top_logprobs") if kind == "completion" else ("top_logprobs",):
            if _of(body, name, int, 0) != 0:
                raise BadRequest(f"{name} must be 0: the log-prob of the token itself is told, no others", name)
        sampling = self._sampling(kind, body, prompts)
        self._check_lengths(prompts, sampling)
        return Asked(
            kind,
            prompts,
            sampling,
            seeded="seed" in body,
            streams=_of(body, "stream", bool, False),
            usage=_of(options, "include_usage", bool, False),
            log_probs=log_probs,
            token_ids=_of(body, "return_token_ids", bool, False),
        )

    def _sampling(self, kind: str, body: Mapping[str, Any], prompts: Sequence[np.ndarray]) -> Sampling | None:
        if _of(body, "echo", bool, False):
            if _of(body, "max_tokens", int, 16) != 0 or _of(body, "n", int, 1) != 1 or _of(body, "stream", bool, False):
                raise BadRequest("echo scores a prompt here: ask for max_tokens 0, n 1 and no stream with it", "echo")
            return None
        room = self._sampler.size + 1 - max(map(len, prompts))
        name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        stop: Any = body.get("stop", [])
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(word, str) for word in stop):
            raise BadRequest(f"stop must be a string or a list of strings, got {stop!r}", "stop")
        top_k = _of(body, "top_k", int, -1)
        seed = _of(body, "seed", int, 0)
        if not -(2**63) <= seed < 2**63:
            raise BadRequest(f"seed must have 64 bits, got {seed}", "seed")
        try:
            sampling = Sampling(
                num_samples=_of(body, "n", int, 1),
                max_tokens=_of(body, name, int, max(room, 1) if kind == "chat" else 16),
                temperature=_of(body, "temperature", float, 1.0),
                top_p=_of(body, "top_p", float, 1.0),
                top_k=None if top_k in (-1, 0) else top_k,
                min_p=_of(body, "min_p", float, 0.0),
                stop=tuple(stop),
                seed=seed,
            )
        except ValueError as error:
            raise BadRequest(str(error).replace("num_samples", "n")) from error
        if sampling.num_samples * len(prompts) > MOST_SAMPLES:
            raise BadRequest(f"a request may ask for {MOST_SAMPLES} samples, all prompts together", "n")
        return sampling

    def _check_lengths(self, prompts: Sequence[np.ndarray], sampling: Sampling | None) -> None:
        new = 0 if sampling is None else sampling.max_tokens
        for tokens in prompts:
            if len(tokens) + new > self._sampler.size + (0 if sampling is None else 1):
                raise BadRequest(
                    f"the prompt has {len(tokens)} tokens, and {new} more exceed the {self._sampler.size} that this "
                    "server holds: shorten it, or ask for fewer max_tokens",
                    "max_tokens" if new else "prompt",
                    code="context_length_exceeded",
                )

    def _prompts(self, body: Mapping[str, Any]) -> list[np.ndarray]:
        prompt = body.get("prompt")
        if not (isinstance(prompt, list) and prompt and all(isinstance(item, str | list) for item in prompt)):
            prompt = [prompt]
        found = [self._prompt(item) for item in prompt]
        if len(found) > MOST_SAMPLES:
            raise BadRequest(f"a request may have {MOST_SAMPLES} prompts, got {len(found)}", "prompt")
        return found

    def _prompt(self, prompt: Any) -> np.ndarray:
        most = self._sampler.model.config.vocab_size
        if isinstance(prompt, list) and prompt:
            if not all(type(token) is int and 0 <= token < most for token in prompt):
                raise BadRequest(f"token ids are whole numbers from 0 to {most - 1}", "prompt")
        elif not isinstance(prompt, str):
            raise BadRequest("prompt must be a string, a list of token ids, or a list of either", "prompt")
        return self._encode(prompt, "prompt")

    def _chat(self, body: Mapping[str, Any]) -> list[np.ndarray]:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages must be a list of at least one message", "messages")
        return [self._encode([_message(i, message) for i, message in enumerate(messages)], "messages")]

    def _encode(self, prompt: Any, name: str) -> np.ndarray:
        try:
            with self._lock:
                return prompt_tokens(self._sampler.tokenizer, prompt)
        except (ValueError, jinja2.TemplateError) as error:
            raise BadRequest(f"{name}: {error}", name) from error


def _of(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of a type; whole numbers are numbers, True is none."""
    value = body.get(name, default)
    right = isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not right or (kind is float and not math.isfinite(value)):
        words = {int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}
        raise BadRequest(f"{name} must be {words[kind]}, got {value!r}", name)
    return kind(value)


def _message(i: int, message: Any) -> dict[str, str]:
    """A message with plain text."""
    where = f"messages[{i}]"
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise BadRequest(f"{where} must have a role of {', '.join(_ROLES)}", where)
    for name, value in message.items():
        if name not in ("role", "content") and value:
            raise BadRequest(f"{where} has an unsupported field {name!r}: leave it out", where)
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise BadRequest(f"{where} has a part that is not text: only text is read", where)
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise BadRequest(f"{where} must have content that is text", where)
    return {"role": message["role"], "content": content}


class Answer:
    """The answer to one request, whole or in pieces."""

    def __init__(self, asked: Asked, sampler: Sampler, model: str):
        self._asked, self._tokenizer = asked, sampler.tokenizer
        chat = asked.kind == "chat"
        name = ("chat.completion.chunk" if asked.streams else "chat.completion") if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": name,
            "created": int(time.time()),
            "model": model,
        }

    def scored(self, found: Sequence[np.ndarray]) -> dict[str, Any]:
        """The answer to `echo`: the prompts, and the log-probs of their tokens but the first."""
        choices = []
        for i, (tokens, log_probs) in enumerate(zip(self._asked.prompts, found, strict=True)):
            choice: dict[str, Any] = {"index": i, "text": self._tokenizer.decode(tokens), "logprobs": None}
            if self._asked.log_probs:
                choice["logprobs"] = self._told(tokens, [None, *log_probs.tolist()])
            choices.append(choice | self._ids(tokens) | {"finish_reason": "length"})
        return self._head | {"choices": choices, "usage": self._usage(0)}

    def whole(self, found: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """All completions at once."""
        choices = []
        for index, completion in enumerate(completion for samples in found for completion in samples):
            said: dict[str, Any] = {"text": completion.text}
            if self._asked.kind == "chat":
                said = {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
            choices.append({"index": index} | said | self._end(completion))
        return self._head | {"choices": choices, "usage": self._usage(_count(found))}

    def piece(self, prompt: int, sample: int, text: str, *, first: bool) -> dict[str, Any]:
        """New text of one sample."""
        return self._piece(prompt, sample, text, first, {"finish_reason": None, "logprobs": None})

    def last_pieces(self, found: Sequence[Sequence[Completion]], begun: set[tuple[int, int]]) -> list[dict[str, Any]]:
        """How each sample ended, with all its log-probs and ids where they were asked for; then the usage."""
        pieces = [
            self._piece(i, n, "", (i, n) not in begun, self._end(completion))
            for i, samples in enumerate(found)
            for n, completion in enumerate(samples)
        ]
        return pieces + ([self._head | {"choices": [], "usage": self._usage(_count(found))}] * self._asked.usage)

    def _piece(self, prompt: int, sample: int, text: str, first: bool, rest: dict[str, Any]) -> dict[str, Any]:
        assert self._asked.sampling is not None
        index = prompt * self._asked.sampling.num_samples + sample
        delta = {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})}
        choice = {"index": index} | (delta if self._asked.kind == "chat" else {"text": text}) | rest
        return self._head | {"choices": [choice]}

    def _end(self, completion: Completion) -> dict[str, Any]:
        told = None
        if self._asked.log_probs:
            told = self._told(completion.tokens, completion.raw_log_probs.tolist())
            told["policy_logprobs"] = completion.log_probs.tolist()  # ours: after temperature and filters
        return {"logprobs": told, "finish_reason": completion.finish_reason} | self._ids(completion.tokens)

    def _ids(self, tokens: np.ndarray) -> dict[str, Any]:
        return {"token_ids": tokens.tolist()} if self._asked.token_ids else {}

    def _told(self, tokens: np.ndarray, log_probs: list[float | None]) -> dict[str, Any]:
        pieces = [str(self._tokenizer.decode([token])) for token in tokens.tolist()]
        if self._asked.kind == "chat":
            content = [
                {"token": piece, "logprob": log_prob, "bytes": list(piece.encode()), "top_logprobs": []}
                for piece, log_prob in zip(pieces, log_probs, strict=True)
            ]
            return {"content": content, "refusal": None}
        ends = np.cumsum([0, *map(len, pieces)]).tolist()
        return {"tokens": pieces, "token_logprobs": log_probs, "top_logprobs": None, "text_offset": ends[:-1]}

    def _usage(self, new: int) -> dict[str, int]:
        read = sum(map(len, self._asked.prompts))
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}


def _count(found: Sequence[Sequence[Completion]]) -> int:
    return sum(len(completion.tokens) for samples in found for completion in samples)
