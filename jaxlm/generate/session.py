# SPDX-License-Identifier: Apache-2.0
"""Requests that come and go while others run: each prompt with its own options, all decoded together.

Samples wait in the order in which they were submitted and get slots as these become free.  What a sample draws depends
on its request's seed, its prompt's place and its own number, not on who runs beside it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate import slots as device
from jaxlm.generate.drawing import Draws, Kind, Processor
from jaxlm.generate.engine import Completion, Prompt, Sampling
from jaxlm.generate.texts import Piece, TextSoFar, prompt_tokens

if TYPE_CHECKING:
    from jaxlm.generate.sampler import Sampler

SHORTEST = 64  # tokens of the smallest bucket; each next one is twice as long


def bucket(length: int, most: int) -> int:
    """The smallest of 64, 128, 256 ... that holds `length`, at most `most`.

    >>> bucket(3, 1000), bucket(65, 1000), bucket(999, 1000)
    (64, 128, 1000)
    """
    size = SHORTEST
    while size < length:
        size *= 2
    return max(length, min(size, most))


class Finished(NamedTuple):
    """A request that is complete: its ticket and its `num_samples` completions."""

    ticket: int
    completions: list[Completion]


class _Request(NamedTuple):
    tokens: np.ndarray
    sampling: Sampling
    place: int
    key: np.ndarray  # data of the seed's key
    stream: Callable[[int, str], None] | None
    completions: dict[int, Completion]  # by sample, as they end


class _Sample(NamedTuple):
    ticket: int
    number: int


class Session:
    """What `Sampler.session` opens; used by one thread at a time.

    Args:
      sampler: its model, parameters, tokenizer and slots; `sampler.params = newer` counts from the next step on.
      processors: of the logits of all requests (`jaxlm.generate.drawing.Processor`).

    >>> from jaxlm.data import byte_tokenizer
    >>> from jaxlm.generate import Sampler
    >>> from jaxlm.nn import Model, ModelConfig
    >>> model = Model(ModelConfig(vocab_size=264, width=8, num_layers=2, num_heads=2, max_length=64))
    >>> session = Sampler(model, model.init(jax.random.key(0)), byte_tokenizer(), slots=2).session()
    >>> one, two = (session.submit("a", Sampling(max_tokens=3, seed=seed)) for seed in (1, 2))
    >>> session.cancel(one)
    >>> while not session.idle:
    ...     for ticket, [completion] in session.step():
    ...         print(ticket == two, len(completion.tokens))
    True 3
    """

    def __init__(self, sampler: "Sampler", *, processors: Sequence[Processor] = ()):
        for processor in processors:
            if not callable(processor) or getattr(processor, "__hash__", None) is None:
                raise ValueError(
                    f"a processor is a function or a hashable callable, got {type(processor).__name__}: programs are "
                    "kept by it"
                )
        self._sampler, self._processors = sampler, tuple(processors)
        self._requests: dict[int, _Request] = {}
        self._waiting: deque[_Sample] = deque()
        self._running: dict[int, tuple[_Sample, TextSoFar]] = {}  # by slot
        self._slots: device.Slots | None = None
        self._tickets = 0
        self._stops = np.asarray(sampler.stops)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._requests

    @property
    def num_free(self) -> int:
        """Slots that nothing runs in or waits for."""
        return max(self._sampler.num_slots - len(self._running) - len(self._waiting), 0)

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        place: int = 0,
        stream: Callable[[int, str], None] | None = None,
    ) -> int:
        """Gets in line and returns the request's ticket; `step` does the work.

        Args:
          prompt: text, messages or token ids.
          sampling: how.
          place: with the seed it decides the draws: prompt i of `Sampler.sample` has place i.
          stream: called with (sample, new text) as text becomes final.
        Raises: ValueError for a prompt without tokens, or one that with `max_tokens` exceeds the sampler's size.
        """
        tokens, size = prompt_tokens(self._sampler.tokenizer, prompt), self._sampler.size
        length = len(tokens) + self._sampler.model.unseen
        if length + sampling.max_tokens > size + 1:
            raise ValueError(
                f"prompt {place} has {length} tokens, and {sampling.max_tokens} more exceed the {size} of a "
                "slot: shorten it, ask for fewer max_tokens, or make the sampler with a larger size"
            )
        ticket, self._tickets = self._tickets, self._tickets + 1
        key = np.asarray(jax.random.key_data(jax.random.key(sampling.seed)))
        self._requests[ticket] = _Request(tokens, sampling, place, key, stream, {})
        self._waiting.extend(_Sample(ticket, n) for n in range(sampling.num_samples))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Forgets a request; its slots are free at once. One that is finished or unknown is nothing to forget."""
        if self._requests.pop(ticket, None) is not None:
            self._waiting = deque(sample for sample in self._waiting if sample.ticket != ticket)
            self._running = {slot: given for slot, given in self._running.items() if given[0].ticket != ticket}

    def step(self) -> list[Finished]:
        """Fills free slots and decodes a chunk of tokens; returns the requests that this finished."""
        ended: list[int] = []
        self._make_room()
        for length, group in self._groups().items():
            ended += self._begin(length, group)
        if self._running:
            ended += self._decode()
        finished = []
        for ticket in dict.fromkeys(ended):
            request = self._requests.get(ticket)
            if request is not None and len(request.completions) == request.sampling.num_samples:
                del self._requests[ticket]
                finished.append(Finished(ticket, [request.completions[n] for n in range(len(request.completions))]))
        return finished

    def _make_room(self) -> None:
        """Slots long enough for all requests; shorter ones only once nothing runs."""
        sampler = self._sampler
        needed = max((len(r.tokens) + r.sampling.max_tokens for r in self._requests.values()), default=0)
        needed += sampler.model.unseen
        # Every step reads whole slots: their sizes have half steps too, 64, 128, 192, 256, 384 ...
        size = bucket(needed, sampler.size)
        size = 3 * size // 4 if size > 2 * SHORTEST and needed <= 3 * size // 4 else size
        size = sampler.size if device.by_size(sampler.model.config) else size
        pages = -(-size // device.PAGE) * device.PAGE
        if self._slots is None or (not self._running and pages != self._slots.cache.size):
            self._slots = device.empty(sampler.model, sampler.num_slots, size)
        elif pages > self._slots.cache.size:
            self._slots = device.lengthened(sampler.model, size, self._slots)

    def _groups(self) -> dict[int, dict[int, list[tuple[int, int]]]]:
        """Takes samples from the line for all free slots: bucket -> ticket -> (slot, sample)."""
        groups: dict[int, dict[int, list[tuple[int, int]]]] = {}
        for slot in range(self._sampler.num_slots):
            if slot not in self._running and self._waiting:
                sample = self._waiting.popleft()
                request = self._requests[sample.ticket]
                self._running[slot] = (sample, TextSoFar(self._sampler.tokenizer, request.sampling.stop))
                length = bucket(len(request.tokens), self._sampler.size)
                groups.setdefault(length, {}).setdefault(sample.ticket, []).append((slot, sample.number))
        return groups

    def _begin(self, length: int, group: dict[int, list[tuple[int, int]]]) -> list[int]:
        """Reads one group of prompts, each into the slots of its samples; tickets of samples that ended."""
        B, vocabulary = self._sampler.num_slots, self._sampler.model.config.vocab_size
        count = 1 << (len(group) - 1).bit_length()  # 1, 2, 4 ...: few programs
        tokens, lengths = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
        rows, source, limits = np.full(B, B, np.int32), np.zeros(B, np.int32), np.ones(B, np.int32)
        places = np.zeros((B, 2), np.int32)
        temperature, top_p, min_p = np.ones((3, B), np.float32)
        top_k = np.ones(B, np.int32)
        keys = np.zeros((B, len(next(iter(self._requests.values())).key)), np.uint32)
        used = 0
        for row, (ticket, taken) in enumerate(group.items()):
            request = self._requests[ticket]
            how = request.sampling
            tokens[row, : len(request.tokens)], lengths[row] = request.tokens, len(request.tokens)
            for slot, number in taken:
                rows[used], source[used], places[used] = slot, row, (request.place, number)
                limits[used], keys[used] = how.max_tokens, request.key
                temperature[used], top_p[used], min_p[used] = how.temperature, how.top_p, how.min_p
                top_k[used] = min(how.top_k or vocabulary, vocabulary)
                used += 1
        draws = Draws(temperature, top_p, top_k, min_p, keys)  # type: ignore[arg-type]
        given = device.Group(tokens, lengths, rows, source, places, limits, draws)  # type: ignore[arg-type]
        assert self._slots is not None
        self._slots, drawn = device.begin(
            self._sampler.model,
            self._sampler.params,
            self._slots,
            self._sampler.stops,
            given,
            kind=self._kind(),
            processors=self._processors,
        )
        pieces = jax.tree.map(lambda x: np.asarray(x)[:, None], drawn)
        return self._take({int(slot): Piece(*(x[row] for x in pieces)) for row, slot in enumerate(rows[:used])})

    def _decode(self) -> list[int]:
        """A chunk of tokens of every running slot; tickets of samples that ended."""
        alive = np.zeros(self._sampler.num_slots, bool)
        alive[list(self._running)] = True
        assert self._slots is not None
        self._slots, drawn, counts = device.decode(
            self._sampler.model,
            self._sampler.params,
            self._slots,
            self._sampler.stops,
            jnp.asarray(alive),
            chunk=self._sampler.chunk,
            kind=self._kind(),
            processors=self._processors,
        )
        counts, pieces = np.asarray(counts), [np.asarray(x) for x in drawn]
        return self._take({slot: Piece(*(x[slot, : counts[slot]] for x in pieces)) for slot in sorted(self._running)})

    def _kind(self) -> Kind:
        """What the running samples ask for at most."""
        hows = [self._requests[sample.ticket].sampling for sample, _ in self._running.values()]
        drawing = [how for how in hows if how.temperature > 0]
        if any(how.top_p < 1 or how.min_p > 0 or how.top_k is not None for how in drawing):
            return "filtered"
        return "plain" if drawing else "greedy"

    def _take(self, new: dict[int, Piece]) -> list[int]:
        """Hands new tokens to the texts of their slots; frees the slots of those that ended, and returns tickets."""
        ended = []
        for slot, piece in new.items():
            if slot not in self._running:  # a stream cancelled it
                continue
            sample, text = self._running[slot]
            request = self._requests[sample.ticket]
            said = text.add(piece, stops=self._stops)
            if text.num_tokens >= request.sampling.max_tokens:
                text.end("length")
                said += text.rest()
            if text.reason is not None:
                request.completions[sample.number] = text.completion()
                del self._running[slot]
                ended.append(sample.ticket)
            if request.stream is not None and said:
                request.stream(sample.number, said)
        return ended
