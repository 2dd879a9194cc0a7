# SPDX-License-Identifier: Apache-2.0
"""Laws of the cache: reading token by token is reading at once, for every kind of positions.

B rows, T tokens, N heads, K key heads, H head width, D width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import (
    Alibi,
    DynamicScaling,
    Hope,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Model,
    ModelConfig,
    Nope,
    Rope,
    Xpos,
    YarnScaling,
    attend,
    drop_pages,
    empty_cache,
    hope_cache,
    hope_cache_append,
    hope_decode,
    logical_axes,
    rollback,
)
from jaxlm.train.mesh import constrainer, make_mesh, rows, shardings
from jaxlm.train.options import MeshOptions

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, SIZE, PAGE = 2, 24, 4
BASE = ModelConfig(vocab_size=32, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=48, max_length=SIZE)
BENT = {"windows": (5, None), "attention_softcap": 3.0, "attention_sink": True, "norm_placement": "both"}
LLAMA3 = Llama3Scaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8)
LEARNED_GAP = Hope(theta_scale=0.3, damping="per_pair", learn_gap="head", slopes="learned")
KINDS = {
    "rope": {"positions": Rope()},
    "linear": {"positions": Rope(scaling=LinearScaling(factor=2.0))},
    "dynamic": {"positions": Rope(scaling=DynamicScaling(factor=2.0, original_length=8))},
    "llama3": {"positions": Rope(scaling=LLAMA3)},
    "yarn": {"positions": Rope(scaling=YarnScaling(factor=4.0, original_length=8))},
    "rope_bent": {"positions": Rope(), "query_key_norm": "full"} | BENT,
    "learned": {"positions": Learned()},
    "nope": {"positions": Nope(), "windows": (5,), "num_kv_heads": None},
    "alibi": {"positions": Alibi()},
    "xpos": {"positions": Xpos()},
    "xpos_fast": {"positions": Xpos(scale_base=2.0)},
    "hope": {"positions": Hope(theta_scale=0.01)},
    "hope_fast": {"positions": Hope(theta_scale=1.0)},  # rates up to 2.05
    "hope_learned": {"positions": LEARNED_GAP},
    "hope_layer": {"positions": Hope(learn_gap="layer", gap_max=1.0, slopes="alibi"), "num_kv_heads": 1},
    "hope_mixed": {"positions": Hope(theta_scale=0.2, rotating=0.5, basis="boost")},
    "hope_bent": {"positions": Hope(theta_scale=0.3)} | BENT,
}


@functools.cache
def start(kind):
    """A model, and parameters in which nothing is as it starts."""
    model = Model(dataclasses.replace(BASE, **KINDS[kind]))
    draw = np.random.default_rng(0)

    def value(path, leaf):
        x = draw.normal(size=leaf.shape)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        x = 1 + 0.1 * x if name.endswith("scale") else x * leaf.shape[-2] ** -0.5 if name.endswith("kernel") else x
        return jnp.asarray(x, jnp.float32)

    return model, jax.tree.map_with_path(value, jax.eval_shape(model.init, jax.random.key(0)))


def draw_tokens(length=SIZE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 32, (B, length)), jnp.int32)


def reader(model, params, tokens, count):
    """`(cache, lengths) -> (cache, (positions, hidden))`: the next `count` tokens of each row, from its own place."""

    def read(cache, lengths=None):
        places = cache.row_positions(count)
        hidden, longer = model.extend(params, jnp.take_along_axis(tokens, places, axis=1, mode="clip"), cache, lengths)
        return longer, (places, hidden)

    return read


def farthest(whole, pieces, ends, begins=(0,) * B):
    """Largest error of (positions [..., B, T], hidden states [..., B, T, D]), those of later pieces standing."""
    found = np.full(whole.shape, np.nan)
    for places, hidden in pieces:
        for p, h in zip(places.reshape(-1, *places.shape[-2:]), hidden.reshape(-1, *hidden.shape[-3:]), strict=True):
            for b in range(B):
                inside = p[b] < whole.shape[1]
                found[b, p[b][inside]] = h[b][inside]
    apart = [np.abs(found[b, begins[b] : ends[b]] - whole[b, begins[b] : ends[b]]).max() for b in range(B)]
    return max(apart) / np.abs(whole).max()


@functools.partial(jax.jit, static_argnums=0)
def read_singly(model, params, tokens):
    cache, pieces = jax.lax.scan(
        reader(model, params, tokens, 1), empty_cache(model.config, B, SIZE, page=PAGE), length=SIZE
    )
    return model.apply(params, tokens), pieces, cache


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_equals_the_whole_row_at_every_position(kind):
    model, params = start(kind)
    whole, pieces, cache = jax.tree.map(np.asarray, read_singly(model, params, draw_tokens()))
    assert (cache.recent is not None) == kind.startswith(("hope", "xpos"))
    error = farthest(whole, [pieces], (SIZE, SIZE))
    assert error < 1e-6, f"{error:.2e}"


PROMPTS = (9, 4)
PIECES = ((3, 1), (1, 3), (0, 2), (2, 3), (3, 3))


@functools.partial(jax.jit, static_argnums=0)
def read_in_pieces(model, params, tokens):
    """Ragged prompts, then up to three tokens at a time, of each row as many as PIECES says."""
    hidden, cache = model.prefill(params, tokens[:, : max(PROMPTS)], jnp.array(PROMPTS), size=SIZE, page=PAGE)
    prompts = (jnp.tile(jnp.arange(max(PROMPTS))[None], (B, 1)), hidden)
    cache, pieces = jax.lax.scan(reader(model, params, tokens, 3), cache, jnp.array(PIECES))
    return model.apply(params, tokens), [prompts, pieces], cache


@pytest.mark.parametrize("kind", ["dynamic", "rope_bent", "hope_learned", "hope_bent"])
def test_ragged_prompts_and_pieces_equal_the_whole_row(kind):
    model, params = start(kind)
    whole, pieces, cache = jax.tree.map(np.asarray, read_in_pieces(model, params, draw_tokens()))
    assert cache.lengths.tolist() == [18, 16]
    error = farthest(whole, pieces, (18, 16))
    assert error < 1e-6, f"{error:.2e}"


def dense_without(hidden_from):
    """`attend` by whole scores, in which query i of row b does not see keys before hidden_from[b, i]."""

    def attend(q, k, v, *, rates, slopes, sink, scale, softcap, window, clock, segment_ids, **unread):
        _, L, N, H = q.shape
        k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
        apart = jnp.arange(L)[:, None] - jnp.arange(L)[None]
        far = jnp.maximum(apart, 0).astype(jnp.float32)
        rates = jnp.zeros((1, H)) if rates is None else rates.reshape(-1, H)
        rates = jnp.repeat(rates, N // len(rates), axis=0)
        decay = jnp.exp(-rates[:, None, None] * far[None, :, :, None])  # [N, L, M, H]
        scores = jnp.sum(q.transpose(0, 2, 1, 3)[:, :, :, None] * k.transpose(0, 2, 1, 3)[:, :, None] * decay[None], -1)
        scores = scores * (H**-0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes[None, :, None, None] * far[None, None]
        seen = (apart >= 0) & (apart < (L if window is None else window))
        seen = seen[None] & (jnp.arange(L)[None, None] >= hidden_from[:, :, None])
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        if sink is not None:
            scores = jnp.concatenate([scores, jnp.broadcast_to(sink[None, :, None, None], (B, N, L, 1))], -1)
        return jnp.einsum("bnlm,bmnh->blnh", jax.nn.softmax(scores, -1)[..., :L], v)

    return attend


DROPS = ((1, 1), (0, 0), (0, 0), (0, 0), (0, 0), (0, 1), (0, 0), (0, 0), (0, 0))  # pages, before each token


@functools.partial(jax.jit, static_argnums=0)
def read_and_drop(model, params, tokens):
    _, cache = model.prefill(params, tokens[:, :7], jnp.array([7, 4]), size=12, page=PAGE)
    read = reader(model, params, tokens, 1)
    return jax.lax.scan(lambda cache, count: read(drop_pages(cache, count)), cache, jnp.array(DROPS))


@pytest.mark.parametrize("kind", ["learned", "xpos_fast", "hope_bent"])
def test_dropped_pages_are_as_if_masked_from_then_on(kind, monkeypatch):
    model, params = start(kind)
    tokens = draw_tokens(16)
    cache, pieces = jax.tree.map(np.asarray, read_and_drop(model, params, tokens))
    assert cache.dropped.tolist() == [4, 8] and cache.lengths.tolist() == [12, 5]
    hidden_from = np.zeros((B, 16), np.int32)
    hidden_from[0, 7:] = 4
    hidden_from[1, 4:], hidden_from[1, 9:] = 4, 8
    monkeypatch.setattr("jaxlm.nn.attention.attend", dense_without(jnp.asarray(hidden_from)))
    whole = np.asarray(jax.jit(lambda *x: model.apply(*x))(params, tokens))
    error = farthest(whole, [pieces], (16, 13), (7, 4))
    assert error < 1e-6, f"{error:.2e}"


@functools.partial(jax.jit, static_argnums=0)
def prefilled(model, params, tokens, lengths):
    return model.prefill(params, tokens, lengths, size=SIZE, page=PAGE)


@functools.partial(jax.jit, static_argnums=(0, 4))
def read_next(model, params, tokens, cache, count):
    """The next `count` tokens of each row: hidden states and the longer cache."""
    cache, (_, hidden) = reader(model, params, tokens, count)(cache)
    return hidden, cache


@functools.cache
def filled(kind="hope_fast", lengths=PROMPTS):
    model, params = start(kind)
    return model, params, draw_tokens(), prefilled(model, params, draw_tokens(), jnp.array(lengths))[1]


def slots(pages):
    """[layers, B, K, P, C, H] as [B, S, ...]."""
    return np.moveaxis(np.asarray(pages).reshape(*pages.shape[:3], -1, pages.shape[-1]), (1, 3), (0, 1))


@pytest.mark.parametrize("kind", ["rope", "hope_fast"])
def test_no_bit_of_a_cached_token_changes_when_others_come_or_go(kind):
    *given, before = filled(kind, (11, 6))
    _, after = read_next(*given, before, 3)
    moved = drop_pages(after, jnp.array([2, 1]))
    assert moved.lengths.tolist() == [6, 5]
    for name in ("keys", "values"):
        old, new, kept = (slots(getattr(cache, name)) for cache in (before, after, moved))
        for b, (length, gone) in enumerate(((11, 8), (6, 4))):
            assert np.array_equal(old[b, :length], new[b, :length])
            assert np.array_equal(new[b, gone : length + 3], kept[b, : length + 3 - gone])
            assert not new[b, length + 3 :].any()


@pytest.mark.parametrize("kind", ["rope", "hope_fast"])
def test_forgotten_tokens_leave_no_trace(kind):
    model, params, tokens, cache = filled(kind, (11, 6))
    expected, _ = read_next(model, params, tokens, cache, 3)
    _, draft = read_next(model, params, (tokens + 5) % 32, cache, 3)  # over a border of pages in each row
    for back in (rollback, jax.jit(rollback)):
        again = back(draft, cache.lengths)
        assert again.lengths.tolist() == [11, 6]
        assert np.array_equal(read_next(model, params, tokens, again, 3)[0], expected)


def test_a_row_goes_back_a_page_or_to_a_border_and_else_says_so():
    *given, cache = filled(lengths=(19, 18))
    assert rollback(cache, jnp.array([15, 99])).lengths.tolist() == [15, 18]  # a page; more than it holds
    expected, _ = read_next(*given, filled(lengths=(8, 8))[3], 1)
    np.testing.assert_allclose(read_next(*given, rollback(cache, 8), 1)[0], expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"row 1 cannot go back from 18 to 10 tokens.*last 8 only.*at most 4"):
        rollback(cache, jnp.array([12, 10]))
    hidden, _ = read_next(*given, jax.jit(rollback)(cache, jnp.array([12, 10])), 1)
    assert np.isfinite(hidden[0]).all() and np.isnan(hidden[1]).all()
    assert rollback(filled("rope", (19, 18))[3], 1).lengths.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["learned", "hope_fast"])
def test_padding_is_not_looked_at(kind):
    model, params, tokens, cache = filled(kind, (22, 23))
    extend = jax.jit(model.extend)
    lengths = jnp.array([2, 1])  # up to the last learned position
    junk = np.array(tokens)
    junk[0, 2:], junk[1, 1:] = 99, -1
    for run in (
        lambda x: extend(params, x[:, :4], cache, lengths),
        lambda x: prefilled(model, params, x, lengths),
    ):
        (one, kept), (two, other) = run(tokens), run(jnp.asarray(junk))
        for b, length in enumerate((2, 1)):
            assert np.isfinite(one[b, :length]).all() and np.array_equal(one[b, :length], two[b, :length])
        jax.tree.map(np.testing.assert_array_equal, kept, other)
    resting = extend(params, tokens[:, :4], cache, jnp.array([0, 1]))[1]
    assert resting.lengths.tolist() == [22, 24]
    assert np.array_equal(slots(resting.keys)[0], slots(cache.keys)[0])


def test_a_full_row_is_refused_and_under_jit_becomes_nan_and_stays_as_it_is():
    model, params, tokens, cache = filled(lengths=(22, 20))
    with pytest.raises(ValueError, match=r"row 0 holds 22 of 24 tokens and 3 more do not fit.*drop_pages"):
        model.extend(params, tokens[:, :3], cache)
    hidden, after = read_next(model, params, tokens, cache, 3)
    assert np.isnan(hidden[0]).all() and np.isfinite(hidden[1]).all()
    assert after.lengths.tolist() == [22, 23]
    for name in ("keys", "recent"):
        assert np.array_equal(getattr(after, name)[:, 0], getattr(cache, name)[:, 0])


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def test_one_program_serves_all_steps_and_takes_the_cache_in_place():
    model, params, tokens, cache = filled()
    cache = jax.tree.map(jnp.copy, cache)
    step = jax.jit(model.extend, donate_argnums=2)
    token = tokens[:, :1]
    _, longer = step(params, token, cache)
    assert cache.keys.is_deleted() and cache.recent.is_deleted()
    jax.block_until_ready(longer)
    seen = len(COMPILED)
    for _ in range(12):
        _, longer = step(params, token, longer)
    jax.block_until_ready(longer)
    assert len(COMPILED) == seen
    copied = step.lower(params, token, longer).compile().memory_analysis()
    assert copied.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(longer))


def test_a_step_copies_no_more_than_a_layer_of_the_cache():
    model = Model(dataclasses.replace(start("hope_bent")[0].config, num_layers=8))
    params = jax.eval_shape(model.init, jax.random.key(0))
    cache = jax.eval_shape(lambda: empty_cache(model.config, B, 4096))
    step = jax.jit(model.extend, donate_argnums=2).lower(params, jax.ShapeDtypeStruct((B, 1), jnp.int32), cache)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert step.compile().memory_analysis().temp_size_in_bytes < whole / 4


def test_rows_and_heads_divided_over_devices_stay_where_they_are():
    model, params = start("hope_bent")
    mesh = make_mesh(MeshOptions(data=4, tensor=2))
    divided = dataclasses.replace(model, constrain=constrainer(mesh))
    placed = jax.device_put(params, shardings(mesh, logical_axes(params), params))
    tokens = jnp.tile(draw_tokens(8), (2, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def prefill(model, params, tokens):
        return model.prefill(params, tokens, size=SIZE, page=PAGE)

    def step(model, params, tokens):
        _, cache = prefill(model, params, tokens[:, :7])
        return jax.jit(model.extend).lower(params, tokens[:, 7:], cache).compile(), cache

    (alone, cache), (spread, held) = (
        step(model, params, tokens),
        step(divided, placed, jax.device_put(tokens, rows(mesh))),
    )
    assert held.keys.addressable_shards[0].data.size * 8 == held.keys.size
    assert "all-gather" not in spread.as_text()
    found = jax.block_until_ready(spread(placed, jax.device_put(tokens[:, 7:], rows(mesh)), held)[0])
    np.testing.assert_allclose(found, alone(params, tokens[:, 7:], cache)[0], atol=5e-6)


def draw_heads(length, heads=(4, 2, 2), dtype=jnp.float32, H=8):
    draw = np.random.default_rng(1)
    return [jnp.asarray(draw.normal(size=(B, length, n, H)), dtype) for n in heads]


@functools.partial(jax.jit, static_argnames=("count", "page", "softcap", "window"))
def decode_all(q, k, v, rates, *, count, page=PAGE, **options):
    """One layer, `count` tokens at a time."""
    cache = hope_cache(B, q.shape[1], num_kv_heads=k.shape[2], head_width=q.shape[-1], page=page, dtype=k.dtype)

    def step(cache, x):
        cache = hope_cache_append(cache, *x[1:], rates)
        return cache, hope_decode(x[0], cache, rates, **options)

    pieces = [x.reshape(B, -1, count, *x.shape[2:]).swapaxes(0, 1) for x in (q, k, v)]
    return jax.lax.scan(step, cache, pieces)[1].swapaxes(0, 1).reshape(q.shape)


@functools.partial(jax.jit, static_argnames=("softcap", "window"))
def dense(q, k, v, rates, **options):
    names = ("slopes", "sink", "scale", "softcap", "window", "clock", "segment_ids", "max_rate", "implementation")
    attend = dense_without(jnp.zeros(q.shape[:2], jnp.int32))
    return attend(*(x.astype(jnp.float32) for x in (q, k, v)), **dict.fromkeys(names) | {"rates": rates} | options)


@pytest.mark.parametrize("top", [0.0, 1e-6, 0.1, 2.0, 20.0])
def test_rates_of_any_size_give_the_dense_scores(top):
    q, k, v = draw_heads(24)
    rates = jnp.linspace(0.05, 1.0, 16, dtype=jnp.float32).reshape(2, 8) * top  # of each key head its own
    options = {"slopes": jnp.array([0.5, 0.25, 0.1, 0.0]), "softcap": 4.0, "window": 9, "sink": jnp.arange(4.0)}
    for count, given in ((1, {}), (3, options)):
        expected = dense(q, k, v, rates, **given)
        np.testing.assert_allclose(decode_all(q, k, v, rates, count=count, **given), expected, atol=1e-6)


def test_a_layers_own_cache_drops_pages_and_goes_back_too():
    q, k, v = draw_heads(10)
    rates = jnp.linspace(0.1, 2.0, 8, dtype=jnp.float32)

    @jax.jit
    def run():
        cache = hope_cache(B, 8, num_kv_heads=2, head_width=8, page=PAGE)
        for begin in (0, 4):
            cache = hope_cache_append(cache, k[:, begin : begin + 4], v[:, begin : begin + 4], rates)
        cache = drop_pages(cache, 1)
        draft = hope_cache_append(cache, k[:, :3], v[:, :3], rates)
        cache = hope_cache_append(rollback(draft, 4), k[:, 8:], v[:, 8:], rates)
        return hope_decode(q[:, 8:], cache, rates)

    expected = dense(q[:, 4:], k[:, 4:], v[:, 4:], rates)[:, 4:]
    np.testing.assert_allclose(run(), expected, atol=1e-6)


def test_a_row_far_past_the_range_of_float32_stays_exact():
    q, k, v = draw_heads(256)
    rates = jnp.linspace(0.02, 2.0, 8, dtype=jnp.float32)  # exp(2 * 256) overflows; so does a page, exp(2 * 64)
    found = decode_all(q, k, v, rates, count=16, page=64)
    np.testing.assert_allclose(found, dense(q, k, v, rates), atol=1e-6)


def test_a_cache_in_bfloat16_loses_no_more_than_attention_in_bfloat16():
    q, k, v = draw_heads(24, dtype=jnp.bfloat16)
    rates = jnp.linspace(0.005, 0.1, 8, dtype=jnp.float32)
    exact = dense(q, k, v, rates)
    cached, whole = (
        float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32) - exact))))
        for x in (decode_all(q, k, v, rates, count=1), jax.jit(attend)(q, k, v, rates=rates))
    )
    assert cached < 1e-3 and cached < 1.5 * whole, (cached, whole)


def test_what_cannot_be_is_refused_with_a_remedy():
    model, params, tokens, cache = filled()
    with pytest.raises(ValueError, match=r"at most a page \(4 tokens\).*got 5"):
        model.extend(params, tokens[:, :5], cache)
    with pytest.raises(ValueError, match="prompts of 24 tokens do not fit a cache of 20"):
        model.prefill(params, tokens, size=18, page=4)
    with pytest.raises(ValueError, match=r"lengths must be 2 numbers in 0 .. 3, got \[1, 4\]"):
        model.prefill(params, tokens[:, :3], jnp.array([1, 4]), size=8)
    with pytest.raises(ValueError, match="25 tokens exceeds the 24 learned positions"):
        start("learned")[0].prefill(start("learned")[1], tokens, size=25)
    with pytest.raises(ValueError, match=r"pages to drop must be >= 0, got -1"):
        drop_pages(cache, -1)
    with pytest.raises(ValueError, match=r"lengths to keep must be >= 0, got \[1, -2\]"):
        rollback(cache, jnp.array([1, -2]))
    with pytest.raises(ValueError, match="page of a cache must be at least 1"):
        empty_cache(BASE, 2, 8, page=0)
    q, _, _ = draw_heads(2)
    one = hope_cache(B, 8, num_kv_heads=2, head_width=8, page=4)
    with pytest.raises(ValueError, match="rates of 4 heads need a cache with as many key heads, got 2"):
        hope_decode(q, one, jnp.ones((4, 8)))
    with pytest.raises(ValueError, match="a row holds 0 tokens and 2 newest ones are asked for"):
        hope_decode(q, one, jnp.ones(8))
