# SPDX-License-Identifier: Apache-2.0
"""An engine on the other end of a wire: any server that speaks OpenAI's completions, such as vLLM, SGLang or ours.

Requests are asked side by side, tried again where that may help, and their answers can be kept in a journal.
"""

import hashlib
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxlm.generate.engine import Completion, Prompt, Sampling
from jaxlm.generate.http_client import HttpClient, Patience
from jaxlm.generate.journal import Journal, batch_key, request_key
from jaxlm.generate.texts import prompt_tokens

UNKNOWN = -1  # the id of a token that the server did not tell
_OTHER_TEXT = "a stream broke, and the server said another text when it was asked again: ask without stream"


class Dialect(NamedTuple):
    """What a kind of server knows beside OpenAI's own fields.

    Attributes:
      filters: whether it reads `top_k` and `min_p`.
      token_ids: whether it reads `return_token_ids`.
      echo: the fields of a request that scores a prompt by `echo`; None: it cannot.
    """

    filters: bool
    token_ids: bool
    echo: Mapping[str, int] | None


DIALECTS = {
    "vllm": Dialect(filters=True, token_ids=True, echo={"max_tokens": 0, "logprobs": 0}),  # and scripts/serve.py
    "sglang": Dialect(filters=True, token_ids=False, echo={"max_tokens": 1, "logprobs": 1}),
    "openai": Dialect(filters=False, token_ids=False, echo=None),
}


class _Request(NamedTuple):
    path: str
    body: dict[str, Any]


