# SPDX-License-Identifier: Apache-2.0
"""The decoder: pure functions of a configuration and a nested dict of arrays.

B batch, T tokens, D width, V vocabulary, L layers.  Layers are stacked on a leading axis and run by one scan, so that
compile time does not grow with depth.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.kernels.blocked_attention import SAVED
from jaxlm.nn.attention import Pieces, attention, mix, project
from jaxlm.nn.cache import Cache, Entries, empty_cache, fits, known, write
from jaxlm.nn.cached_attention import entries_of, mix_cached, refuse_full, refuse_long
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.dense import PRODUCT, dense
from jaxlm.nn.mlp import mlp
from jaxlm.nn.norm import NORMS
from jaxlm.nn.position_kinds import Learned
from jaxlm.nn.positions import NOWHERE, Encoding, encoding, falloff
from jaxlm.nn.shapes import decoder_leaves, initialise

Params = Mapping[str, Any]
Output = Literal["normed", "last"]  # hidden states after the final norm, or what the last layer left
RESIDUAL = ("batch", "length", "embed")  # logical names of the residual stream
IN_PIECES = ("pieces", None, "embed")  # and of one whose rows are cut into pieces
EMBEDDED = -1  # in place of a token: what stands here is given as an embedding


def anywhere(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Leaves the placement of `x` to the compiler."""
    return x


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder: its configuration and the functions that read it.  Parameters are passed in, never held.

    Attributes:
      config: what distinguishes this decoder.
      constrain: `(array, logical names) -> array`, places activations on a mesh; called on what enters and leaves
        every layer, and on the head.
      row_groups: devices that the rows of a batch are divided over, or that number and the pieces of a row; losses keep
        their sums apart by it until the end.
      pieces: cuts rows whose tokens lie on several devices and attends across the cuts, in `apply` alone; what goes by
        a cache has whole rows. None: rows are whole.

    >>> model = Model(ModelConfig(vocab_size=11, width=8, num_layers=2, num_heads=2))
    >>> params = model.init(jax.random.key(0))
    >>> hidden = model.apply(params, jnp.array([[1, 2, 3]]))
    >>> print(hidden.shape, model.logits(params, hidden).shape)
    (1, 3, 8) (1, 3, 11)
    """

    config: ModelConfig
    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array] = anywhere
    row_groups: int | tuple[int, int] = 1
    pieces: Pieces | None = None
    unseen = 0  # tokens that reading a prompt adds to it; those that think first have some

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random float32 parameters; `jax.eval_shape(model.init, key)` gives their shapes."""
        return initialise(decoder_leaves(self.config), key)

    def apply(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        embeddings: jax.Array | None = None,
        output: Output = "normed",
    ) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          params: as `init` makes them, adapters allowed beside kernels.
          tokens: [B, T] int32, in [0, V); others give NaN.
          positions: [B, T] int32; None: 0 .. T-1 in each row.
          segment_ids: [B, T] int32, 0 is padding; a token sees only its own segment.  None: one segment a row.
          embeddings: [B, T, D], rows as of the embedding table, read where `tokens` is `EMBEDDED`; None: nowhere.
          output: "last" leaves the final norm out.
        Returns: [B, T, D] in the compute dtype.  Rows of padding are finite and mean nothing.
        Raises: ValueError if a row is longer than the table of learned positions, or cannot be cut into pieces.
        """
        config, pieces = self.config, self.pieces
        places = encoding(config, tokens.shape[1], positions, segment_ids)
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
            if isinstance(config.positions, Learned) and tokens.shape[1] > config.max_length:
                raise ValueError(
                    f"{tokens.shape[1]} tokens exceed the {config.max_length} learned positions: cut the rows"
                )
        length = tokens.shape[1]
        stream: tuple[str | None, ...] = RESIDUAL
        if pieces is not None:
            stream = IN_PIECES
            positions = pieces.cut(jnp.broadcast_to(positions, tokens.shape))
            # The clock and the segments stay those of whole rows, a few bytes a token; angles go with their tokens.
            places = places._replace(rotation=encoding(config, length, positions).rotation)
            tokens = pieces.cut(tokens)
            embeddings = None if embeddings is None else pieces.cut(embeddings)
            # Gathered along D, as the head is: where fsdp is one of several axes that divide tokens, the partitioner
            # would rather gather what every token has become.
            params = {**params, "embed": {"table": self.constrain(params["embed"]["table"], ("vocab", None))}}
        x = embed(params, tokens, positions, config, embeddings)

        def layer(x, p, window, _):
            y = block(p, x, config, encoding=places, segment_ids=segment_ids, window=window, pieces=pieces)
            return self.constrain(y, stream), None

        x, _ = _scan_layers(layer, self.constrain(x, stream), params["blocks"], config, length)
        x = _out(params, x, config, output)
        return x if pieces is None else pieces.join(x)

    def prefill(
        self,
        params: Params,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        *,
        size: int,
        page: int = 64,
        embeddings: jax.Array | None = None,
        output: Output = "normed",
    ) -> tuple[jax.Array, Cache]:
        """Reads prompts by the attention of training, and keeps what `extend` needs of them.

        Args:
          params: as in `apply`.
          tokens: [B, T] int32, prompts from the left, what follows them is not looked at.
          lengths: [B] int32 in 0 .. T, tokens of each prompt; None: T.
          size: tokens that a row of the cache can hold, prompt included; rounded up to whole pages.  Every step reads
            all of it, and `DynamicScaling` takes it for the row's length.
          page: tokens of a page (`empty_cache`).
          embeddings, output: as in `apply`.
        Returns: hidden states after the final norm, [B, T, D], meaningless behind each prompt; and the cache.
        Raises: ValueError if prompts, or learned positions, are too few or too many for the cache.

        >>> model = Model(ModelConfig(vocab_size=11, width=8, num_layers=2, num_heads=2))
        >>> params, prompts = model.init(jax.random.key(0)), jnp.array([[1, 2, 3], [4, 5, 0]])
        >>> hidden, cache = model.prefill(params, prompts, jnp.array([3, 2]), size=64)
        >>> hidden, cache = model.extend(params, jnp.array([[7], [7]]), cache)
        >>> print(hidden.shape, cache.lengths)
        (2, 1, 8) [4 3]
        """
        config = self.config
        B, T = tokens.shape
        if isinstance(config.positions, Learned) and size > config.max_length:
            raise ValueError(
                f"a cache of {size} tokens exceeds the {config.max_length} learned positions: make it smaller"
            )
        cache = empty_cache(config, B, size, page=page)
        lengths = _counts(lengths, tokens)
        if cache.size < T:
            raise ValueError(
                f"prompts of {T} tokens do not fit a cache of {cache.size}: give a larger size, or cut them"
            )

        def mixing(p, query, key, value, places, window, _):
            return mix(p, query, key, value, config, encoding=places, window=window)

        hidden, entries = self._read(params, tokens, cache, lengths, mixing, embeddings=embeddings, output=output)
        return hidden, write(cache, entries, lengths)

    def extend(
        self,
        params: Params,
        tokens: jax.Array,
        cache: Cache,
        lengths: jax.Array | None = None,
        *,
        embeddings: jax.Array | None = None,
        output: Output = "normed",
    ) -> tuple[jax.Array, Cache]:
        """Reads T more tokens of every row, each row at its own place; T = 1 is a step of decoding.

        Shapes alone decide the program: `jax.jit(model.extend, donate_argnums=2)` compiles once for all steps and
        writes T tokens of the cache in place.

        Args:
          params: as in `apply`.
          tokens: [B, T] int32, T at most a page.
          cache: of `prefill`, `extend`, `drop_pages`, `rollback` or `empty_cache`.
          lengths: [B] int32 in 0 .. T, how many of the tokens are real, from the left (0: the row rests); None: all.
          embeddings, output: as in `apply`.
        Returns: hidden states after the final norm, [B, T, D], and the cache with the tokens in it.  Under jit a row
          without room for its tokens gets hidden states of NaN and its cache stays as it is.
        Raises: ValueError for more tokens than a page and, outside of jit, for a row without room.
        """
        lengths = _counts(lengths, tokens)
        hidden, entries = self.peek(params, tokens, cache, lengths, embeddings=embeddings, output=output)
        return hidden, write(cache, entries, lengths)

    def peek(
        self,
        params: Params,
        tokens: jax.Array,
        cache: Cache,
        lengths: jax.Array | None = None,
        *,
        embeddings: jax.Array | None = None,
        output: Output = "normed",
    ) -> tuple[jax.Array, Entries]:
        """What `extend` reads, without writing: hidden states, and the entries for `jaxlm.nn.cache.write`.

        A loop that writes what the step before left, and then peeks, needs no copy of the cache: within one step XLA
        cannot tell that all of it has been read before it is written.

        Args: as of `extend`.
        Returns: hidden states [B, T, D], of NaN under jit for a row without room, and `Entries` of T tokens a row.
        Raises: ValueError, as `extend`.
        """
        config = self.config
        refuse_long(tokens.shape[1], cache)
        lengths = _counts(lengths, tokens)
        refuse_full(cache, lengths)

        def mixing(p, query, key, value, places, window, held):
            keys, values, recent = held
            layer = cache._replace(keys=keys, values=values, recent=recent)
            return mix_cached(p, query, key, value, config, layer, window=window)

        held = (cache.keys, cache.values, cache.recent)
        given: dict[str, Any] = {"held": held, "embeddings": embeddings, "output": output}
        hidden, entries = self._read(params, tokens, cache, lengths, mixing, **given)
        lost = jnp.asarray(jnp.nan, hidden.dtype)
        return jnp.where(fits(cache, lengths)[:, None, None], hidden, lost), entries

    def _read(self, params, tokens, cache, counts, mixing, held=None, embeddings=None, output="normed"):
        """All layers over new tokens, and what these leave for the cache; `mixing` is their attention."""
        config, T = self.config, tokens.shape[1]
        positions = cache.row_positions(T)
        # Padding repeats the last real position and is token 0, so that it is finite: weights of 0 do not undo NaN.
        tokens = jnp.where(jnp.arange(T, dtype=jnp.int32)[None] < counts[:, None], tokens, 0)
        positions = jnp.minimum(positions, positions[:, :1] + jnp.maximum(counts - 1, 0)[:, None])
        places = encoding(config, cache.size, positions)
        x = embed(params, tokens, positions, config, embeddings)

        def layer(x, p, window, held):
            branch = p["attention"]
            query, key, value = project(branch, before(p, "attention", x, config), config, encoding=places)
            mixed = mixing(branch, query, key, value, places, window, held)
            y = dense(branch["out"], mixed.reshape(*mixed.shape[:2], -1), config.adapter_scale)
            x = after(p, "attention", x, y, config)
            x = after(p, "mlp", x, mlp(p["mlp"], before(p, "mlp", x, config), config), config)
            made = entries_of(key, value, cache, counts, falloff(branch, config).rates)
            return self.constrain(x, RESIDUAL), made

        x = self.constrain(x, RESIDUAL)
        x, entries = _scan_layers(layer, x, params["blocks"], config, cache.size, held)
        return _out(params, x, config, output), Entries(*entries)

    def head(self, params: Params) -> jax.Array:
        """The output projection [D, V], float32: the embedding's transpose when tied; an adapter is added in."""
        if self.config.tied:
            head = params["embed"]["table"].T
        else:
            p = params["head"]
            head = p["kernel"]
            if "lora_a" in p:
                head = head + self.config.adapter_scale * (p["lora_a"] @ p["lora_b"])
        # Gathered along D once, not in every chunk of a loss.
        return self.constrain(head, (None, "vocab"))

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """[..., D] to [..., V] float32, soft-capped where configured.

        Training uses `head` and a chunked loss instead: this holds every logit.
        """
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = jnp.dot(rows, self.head(params).astype(hidden.dtype), preferred_element_type=jnp.float32)
        if (cap := self.config.logit_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def num_parameters(self, params: Params) -> int:
        """Number of entries of all leaves; a tied head counts once.  Works on shapes too."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def block(
    p: Mapping[str, Any],
    x_BTD: jax.Array,
    config: ModelConfig,
    *,
    encoding: Encoding = NOWHERE,
    segment_ids: jax.Array | None = None,
    window: int | jax.Array | None = None,
    pieces: Pieces | None = None,
) -> jax.Array:
    """One layer: x + [post_norm](attention([norm](x))), then the same with the feed-forward branch."""
    branches = {
        "attention": lambda x: attention(
            p["attention"], x, config, encoding=encoding, segment_ids=segment_ids, window=window, pieces=pieces
        ),
        "mlp": lambda x: mlp(p["mlp"], x, config),
    }
    x = x_BTD
    for name, branch in branches.items():
        x = after(p, name, x, branch(before(p, name, x, config)), config)
    return x


def before(p: Mapping[str, Any], branch: str, x: jax.Array, config: ModelConfig) -> jax.Array:
    """What a branch of a layer, "attention" or "mlp", is given of the residual stream."""
    return _norm(p[f"{branch}_norm"], x, config) if config.norm_placement in ("pre", "both") else x


def after(p: Mapping[str, Any], branch: str, x: jax.Array, y: jax.Array, config: ModelConfig) -> jax.Array:
    """The residual stream `x` with what the branch gave, `y`, added."""
    return x + (_norm(p[f"{branch}_post_norm"], y, config) if config.norm_placement in ("post", "both") else y)


def _counts(lengths: jax.Array | None, tokens: jax.Array) -> jax.Array:
    """Real tokens of each row, [B] int32."""
    B, T = tokens.shape
    if lengths is None:
        return jnp.full(B, T, jnp.int32)
    if (values := known(lengths)) is not None and (values.shape != (B,) or values.min() < 0 or values.max() > T):
        raise ValueError(f"lengths must be {B} numbers in 0 .. {T}, got {values.tolist()}: they count real tokens")
    return jnp.asarray(lengths, jnp.int32)


def embed(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    config: ModelConfig,
    embeddings: jax.Array | None = None,
) -> jax.Array:
    """What enters the first layer, [B, T, D] in the compute dtype; positions [B or 1, T] are read where learned.

    Embeddings [B, T, D] stand in for the table's rows where a token is `EMBEDDED`.
    """
    dtype = jnp.dtype(config.dtype)
    table = params["embed"]["table"]
    if embeddings is None:
        x = jnp.take(table, tokens, axis=0).astype(dtype)
    else:
        given = (tokens == EMBEDDED)[..., None]
        x = jnp.take(table, jnp.where(given[..., 0], 0, tokens), axis=0)
        x = jnp.where(given, embeddings.astype(table.dtype), x).astype(dtype)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, dtype)
    if isinstance(config.positions, Learned):
        x = x + jnp.take(params["positions"]["table"], positions, axis=0).astype(dtype)
    return x


def _out(params: Params, x: jax.Array, config: ModelConfig, output: Output) -> jax.Array:
    if output not in ("normed", "last"):
        raise ValueError(f"output must be 'normed' or 'last', got {output!r}")
    return _norm(params["final_norm"], x, config) if output == "normed" else x


def _norm(p: Mapping[str, jax.Array], x: jax.Array, config: ModelConfig) -> jax.Array:
    return NORMS[config.norm](p, x, epsilon=config.norm_epsilon, offset=config.norm_offset)


def _scan_layers(
    layer: Callable, x: jax.Array, blocks: Any, config: ModelConfig, length: int, held: Any = None
) -> tuple[jax.Array, Any]:
    """Runs `layer(x, p, window, held) -> (x, made)` over the stacked layers; what they made is stacked too.

    Windows are static when all layers agree, else they travel as scanned values.  A tuple of layers, instead of a
    stack, is run by a plain loop; what these hold and make are tuples too.
    """
    windows = [None if window is None or window >= length else window for window in config.layer_windows]
    alike = len(set(windows)) == 1
    scanned = None if alike else jnp.asarray([length if window is None else window for window in windows], jnp.int32)

    def body(x, inputs):
        p, window, held = inputs
        return layer(x, p, windows[0] if alike else window, held)

    policies = jax.checkpoint_policies
    policy = {"none": _keep_what_is_dear, "dots": policies.dots_with_no_batch_dims_saveable, "full": None}[config.remat]
    body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    if isinstance(blocks, tuple):
        made = []
        for i, p in enumerate(blocks):
            of_layer = None if held is None else tuple(None if part is None else part[i] for part in held)
            x, new = body(x, (p, None if scanned is None else scanned[i], of_layer))
            made.append(new)
        return x, tuple(None if part[0] is None else part for part in zip(*made, strict=True))
    return jax.lax.scan(body, x, (blocks, scanned, held))


_NAMED = jax.checkpoint_policies.save_only_these_names(PRODUCT, SAVED)


def _keep_what_is_dear(primitive: Any, *avals: Any, **options: Any) -> Any:
    """Keeps products and attention; norms, rotations and activations are made again.

    Left to itself a scan keeps every intermediate of every layer: on CPU, writing them takes longer than making them
    (`docs/benchmarks/step.md`).
    """
    return primitive.name.startswith("dot_product_attention_fwd") or _NAMED(primitive, *avals, **options)  # cuDNN's
