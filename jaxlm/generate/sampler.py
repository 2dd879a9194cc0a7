# SPDX-License-Identifier: Apache-2.0
"""The embedded engine: prompts into a cache, tokens out of it, on the parameters that are trained.

A sampler has a fixed number of slots, each the row of one cache.  Prompts are read in groups of a few shapes, their
keys are put into free slots (once for each of their samples), and all slots are decoded together, some tokens at a
time; a slot whose sample has ended is filled with the next one.  Shapes repeat, so that programs do.

B slots, V vocabulary, S tokens that a slot can hold.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxlm.generate.drawing import Drawn, Draws, draw
from jaxlm.generate.engine import Completion, Prompt, Sampling
from jaxlm.generate.texts import Piece, TextSoFar, prompt_tokens
from jaxlm.kernels.cross_entropy import weighted_nll
from jaxlm.nn.cache import Cache, empty_cache, put_rows
from jaxlm.nn.decoder import Model, Params

PAGE = 64
SHORTEST = 64  # tokens of the smallest bucket; each next one is twice as long


class Slots(NamedTuple):
    """What the device holds of all slots between two calls; a pytree, donated from call to call.

    Attributes:
      cache: of B rows.
      tokens: [B] int32, drawn and not read yet.
      counts: [B] int32, tokens drawn of each slot's sample.
      limits: [B] int32, tokens it may have.
      running: [B] bool.
      draws: how each draws.
    """

    cache: Cache
    tokens: jax.Array
    counts: jax.Array
    limits: jax.Array
    running: jax.Array
    draws: Draws


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
        self._stops = jnp.asarray(sorted({*eos, *stop_tokens}) or [-1], jnp.int32)

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, stream: Callable[[int, int, str], None] | None = None
    ) -> list[list[Completion]]:
        """See `Engine.sample`.

        Raises: ValueError for a prompt without tokens, or one that with `max_tokens` exceeds the sampler's size.
        """
        encoded = [prompt_tokens(self.tokenizer, prompt) for prompt in prompts]
        for i, tokens in enumerate(encoded):
            if len(tokens) + sampling.max_tokens > self.size + 1:
                raise ValueError(
                    f"prompt {i} has {len(tokens)} tokens, and {sampling.max_tokens} more exceed the {self.size} of a "
                    "slot: shorten it, ask for fewer max_tokens, or make the sampler with a larger size"
                )
        longest = max((len(tokens) for tokens in encoded), default=0) + sampling.max_tokens
        state = _Batch(self, encoded, sampling, _bucket(longest, self.size), stream)
        while state.waiting or state.occupied:
            state.fill()
            state.decode()
        return state.finished

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
            groups.setdefault(_bucket(len(before) + len(after) - 1, self.size), []).append(i)
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


def _bucket(length: int, most: int) -> int:
    """The smallest of 64, 128, 256 ... that holds `length`, at most `most`.

    >>> _bucket(3, 1000), _bucket(65, 1000), _bucket(999, 1000)
    (64, 128, 1000)
    """
    size = SHORTEST
    while size < length:
        size *= 2
    return max(length, min(size, most))


class _Running(NamedTuple):
    """The sample that a slot works on."""

    prompt: int
    sample: int
    text: TextSoFar


class _Batch:
    """One call of `sample`: what waits, what runs in which slot, what is finished."""

    def __init__(
        self,
        sampler: Sampler,
        encoded: Sequence[np.ndarray],
        sampling: Sampling,
        size: int,
        stream: Callable[[int, int, str], None] | None,
    ):
        self.sampler, self.encoded, self.sampling, self.stream = sampler, encoded, sampling, stream
        self.waiting = [(i, n) for i in range(len(encoded)) for n in range(sampling.num_samples)]
        self.waiting.reverse()  # taken from the end
        self.occupied: dict[int, _Running] = {}
        self.finished: list[list[Any]] = [[None] * sampling.num_samples for _ in encoded]
        vocabulary = sampler.model.config.vocab_size
        self.filtered = sampling.top_p < 1 or sampling.min_p > 0 or sampling.top_k is not None
        B = sampler.num_slots
        cache = empty_cache(sampler.model.config, B, size, page=PAGE)
        key = jax.random.key(sampling.seed)

        def everywhere(value: float, dtype: Any) -> jax.Array:
            return jnp.full(B, value, dtype)

        draws = Draws(
            temperature=everywhere(sampling.temperature, jnp.float32),
            top_p=everywhere(sampling.top_p, jnp.float32),
            top_k=everywhere(min(sampling.top_k or vocabulary, vocabulary), jnp.int32),
            min_p=everywhere(sampling.min_p, jnp.float32),
            keys=jax.random.split(key, B),
        )
        none = jnp.zeros(B, jnp.int32)
        self.slots = Slots(cache, none, jnp.copy(none), jnp.copy(none), jnp.zeros(B, bool), draws)
        self.key = key

    def fill(self) -> None:
        """Reads prompts into the slots that are free."""
        free = [slot for slot in range(self.sampler.num_slots) if slot not in self.occupied]
        taken: dict[int, list[tuple[int, int]]] = {}  # prompt -> (slot, sample)
        for slot in free:
            if not self.waiting:
                break
            prompt, sample = self.waiting.pop()
            taken.setdefault(prompt, []).append((slot, sample))
        groups: dict[int, list[int]] = {}
        for prompt in taken:
            groups.setdefault(_bucket(len(self.encoded[prompt]), self.slots.cache.size), []).append(prompt)
        for length, prompts in groups.items():
            self._read(length, prompts, taken)

    def _read(self, length: int, prompts: list[int], taken: Mapping[int, list[tuple[int, int]]]) -> None:
        """One group of prompts of a bucket, each into the slots of its samples."""
        B = self.sampler.num_slots
        count = 1 << (len(prompts) - 1).bit_length()  # 1, 2, 4 ...: few programs
        tokens, lengths = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
        rows, source = np.full(B, B, np.int32), np.zeros(B, np.int32)
        places = np.zeros((B, 2), np.int32)
        used = 0
        for row, prompt in enumerate(prompts):
            tokens[row, : len(self.encoded[prompt])] = self.encoded[prompt]
            lengths[row] = len(self.encoded[prompt])
            for slot, sample in taken[prompt]:
                rows[used], source[used], places[used] = slot, row, (prompt, sample)
                self.occupied[slot] = _Running(prompt, sample, TextSoFar(self.sampler.tokenizer, self.sampling.stop))
                used += 1
        self.slots, drawn = _begin(
            self.sampler.model,
            self.filtered,
            self.sampler.params,
            self.slots,
            self.sampler._stops,
            self.key,
            *map(jnp.asarray, (tokens, lengths, rows, source, places)),
            jnp.int32(self.sampling.max_tokens),
        )
        self._take([[int(slot)] for slot in rows[:used]], jax.tree.map(lambda x: np.asarray(x)[:, None], drawn))

    def decode(self) -> None:
        """A chunk of tokens of every running slot."""
        if not self.occupied:
            return
        self.slots, drawn, counts = _decode(
            self.sampler.model,
            self.sampler.chunk,
            self.filtered,
            self.sampler.params,
            self.slots,
            self.sampler._stops,
        )
        counts = np.asarray(counts)
        drawn = jax.tree.map(np.asarray, drawn)
        slots = sorted(self.occupied)
        picked = jax.tree.map(lambda x: x[slots], drawn)
        self._take([[slot] for slot in slots], picked, counts[slots])

    def _take(self, slots: list[list[int]], drawn: Drawn, counts: np.ndarray | None = None) -> None:
        """Hands new tokens to the texts of their slots; frees the slots of those that ended."""
        ended = []
        for row, (slot,) in enumerate(slots):
            running = self.occupied[slot]
            count = drawn.tokens.shape[1] if counts is None else int(counts[row])
            new = Piece(*(np.asarray(x)[row, :count] for x in drawn))
            said = running.text.add(new, stops=np.asarray(self.sampler._stops))
            if running.text.num_tokens >= self.sampling.max_tokens:
                running.text.end("length")
                said += running.text.rest()
            if self.stream is not None and said:
                self.stream(running.prompt, running.sample, said)
            if running.text.reason is not None:
                self.finished[running.prompt][running.sample] = running.text.completion()
                ended.append(slot)
        for slot in ended:
            del self.occupied[slot]
        if ended:
            keep = np.zeros(self.sampler.num_slots, bool)
            keep[list(self.occupied)] = True
            self.slots = self.slots._replace(running=self.slots.running & jnp.asarray(keep))


def _next(model: Model, params: Params, hidden_BD: jax.Array, draws: Draws, counts: jax.Array, filtered: bool) -> Drawn:
    return draw(model.logits(params, hidden_BD), draws, counts, filtered=filtered)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _begin(
    model: Model,
    filtered: bool,
    params: Params,
    slots: Slots,
    stops: jax.Array,
    key: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    rows: jax.Array,
    source: jax.Array,
    places: jax.Array,
    limit: jax.Array,
) -> tuple[Slots, Drawn]:
    """Reads prompts [P, T], puts them into slots `rows` [B] (B: none) from `source` [B], and draws first tokens [B]."""
    hidden, read = model.prefill(params, tokens, lengths, size=tokens.shape[1], page=PAGE)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = jnp.take(model.logits(params, last), source, axis=0)
    keys = jax.vmap(lambda place: jax.random.fold_in(jax.random.fold_in(key, place[0]), place[1]))(places)
    at = functools.partial(jnp.take, indices=jnp.minimum(rows, slots.tokens.shape[0] - 1), axis=0)
    draws = jax.tree.map(lambda x: at(x), slots.draws._replace(keys=jax.random.key_data(slots.draws.keys)))
    draws = draws._replace(keys=keys)
    drawn = draw(logits, draws, jnp.zeros_like(rows), filtered=filtered)

    def put(whole, new):
        return whole.at[rows].set(new, mode="drop")

    data = put(jax.random.key_data(slots.draws.keys), jax.random.key_data(keys))
    ended = jnp.any(drawn.tokens[:, None] == stops[None], axis=-1) | (limit <= 1)
    return Slots(
        put_rows(slots.cache, rows, read, source),
        put(slots.tokens, drawn.tokens),
        put(slots.counts, jnp.ones_like(rows)),
        put(slots.limits, jnp.broadcast_to(limit, rows.shape)),
        put(slots.running, ~ended),
        slots.draws._replace(keys=jax.random.wrap_key_data(data)),
    ), drawn


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(
    model: Model, chunk: int, filtered: bool, params: Params, slots: Slots, stops: jax.Array
) -> tuple[Slots, Drawn, jax.Array]:
    """Up to `chunk` tokens of every running slot: new slots, drawn tokens [B, chunk], how many of them are real [B]."""
    B = slots.tokens.shape[0]
    zero = jnp.zeros((B, chunk), jnp.float32)
    drawn = Drawn(jnp.zeros((B, chunk), jnp.int32), zero, jnp.copy(zero))

    def goes_on(carry):
        step, slots, _, _ = carry
        return (step < chunk) & jnp.any(slots.running)

    def one(carry):
        step, slots, drawn, real = carry
        reads = slots.running.astype(jnp.int32)
        hidden, cache = model.extend(params, slots.tokens[:, None], slots.cache, reads)
        new = _next(model, params, hidden[:, 0], slots.draws, slots.counts, filtered)
        drawn = Drawn(*(all_.at[:, step].set(one_) for all_, one_ in zip(drawn, new, strict=True)))
        counts = slots.counts + reads
        ended = jnp.any(new.tokens[:, None] == stops[None], axis=-1) | (counts >= slots.limits)
        tokens = jnp.where(slots.running, new.tokens, slots.tokens)
        slots = slots._replace(cache=cache, tokens=tokens, counts=counts, running=slots.running & ~ended)
        return step + 1, slots, drawn, real + reads

    start = (jnp.int32(0), slots, drawn, jnp.zeros(B, jnp.int32))
    _, slots, drawn, real = jax.lax.while_loop(goes_on, one, start)
    return slots, drawn, real


@functools.partial(jax.jit, static_argnums=0)
def _score(model: Model, params: Params, tokens_BT: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p of each target after the tokens up to its place, [B, T] float32; whether it is the argmax, [B, T] bool."""
    hidden = model.apply(params, tokens_BT)
    weights_BT = jnp.ones(targets_BT.shape, jnp.float32)
    result = weighted_nll(hidden, model.head(params), targets_BT, weights_BT, softcap=model.config.logit_softcap)
    return result.log_probs_BT, result.correct_BT