class RemoteEngine:
    """An `Engine` over a server.

    Token ids and log-probs are those that the server gives: an id it does not tell is -1, a log-prob nan.  A server
    tells the model's own log-probs; those of the distribution drawn from are known where it is the same (temperature 1,
    no filter), at temperature 0 (all are 0), and from scripts/serve.py.

    Args:
      url: such as http://127.0.0.1:8000/v1.
      model: its name there.
      dialect: a key of DIALECTS; a server of ours speaks "vllm".
      tokenizer: the model's, to score texts; samples need none.
      key_variable: the environment variable with the server's key; None sends none.  The key is never stored.
      concurrency: requests that are asked at a time.
      patience: time limits and retries of a request.
      total_seconds: of a call of `sample` or `score`; None: no limit.
      journals: a folder; a call that was killed and is made again asks only what is not answered there.
    Raises: ValueError for an unknown dialect, a URL that is none, a key that is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        dialect: str = "vllm",
        tokenizer: PreTrainedTokenizerFast | None = None,
        key_variable: str | None = None,
        concurrency: int = 32,
        patience: Patience = Patience(),  # noqa: B008
        total_seconds: float | None = None,
        journals: str | os.PathLike[str] | None = None,
    ):
        if dialect not in DIALECTS:
            raise ValueError(f"no dialect {dialect!r}: try {', '.join(DIALECTS)}")
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        self._client = HttpClient(url, key_variable=key_variable, patience=patience)
        self._model, self._dialect, self._tokenizer = model, DIALECTS[dialect], tokenizer
        self._concurrency, self._total_seconds = concurrency, total_seconds
        self._journals = None if journals is None else pathlib.Path(journals)

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        stream: Callable[[int, int, str], None] | None = None,
        journal: str | os.PathLike[str] | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.sample`; one request a prompt, whose seed is made of `sampling.seed` and the prompt's place.

        Args:
          journal: the file of this batch, instead of one in the engine's `journals`.
        Raises: ValueError for what the server refuses or cannot do; ConnectionError, TimeoutError when it fails. What
          was answered until then is in the journal.
        """
        requests = [self._sample_request(i, prompt, sampling) for i, prompt in enumerate(prompts)]
        lock = threading.Lock()

        def say(i: int, sample: int, text: str) -> None:
            if stream is not None and text:
                with lock:
                    stream(i, sample, text)

        def say_all(i: int, choice: int, text: str) -> None:
            for n in range(choice, sampling.num_samples, _asked(sampling)):  # one choice may stand for all samples
                say(i, n, text)

        def ask(i: int, post: Callable[..., Any]) -> Any:
            path, body = requests[i]
            if stream is None:
                return _choices(post(path, body), sampling)
            gathered = _Gathered(_asked(sampling), lambda choice, text: say_all(i, choice, text))
            more = {"stream": True}
            post(path, body | more, event=gathered.add, restart=gathered.restart)
            return _choices(gathered.whole(), sampling)

        answers, known = self._ask_all(requests, ask, journal)
        for i in known:
            for n, choice in enumerate(answers[i]):
                say(i, n, choice["text"])
        return [[_completion(choice) for choice in choices] for choices in answers]

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Sequence[int]],
        *,
        journal: str | os.PathLike[str] | None = None,
    ) -> list[np.ndarray]:
        """See `Engine.score`: the server reads prompt and completion and tells the log-probs of what it read.

        Raises: as `sample`; ValueError too for text without a tokenizer, and for a server that cannot.
        """
        echo = self._dialect.echo
        if echo is None:
            raise ValueError(
                "OpenAI's own servers do not tell log-probs of a text that is given: score with a server that reads "
                'echo, such as vLLM or SGLang (dialect="vllm" or "sglang"), or with the embedded sampler'
            )
        requests, lengths = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            before, after = self._tokens(prompt, None), self._tokens(completion, False)
            if not before:
                raise ValueError(f"prompt {prompt!r} has no tokens: begin with at least one")
            body = {"model": self._model, "prompt": before + after, "echo": True, "temperature": 0}
            requests.append(_Request("/completions", body | dict(echo)))
            lengths.append((len(before), len(after)))

        def ask(i: int, post: Callable[..., Any]) -> Any:
            choices = post(*requests[i]).get("choices") or [{}]
            found = (choices[0].get("logprobs") or {}).get("token_logprobs") or []
            before, after = lengths[i]
            if len(found) != before + after + echo["max_tokens"]:
                raise ValueError(
                    f"the server told {len(found)} log-probs of {before + after} tokens: it does not score prompts by "
                    f"echo with max_tokens {echo['max_tokens']}; use one that does, or the embedded sampler"
                )
            return found[before : before + after]

        answers, _ = self._ask_all(requests, ask, journal)
        return [np.asarray(answer, np.float32) for answer in answers]

    def _tokens(self, text: Any, special: bool | None) -> list[int]:
        """Ids as they are; text and messages by the tokenizer; `special` False: without special tokens."""
        if not isinstance(text, str) and not (len(text) and isinstance(text[0], Mapping)):
            return [int(token) for token in text]
        if self._tokenizer is None:
            raise ValueError("to score text a remote engine needs the model's tokenizer: RemoteEngine(tokenizer=...)")
        if special is False:
            return self._tokenizer.encode(text, add_special_tokens=False)
        return prompt_tokens(self._tokenizer, text).tolist()

    def _sample_request(self, place: int, prompt: Prompt, sampling: Sampling) -> _Request:
        seed = hashlib.sha256(f"{sampling.seed}/{place}".encode()).digest()[:4]
        body: dict[str, Any] = {
            "model": self._model,
            "n": _asked(sampling),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": int.from_bytes(seed, "big") >> 1,  # 31 bits: some servers have no more
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        filters = {"top_k": sampling.top_k, "min_p": sampling.min_p or None}
        for name, value in filters.items():
            if value is not None and not self._dialect.filters:
                raise ValueError(
                    f'{name} is not known to this server: leave it out, or name its dialect, such as "vllm"'
                )
        body |= {name: value for name, value in filters.items() if value is not None}
        if self._dialect.token_ids:
            body["return_token_ids"] = True
        if not len(prompt):
            raise ValueError(f"prompt {prompt!r} has no tokens: begin with at least one")
        if not isinstance(prompt, str) and isinstance(prompt[0], Mapping):
            return _Request("/chat/completions", body | {"messages": list(prompt), "logprobs": True})
        given = prompt if isinstance(prompt, str) else self._tokens(prompt, None)
        return _Request("/completions", body | {"prompt": given, "logprobs": 0})

    def _ask_all(
        self,
        requests: Sequence[_Request],
        ask: Callable[[int, Callable[..., Any]], Any],
        journal: str | os.PathLike[str] | None,
    ) -> tuple[list[Any], list[int]]:
        """The answers of all requests, and which of them came from the journal."""
        keys = [request_key(*request) for request in requests]
        path = None if journal is None else pathlib.Path(journal)
        if path is None and self._journals is not None:
            path = self._journals / f"{batch_key(keys)[:16]}.jsonl"
        if path is None:
            return self._ask_open(keys, {}, ask, lambda key, answer: None), []
        with Journal(path, keys) as book:
            known = [i for i, key in enumerate(keys) if key in book.answers]
            return self._ask_open(keys, book.answers, ask, book.add), known

    def _ask_open(
        self,
        keys: Sequence[str],
        known: Mapping[str, Any],
        ask: Callable[[int, Callable[..., Any]], Any],
        keep: Callable[[str, Any], None],
    ) -> list[Any]:
        deadline = math.inf if self._total_seconds is None else time.monotonic() + self._total_seconds
        stopped = threading.Event()

        def post(path: str, body: Mapping[str, Any], **how: Any) -> Any:
            return self._client.post(path, body, deadline=deadline, stopped=stopped, **how)

        def one(i: int) -> Any:
            answer = ask(i, post)
            keep(keys[i], answer)
            return answer

        found: dict[str, Any] = dict(known)
        places = {key: i for i, key in reversed(list(enumerate(keys))) if key not in found}
        with ThreadPoolExecutor(min(self._concurrency, max(1, len(places)))) as pool:
            asked = {key: pool.submit(one, i) for key, i in sorted(places.items(), key=lambda item: item[1])}
            try:
                done, _ = wait(asked.values(), return_when=FIRST_EXCEPTION)
                for answered in done:
                    answered.result()
            except (ValueError, OSError):
                stopped.set()  # those in flight are waited for, so that their answers are kept
                pool.shutdown(cancel_futures=True)
                raise
            except BaseException:  # Ctrl-C: nobody waits for an answer
                stopped.set()
                self._client.close()
                pool.shutdown(cancel_futures=True)
                raise
        found |= {key: answered.result() for key, answered in asked.items()}
        return [found[key] for key in keys]


class _Gathered:
    """The choices of a stream, put together; text is said once, also when the stream begins again."""

    def __init__(self, count: int, say: Callable[[int, str], None]):
        self._said, self._say = [""] * count, say
        self.restart()

    def restart(self) -> None:
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        for piece in event.get("choices", ()):
            n = piece["index"]
            choice = self._choices.setdefault(n, {"index": n, "text": "", "logprobs": {}, "token_ids": []})
            choice["text"] += piece.get("text") or (piece.get("delta") or {}).get("content") or ""
            choice["token_ids"] += piece.get("token_ids") or []
            for name, values in (piece.get("logprobs") or {}).items():
                if isinstance(values, list):
                    choice["logprobs"].setdefault(name, []).extend(values)
            choice["finish_reason"] = piece.get("finish_reason") or choice.get("finish_reason")
            text, said = choice["text"], self._said[n]
            if not (text.startswith(said) or said.startswith(text)):
                raise ConnectionError(_OTHER_TEXT)
            if len(text) > len(said):
                self._said[n] = text
                self._say(n, text[len(said) :])

    def whole(self) -> dict[str, Any]:
        if any(choice["text"] != self._said[n] for n, choice in self._choices.items()):
            raise ConnectionError(_OTHER_TEXT)
        return {"choices": [self._choices[n] for n in sorted(self._choices)]}


def _asked(sampling: Sampling) -> int:
    """Samples to ask for: at temperature 0 all are one, and vLLM refuses to make more."""
    return 1 if sampling.temperature == 0 else sampling.num_samples


def _choices(answer: Mapping[str, Any], sampling: Sampling) -> list[dict[str, Any]]:
    """What is kept of an answer: of each choice text, ids, log-probs (None: not told) and why it ended."""
    try:
        found = sorted(answer["choices"], key=lambda choice: choice["index"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"the server's answer has no choices: {str(answer)[:200]}") from error
    if len(found) != _asked(sampling):
        raise ValueError(f"the server gave {len(found)} samples where {_asked(sampling)} were asked for")
    return [_choice(found[n % len(found)], sampling) for n in range(sampling.num_samples)]


def _choice(choice: Mapping[str, Any], sampling: Sampling) -> dict[str, Any]:
    told = choice.get("logprobs") or {}
    raw = told.get("token_logprobs")
    if raw is None:
        raw = [token["logprob"] for token in told.get("content") or []]
    tokens = choice.get("token_ids") or [UNKNOWN] * len(raw)
    raw = raw or [None] * len(tokens)
    if len(raw) != len(tokens):
        raise ValueError(f"the server told {len(tokens)} token ids and {len(raw)} log-probs of one completion")
    policy = told.get("policy_logprobs")
    if policy is None and sampling.temperature == 0:
        policy = [0.0] * len(tokens)
    elif policy is None:
        same = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, None, 0)
        policy = raw if same else [None] * len(tokens)
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise ValueError(f"a completion ended for {reason!r}, which is neither a stop nor the length")
    text = choice["text"] if "text" in choice else choice["message"].get("content") or ""
    return {"text": text, "tokens": tokens, "log_probs": policy, "raw_log_probs": raw, "finish_reason": reason}


def _completion(choice: Mapping[str, Any]) -> Completion:
    return Completion(
        choice["text"],
        np.asarray(choice["tokens"], np.int32),
        np.asarray(choice["log_probs"], np.float32),  # None becomes nan
        np.asarray(choice["raw_log_probs"], np.float32),
        choice["finish_reason"],
    )
