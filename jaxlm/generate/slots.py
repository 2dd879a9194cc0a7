# SPDX-License-Identifier: Apache-2.0
"""What the device does for a sampler: reads prompts into slots, decodes all slots together, makes slots longer.

Three programs, each compiled once for its shapes and for what `static_argnames` lists.  A slot is the row of one cache.

B slots, V vocabulary, S tokens that a slot can hold, P prompts of a group, T tokens of its bucket.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.generate.drawing import Drawn, Draws, Kind, Processor, Seen, draw
from jaxlm.nn.cache import Cache, apart, empty_cache, put_rows, write
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import Model, Params
from jaxlm.nn.position_kinds import DynamicScaling, Rope

PAGE = 64  # tokens


class Slots(NamedTuple):
    """What the device holds of all slots between two calls; a pytree, donated from call to call.

    Attributes:
      cache: of B rows.
      history: [B, S] int32, tokens of each slot's prompt and completion; the newest one is not in the cache yet.
      prompts: [B] int32, tokens of each slot's prompt.
      counts: [B] int32, tokens drawn of each slot's sample.
      limits: [B] int32, tokens it may have.
      running: [B] bool.
      draws: how each draws; keys as their data, uint32 [B, n].
    """

    cache: Cache
    history: jax.Array
    prompts: jax.Array
    counts: jax.Array
    limits: jax.Array
    running: jax.Array
    draws: Draws


class Group(NamedTuple):
    """Prompts of one bucket on their way into slots; arrays, so that no number compiles anything.

    Attributes:
      tokens: [P, T] int32, from the left.
      lengths: [P] int32.
      rows: [B] int32, slots that are filled; B: none.
      source: [B] int32, which prompt each gets.
      places: [B, 2] int32, the prompt's place in its request and the sample's number: with the seed's key they make
        the slot's key.
      limits: [B] int32, tokens that each may draw.
      draws: [B] each; keys are the data of the seed's.
    """

    tokens: jax.Array
    lengths: jax.Array
    rows: jax.Array
    source: jax.Array
    places: jax.Array
    limits: jax.Array
    draws: Draws


def by_size(config: ModelConfig) -> bool:
    """Whether positions depend on the length of a row: then all rows must have one."""
    return isinstance(config.positions, Rope) and isinstance(config.positions.scaling, DynamicScaling)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty(model: Model, num_slots: int, size: int) -> Slots:
    """Slots that run nothing."""
    B = num_slots
    temperature, top_p, min_p = (jnp.ones(B, jnp.float32) for _ in range(3))
    top_k, prompts, counts, limits = (jnp.zeros(B, jnp.int32) for _ in range(4))
    keys = jnp.zeros((B, *jax.random.key_data(jax.random.key(0)).shape), jnp.uint32)
    cache = laid(empty_cache(model.config, B, size, page=PAGE))
    history = jnp.zeros((B, cache.size), jnp.int32)
    draws = Draws(temperature, top_p, top_k, min_p, keys)
    return Slots(cache, history, prompts, counts, limits, jnp.zeros(B, bool), draws)


@functools.partial(jax.jit, static_argnums=(0, 1))
def lengthened(model: Model, size: int, slots: Slots) -> Slots:
    """The same slots with room for more tokens."""
    rows = jnp.arange(len(slots.counts), dtype=jnp.int32)
    cache = put_rows(laid(empty_cache(model.config, len(rows), size, page=PAGE)), rows, slots.cache, rows)
    history = jnp.pad(slots.history, ((0, 0), (0, cache.size - slots.history.shape[1])))
    return slots._replace(cache=cache, history=history)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("kind", "processors"), donate_argnums=2)
def begin(
    model: Model,
    params: Params,
    slots: Slots,
    stops: jax.Array,
    group: Group,
    *,
    kind: Kind,
    processors: tuple[Processor, ...],
) -> tuple[Slots, Drawn]:
    """Reads prompts, puts them into slots, and draws the first token of each of `group.rows` [B]."""
    tokens, lengths, rows, source = group.tokens, group.lengths, group.rows, group.source
    own = slots.cache.size if by_size(model.config) else tokens.shape[1]
    hidden, read = model.prefill(params, tokens, lengths, size=own, page=PAGE)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = jnp.take(model.logits(params, last), source, axis=0)
    base = jax.random.wrap_key_data(group.draws.keys)
    keys = jax.vmap(lambda key, place: jax.random.fold_in(jax.random.fold_in(key, place[0]), place[1]))(
        base, group.places
    )
    size = slots.history.shape[1]
    history = jnp.pad(tokens, ((0, 0), (0, max(size - tokens.shape[1], 0))))[:, :size]
    history, prompts = jnp.take(history, source, axis=0), jnp.take(lengths, source)
    seen = Seen(history, prompts, prompts)
    draws = group.draws._replace(keys=keys)
    drawn = draw(logits, draws, jnp.zeros_like(rows), kind=kind, processors=processors, seen=seen)

    def put(whole, new):
        return whole.at[rows].set(new, mode="drop")

    places = jnp.arange(len(rows), dtype=jnp.int32)
    ended = jnp.any(drawn.tokens[:, None] == stops[None], axis=-1) | (group.limits <= 1)
    draws = draws._replace(keys=jax.random.key_data(keys))
    return Slots(
        put_rows(slots.cache, rows, laid(read), source),
        put(slots.history, history.at[places, prompts].set(drawn.tokens, mode="drop")),
        put(slots.prompts, prompts),
        put(slots.counts, jnp.ones_like(rows)),
        put(slots.limits, group.limits),
        put(slots.running, ~ended),
        jax.tree.map(put, slots.draws, draws),
    ), drawn


@functools.partial(jax.jit, static_argnums=0, static_argnames=("chunk", "kind", "processors"), donate_argnums=2)
def decode(
    model: Model,
    params: Params,
    slots: Slots,
    stops: jax.Array,
    alive: jax.Array,
    *,
    chunk: int,
    kind: Kind,
    processors: tuple[Processor, ...],
) -> tuple[Slots, Drawn, jax.Array]:
    """Up to `chunk` tokens of every running slot, as long as one runs.

    Args:
      model: with `params`.
      slots: are donated.
      stops: int32 [n], tokens that end a sample.
      alive: [B] bool, slots whose samples are still wanted; others stop.
      chunk: most tokens.
      kind: of draws, and `processors`: see `draw`.
    Returns: new slots, what was drawn [B, chunk], how much of it is real [B].
    """
    if jax.default_backend() == "cpu":
        params = {**params, "blocks": layers(model, params)}
    B = len(slots.counts)
    rows = jnp.arange(B, dtype=jnp.int32)
    zero = jnp.zeros((B, chunk), jnp.float32)
    drawn = Drawn(jnp.zeros((B, chunk), jnp.int32), zero, zero)
    draws = slots.draws._replace(keys=jax.random.wrap_key_data(slots.draws.keys))

    def newest(slots):
        return jnp.take_along_axis(slots.history, (slots.prompts + slots.counts)[:, None] - 1, axis=1, mode="clip")

    def goes_on(carry):
        step, slots, *_ = carry
        return (step < chunk) & jnp.any(slots.running)

    def one(carry):
        step, slots, entries, unwritten, drawn, real = carry
        reads = slots.running.astype(jnp.int32)
        lengths = slots.prompts + slots.counts
        cache = write(slots.cache, entries, unwritten)  # of the step before: see `Model.peek`
        hidden, entries = model.peek(params, newest(slots), cache, reads)
        new = draw(
            model.logits(params, hidden[:, 0]),
            draws,
            slots.counts,
            kind=kind,
            processors=processors,
            seen=Seen(slots.history, lengths, slots.prompts),
        )
        drawn = Drawn(*(all_.at[:, step].set(one_) for all_, one_ in zip(drawn, new, strict=True)))
        counts = slots.counts + reads
        ended = jnp.any(new.tokens[:, None] == stops[None], axis=-1) | (counts >= slots.limits)
        where = jnp.where(slots.running, lengths, slots.history.shape[1])  # behind the end: not written
        history = slots.history.at[rows, where].set(new.tokens, mode="drop")
        slots = slots._replace(cache=cache, history=history, counts=counts, running=slots.running & ~ended)
        return step + 1, slots, entries, reads, drawn, real + reads

    slots = slots._replace(running=slots.running & alive)
    none = jnp.zeros(B, jnp.int32)
    _, like = jax.eval_shape(model.peek, params, newest(slots), slots.cache, none)
    entries = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    start = (jnp.int32(0), slots, entries, none, drawn, none)
    _, slots, entries, unwritten, drawn, real = jax.lax.while_loop(goes_on, one, start)
    return slots._replace(cache=write(slots.cache, entries, unwritten)), drawn, real


def laid(cache: Cache) -> Cache:
    """The cache as the slots hold it: on CPU its layers apart, as their parameters (`layers`)."""
    return apart(cache) if jax.default_backend() == "cpu" else cache


def layers(model: Model, params: Params) -> tuple[Params, ...]:
    """Each layer's parameters by themselves.

    On CPU a scan copies those of a layer before each product; so they are laid apart once for a whole chunk
    (`docs/benchmarks/decode.md`).  Elsewhere products read the stack itself.
    """
    return tuple(jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(model.config.num_layers))
