# SPDX-License-Identifier: Apache-2.0
"""What every engine does, embedded or remote: sample completions of prompts, score given ones.  No jax, no numpy."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:  # configs hold a `Sampling`, and `--help` waits for nothing
    import numpy as np

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]  # text, messages of a chat, or token ids


class Completion(NamedTuple):
    """One sample.

    Attributes:
      text: decoded, without special tokens, cut before a stop string.
      tokens: int32 [n], with the stop token that ended it, if one did.
      log_probs: float32 [n], nats, under the distribution that was drawn from (after temperature and filters).
      raw_log_probs: float32 [n], nats, of the model itself.
      finish_reason: "stop", a stop token or string; "length", no more tokens were allowed.
    """

    text: str
    tokens: "np.ndarray"
    log_probs: "np.ndarray"
    raw_log_probs: "np.ndarray"
    finish_reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      num_samples: completions of each prompt.
      max_tokens: of a completion, its stop token included.
      temperature: logits are divided by it; 0 takes the most probable token.
      top_p: keep the fewest most probable tokens that hold this probability together, in (0, 1].
      top_k: keep so many most probable tokens; None: all.
      min_p: keep tokens at least this probable relative to the most probable one, in [0, 1).
      stop: strings that end a completion; they are cut off.
      seed: of the draws. A sample depends on the seed, its prompt's place and its own number, not on its neighbours.
    """

    num_samples: int = 1
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name, least in {"num_samples": 1, "max_tokens": 1, "temperature": 0.0}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}: 1 keeps all tokens")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p must be in [0, 1), got {self.min_p}: 0 keeps all tokens")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}: None keeps all tokens")
        if "" in self.stop:
            raise ValueError("a stop string is empty: it would end every completion at once")


class Engine(Protocol):
    """Whatever samples: callers cannot tell which one they have."""

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, stream: Callable[[int, int, str], None] | None = None
    ) -> list[list[Completion]]:
        """`num_samples` completions of each prompt, in the order of the prompts.

        Args:
          prompts: text, messages of a chat (the template's generation prompt is added), or token ids.
          sampling: how.
          stream: called with (prompt, sample, new text) as text becomes final.
        """
        ...

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str | Sequence[int]]) -> "list[np.ndarray]":
        """log p of every token of each completion after its prompt, nats, float32 [n]."""
        ...
