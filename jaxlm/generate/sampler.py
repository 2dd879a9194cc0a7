# SPDX-License-Identifier: Apache-2.0
"""The embedded engine: prompts into a cache, tokens out of it, on the parameters that are trained.

A sampler has a fixed number of slots, each the row of one cache.  Prompts are read in groups of a few shapes, their
keys are put into free slots (once for each of their samples), and all slots are decoded together, some tokens at a
time; a slot whose sample has ended is filled with the next one.  Shapes repeat, so that programs do.  `session` keeps
the books, `slots` has the programs.

B slots, S tokens that a slot can hold.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxlm.generate.drawing import Processor
from jaxlm.generate.engine import Completion, Prompt, Sampling
from jaxlm.generate.session import Session, bucket
from jaxlm.generate.texts import prompt_tokens
from jaxlm.kernels.cross_entropy import weighted_nll
from jaxlm.nn.decoder import Model, Params


class Scored(NamedTuple):
    """What a completion's tokens are worth after their prompt.

    Attributes:
      log_probs: float32 [n], nats.
      best: bool [n], the token is the most probable one, which temperature 0 would take.
    """

    log_probs: np.ndarray
    best: np.ndarray


class Sampler:
    """An engine over a model and parameters on this process's devices; nothing is copied, nothing is kept of them.

    Args:
      model: any decoder.
      params: as `Model.init` makes them, adapters allowed, any sharding; `sampler.params = newer` follows training.
      tokenizer: encodes prompts and decodes completions; its eos token ends a completion.
      slots: B, samples that are decoded at once.
      size: S, tokens of prompt and completion together; None: the model's `max_length`.
      chunk: tokens decoded between two looks of the host: fewer for smoother streams, more for fewer waits.
      stop_tokens: ids that end a completion beside eos.

    >>> from jaxlm.data import byte_tokenizer
    >>> from jaxlm.nn import ModelConfig
    >>> model = Model(ModelConfig(vocab_size=264, width=8, num_layers=2, num_heads=2, max_length=64))
    >>> sampler = Sampler(model, model.init(jax.random.key(0)), byte_tokenizer(), slots=2)
    >>> [[one, two]] = sampler.sample(["a"], Sampling(num_samples=2, max_tokens=3))
    >>> print(len(one.tokens), one.finish_reason, len(sampler.score(["a"], ["bcd"])[0]))
    3 length 3
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: PreTrainedTokenizerFast,
        *,
        slots: int = 16,
        size: int | None = None,
        chunk: int = 16,
        stop_tokens: Sequence[int] = (),
    ):
        if slots < 1 or chunk < 1:
            raise ValueError(f"a sampler needs slots and a chunk of at least 1, got {slots} and {chunk}")
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.num_slots, self.chunk = slots, chunk
        self.size = model.config.max_length if size is None else size
        eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.stops = jnp.asarray(sorted({*eos, *stop_tokens}) or [-1], jnp.int32)

    def session(self, processors: Sequence[Processor] = ()) -> Session:
        """A line of requests over this sampler's slots: they come and go, and have options and seeds of their own."""
        return Session(self, processors=processors)

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        stream: Callable[[int, int, str], None] | None = None,
        processors: Sequence[Processor] = (),
    ) -> list[list[Completion]]:
        """See `Engine.sample`.

        Args:
          prompts: text, messages or token ids.
          sampling: how.
          stream: called with (prompt, sample, new text).
          processors: `(logits [V], seen) -> logits [V]` of one row each, applied in this order before temperature and
            filters; `log_probs` are of what they leave, `raw_log_probs` of the model. Programs are kept by the
            objects: give the same ones again. At least one token must stay above -inf.
        Raises: ValueError for a prompt without tokens, or one that with `max_tokens` exceeds the sampler's size.
        """
        session = self.session(processors)
        places = {}
        for i, prompt in enumerate(prompts):
            said = None if stream is None else functools.partial(stream, i)
            places[session.submit(prompt, sampling, place=i, stream=said)] = i
        found: list[list[Completion]] = [[] for _ in prompts]
        while not session.idle:
            for ticket, completions in session.step():
                found[places[ticket]] = completions
        return found

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str | Sequence[int]]) -> list[np.ndarray]:
        """See `Engine.score`; texts are encoded without special tokens, and no end marker is added."""
        return [scored.log_probs for scored in self.scored(prompts, completions)]

    def scored(self, prompts: Sequence[Prompt], completions: Sequence[str | Sequence[int]]) -> list[Scored]:
        """As `score`, and whether each token is the most probable one."""
        pairs = []
        for prompt, completion in zip(prompts, completions, strict=True):
            before = prompt_tokens(self.tokenizer, prompt)
            if isinstance(completion, str):
                completion = self.tokenizer.encode(completion, add_special_tokens=False)
            pairs.append((before, np.asarray(completion, np.int32)))
        found = [Scored(np.zeros(0, np.float32), np.zeros(0, bool))] * len(pairs)
        groups: dict[int, list[int]] = {}
        for i, (before, after) in enumerate(pairs):
            groups.setdefault(bucket(len(before) + len(after) - 1, self.size), []).append(i)
        for length, members in groups.items():
            for start in range(0, len(members), self.num_slots):
                rows = members[start : start + self.num_slots]
                tokens, targets = np.zeros((2, self.num_slots, length), np.int32)
                for row, i in enumerate(rows):
                    both = np.concatenate(pairs[i])
                    tokens[row, : len(both) - 1], targets[row, : len(both) - 1] = both[:-1], both[1:]
                log_probs, best = map(np.asarray, _score(self.model, self.params, tokens, targets))
                for row, i in enumerate(rows):
                    before, after = pairs[i]
                    place = slice(len(before) - 1, len(before) + len(after) - 1)
                    found[i] = Scored(log_probs[row, place], best[row, place])
        return found


@functools.partial(jax.jit, static_argnums=0)
def _score(model: Model, params: Params, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p of each target after the tokens up to its place, [B, T] float32; whether it is the argmax, [B, T] bool."""
    hidden = model.apply(params, tokens_BT)
    weights_BT = jnp.ones(targets_BT.shape, jnp.float32)
    result = weighted_nll(hidden, model.head(params), targets_BT, weights_BT, softcap=model.config.logit_softcap)
    return result.log_probs_BT, result.correct_BT
