# SPDX-License-Identifier: Apache-2.0
"""Laws of the capsule's layers: capacity, causality, the cached form against full passes, the decoder's one way in."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.nn import (
    Alibi,
    CapsuleBottleneck,
    CapsuleConfig,
    Hope,
    LinenCapsuleBottleneck,
    LinenPlanDecoder,
    Model,
    ModelConfig,
    PlanDecoder,
    PlanDecoderConfig,
    capsule_chain,
    capsule_embed,
    capsule_project,
    capsule_rollout,
)
from jaxlm.nn.capsule import capsule_init, capsule_make, capsule_rows, capsules_of
from jaxlm.nn.decoder import EMBEDDED
from jaxlm.nn.plan_decoder import plan_decoder_leaves, plan_greedy, plan_hidden
from jaxlm.nn.shapes import initialise

pytestmark = pytest.mark.usefixtures("quick_compiles")

MODEL = Model(ModelConfig(vocab_size=32, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24))
CAPSULE = CapsuleConfig(num_capsules=2, width=4)
DECODER = PlanDecoderConfig(layers=2, width=8, heads=2, max_plan=6)
PROMPTS = np.array([[3, 5, 7, 9, 30], [11, 13, 15, 17, 30]], np.int32)
AFTER = np.array([[31, 2, 4, 6], [31, 8, 10, 12]], np.int32)


@functools.cache
def params_for(config, model=MODEL):
    params = model.init(jax.random.key(0))
    return params | {"capsule": capsule_init(params["embed"]["table"], config, jax.random.key(1))}


def full_passes(model, params, prompts, after, config):
    """The oracle: K + 1 passes over whole rows without a cache, each with one embedding more."""
    B, P = prompts.shape
    K, width = config.num_capsules, model.config.width
    row = np.concatenate([prompts, np.full((B, K), EMBEDDED, np.int32), after], axis=1)
    embeddings, capsules = jnp.zeros((B, row.shape[1], width)), []
    for k in range(K):
        hidden = model.apply(params, row[:, : P + k], embeddings=embeddings[:, : P + k], output=config.hidden)
        capsule, embedding = capsule_make(params["capsule"], hidden[:, -1:], config)
        embeddings = jnp.concatenate([embeddings[:, : P + k], embedding, embeddings[:, P + k + 1 :]], axis=1)
        capsules.append(capsule)
    hidden = model.apply(params, row, embeddings=embeddings)
    return jnp.concatenate(capsules, axis=1), model.logits(params, hidden[:, P + K - 1 :])


def cached(model, params, prompts, mask, after, config, **options):
    """The rollout, and the text behind it in one extension of its cache."""
    size = prompts.shape[1] + config.num_capsules + after.shape[1]
    made = capsule_rollout(model, params, prompts, mask, config, size=size, page=size, **options)
    tokens = np.concatenate([np.full((len(prompts), 1), EMBEDDED, np.int32), after], axis=1)
    embeddings = jnp.pad(made.embeddings[:, -1:], ((0, 0), (0, after.shape[1]), (0, 0)))
    hidden, _ = model.extend(params, tokens, made.cache, embeddings=embeddings)
    return made.capsule, model.logits(params, hidden)


def assert_near(ours, theirs, *, rtol=1e-5):
    """Within `rtol` of the largest entry of each leaf."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1e-30, float(np.max(np.abs(b)))))


KINDS = {
    "capsule": (CAPSULE, MODEL),
    "one": (dataclasses.replace(CAPSULE, num_capsules=1), MODEL),
    "four": (dataclasses.replace(CAPSULE, num_capsules=4), MODEL),
    "bare, normed": (dataclasses.replace(CAPSULE, embed_scale="none", hidden="normed"), MODEL),
    "hidden states": (dataclasses.replace(CAPSULE, source="hidden"), MODEL),
    "hope": (CAPSULE, Model(dataclasses.replace(MODEL.config, positions=Hope(theta_scale=0.1)))),
    "alibi": (CAPSULE, Model(dataclasses.replace(MODEL.config, positions=Alibi(), embedding_scale=4.0))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_cached_rollout_is_as_many_full_passes(kind):
    """Logits and gradients, for every number of tokens, source and kind of positions."""
    config, model = KINDS[kind]
    params, mask = params_for(config, model), np.ones_like(PROMPTS, bool)
    weights = jnp.cos(jnp.arange(2 * 5 * 32, dtype=jnp.float32)).reshape(2, 5, 32)

    @jax.jit
    def both(params):
        ours = cached(model, params, PROMPTS, mask, AFTER, config)
        theirs = full_passes(model, params, PROMPTS, AFTER, config)
        return ours, theirs

    ours, theirs = both(params)
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
    if kind != "four":  # its chain is that of fewer tokens, and longer
        return
    args = (model, PROMPTS, mask, AFTER, config)
    one = jax.jit(jax.grad(lambda p: jnp.sum(weights * cached(args[0], p, *args[1:])[1])))
    two = jax.jit(jax.grad(lambda p: jnp.sum(weights * full_passes(args[0], p, PROMPTS, AFTER, config)[1])))
    assert_near(one(params), two(params))


@functools.cache
def unpadded():
    run = jax.jit(lambda p: cached(MODEL, p, PROMPTS[:1], np.ones((1, 5), bool), AFTER[:1], CAPSULE))
    return run(params_for(CAPSULE))


@pytest.mark.parametrize("left, right", [(0, 0), (3, 0), (17, 0), (0, 17)])
def test_padding_and_other_rows_change_nothing(left, right):
    params, plain, width = params_for(CAPSULE), unpadded(), ((0, 0), (left, right))
    eight = [np.repeat(x, 4, axis=0) for x in (PROMPTS, AFTER)]  # a row of eight, not alone
    prompts, mask = np.pad(eight[0], width, constant_values=1), np.pad(np.ones((8, 5), bool), width)
    capsule, logits = jax.jit(lambda p: cached(MODEL, p, prompts, mask, eight[1], CAPSULE))(params)
    np.testing.assert_allclose(capsule[:1], plain[0], atol=1e-5)
    np.testing.assert_allclose(logits[:1], plain[1], atol=1e-5)


def test_a_row_of_nothing_stays_empty_is_finite_and_has_finite_gradients():
    params, mask = params_for(CAPSULE), np.array([[True] * 5, [False] * 5])
    total = lambda p: jnp.sum(cached(MODEL, p, PROMPTS, mask, AFTER, CAPSULE)[1][:1])  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(total))(params)
    assert np.isfinite(value) and all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads))
    made = jax.jit(lambda p: capsule_rollout(MODEL, p, PROMPTS, mask, CAPSULE, size=16, page=16))(params)
    assert made.cache.lengths.tolist() == [6, 0], "the prompt and the first of two embeddings; nothing"
    assert np.all(np.isfinite(made.capsule)) and np.all(np.isfinite(made.embeddings))


def test_a_capsule_depends_on_the_prompt_and_its_own_past_and_text_on_everything():
    """By gradients with respect to what stands in every column."""
    params, K, P = params_for(CAPSULE), 2, 5
    table = params["embed"]["table"]
    row = np.full((1, P), EMBEDDED, np.int32)

    def run(x_PD, given_KD, after_AD):
        made = capsule_rollout_of(x_PD)
        read = made.embeddings + given_KD[None]  # a disturbance of each embedding
        again = capsule_rollout_of(x_PD, given=read)
        tokens = np.full((1, 1 + len(after_AD)), EMBEDDED, np.int32)
        embeddings = jnp.concatenate([read[:, -1:], after_AD[None]], axis=1)
        hidden, _ = MODEL.extend(params, tokens, again.cache, embeddings=embeddings)
        return made.embeddings[0], MODEL.logits(params, hidden)[0]

    def capsule_rollout_of(x_PD, **options):
        class Embedded:  # the prompt as embeddings, so that it has gradients
            config = MODEL.config
            extend = MODEL.extend

            @staticmethod
            def prefill(params, tokens, lengths, **more):
                return MODEL.prefill(params, row, lengths, embeddings=x_PD[None], **more)

        return capsule_rollout(
            Embedded, params, PROMPTS[:1], np.ones((1, P), bool), CAPSULE, size=16, page=16, **options
        )

    args = (table[PROMPTS[0]], jnp.zeros((K, 16)), table[AFTER[0]])
    of_capsule = jax.jit(jax.jacobian(lambda *a: run(*a)[0], argnums=(0, 1, 2)))(*args)
    prompt, _, later = (jnp.linalg.norm(jnp.abs(x).sum((0, 1)), axis=-1) for x in of_capsule)
    assert np.all(prompt > 0) and np.all(later == 0)
    of_text = jax.jit(jax.jacobian(lambda *a: run(*a)[1][-1], argnums=(0, 1, 2)))(*args)
    assert all(np.all(jnp.linalg.norm(x, axis=(0, -1)) > 0) for x in of_text)
    # e_2 is made of h at e_1, so e_1 must reach it; e_1 must not know e_2.
    scale = dict(params["capsule"])
    grads = jax.jacobian(
        lambda rho: (
            capsule_rollout(
                MODEL,
                params | {"capsule": scale | {"queries": rho}},
                PROMPTS[:1],
                np.ones((1, P), bool),
                CAPSULE,
                size=16,
            ).capsule
        )
    )(jnp.zeros(()))
    assert np.all(grads == 0)


def test_the_second_token_is_made_of_the_first():
    params, mask = params_for(CAPSULE), np.ones((2, 5), bool)
    hidden, cache = MODEL.prefill(params, PROMPTS, size=16, output="last")
    make = functools.partial(capsule_make, params["capsule"], config=CAPSULE)

    def second(change_D):
        def feed(e, cache):
            blank = jnp.full((2, 1), EMBEDDED, jnp.int32)
            return MODEL.extend(params, blank, cache, embeddings=e + change_D[None, None], output="last")

        return capsule_chain(make, feed, hidden[:, -1:], cache, num_capsules=2)[0]

    made = second(jnp.zeros(16))
    np.testing.assert_allclose(made, capsule_rollout(MODEL, params, PROMPTS, mask, CAPSULE, size=16).capsule, atol=1e-6)
    change = jax.jit(jax.jacobian(second))(jnp.zeros(16))
    assert np.all(change[:, 0] == 0) and np.all(jnp.linalg.norm(change[:, 1], axis=(1, 2)) > 0)


def test_the_bottleneck_has_rank_d_and_embeddings_have_the_scale_of_rows():
    p = params_for(CAPSULE)["capsule"]
    hidden = jax.random.normal(jax.random.key(3), (64, 1, 16))
    capsule, embeddings = capsule_make(p, hidden, CAPSULE)
    bare = capsule_make(p, hidden, dataclasses.replace(CAPSULE, embed_scale="none"))[1]
    z = bare[:, 0] - jnp.mean(bare[:, 0], axis=0, keepdims=True)
    values = np.linalg.svd(z, compute_uv=False)
    assert capsule.shape == (64, 1, 4) and values[3] > 1e-2 * values[0] and np.all(values[4:] < 1e-4 * values[0])
    table = params_for(CAPSULE)["embed"]["table"]
    rho = np.mean(np.sqrt(np.mean(np.square(table), axis=1)))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(jnp.square(embeddings), axis=-1)), rho, rtol=1e-5)


def test_the_pieces_are_their_formulas_in_numpy():
    draw = np.random.default_rng(0)
    h, w, b, u = (draw.normal(size=s).astype(np.float32) for s in ((2, 3, 8), (8, 4), (4,), (4, 8)))
    capsule = h @ w + b
    np.testing.assert_allclose(capsule_project(*map(jnp.asarray, (h, w, b))), capsule, atol=1e-6, rtol=1e-6)
    z = capsule @ u
    np.testing.assert_allclose(capsule_embed(jnp.asarray(capsule), jnp.asarray(u), rms=None), z, atol=2e-6, rtol=1e-6)
    scaled = 0.3 * z / np.sqrt(np.mean(z**2, axis=-1, keepdims=True))
    np.testing.assert_allclose(capsule_embed(jnp.asarray(capsule), jnp.asarray(u), rms=0.3), scaled, atol=1e-6)


PARALLEL = dataclasses.replace(CAPSULE, mode="parallel")
PAUSE = dataclasses.replace(CAPSULE, source="pause")


@pytest.mark.parametrize("config", [PARALLEL, PAUSE], ids=["parallel", "pause"])
def test_packed_rows_equal_separate_rows_and_the_cached_form(config):
    params, K = params_for(config), 2
    rows = [[*p, EMBEDDED, EMBEDDED, *a] for p, a in zip(PROMPTS.tolist(), AFTER.tolist(), strict=True)]
    ids = [0] * 5 + [1, 2] + [0] * 4
    n = len(ids)
    tokens = np.array([rows[0] + rows[1] + [0]], np.int32)
    where = {
        "positions": np.array([[*range(n), *range(n), 0]], np.int32),
        "segment_ids": np.array([[1] * n + [2] * n + [0]], np.int32),
    }

    @jax.jit
    def run(params, tokens, ids, where):
        hidden, columns = capsule_rows(MODEL, params, tokens, ids, config, **where)
        found = capsules_of(columns, ids, where["segment_ids"], num_segments=2, num_capsules=K)
        return MODEL.logits(params, hidden), found

    packed, capsules = run(params, tokens, np.array([ids * 2 + [0]], np.int32), where)
    logits_of_all, capsule = cached(MODEL, params, PROMPTS, np.ones_like(PROMPTS, bool), AFTER, config)[::-1]
    for i, row in enumerate(rows):
        one = {"positions": np.arange(n, dtype=np.int32)[None], "segment_ids": np.ones((1, n), np.int32)}
        alone, _ = run(params, np.array([row], np.int32), np.array([ids], np.int32), one)
        np.testing.assert_allclose(packed[0, i * n : (i + 1) * n], alone[0], atol=1e-5)
        np.testing.assert_allclose(logits_of_all[i], alone[0, 6:], atol=1e-5)
        np.testing.assert_allclose(capsules[0, i], capsule[i], atol=1e-5)


@functools.cache
def plan_params():
    return initialise(plan_decoder_leaves(16, 4, 2, DECODER), jax.random.key(2))


def test_the_plan_decoder_is_causal_and_sees_capsule_and_plan_alone():
    table, p = params_for(CAPSULE)["embed"]["table"], plan_params()
    capsule, plan = jax.random.normal(jax.random.key(4), (1, 2, 4)), jnp.array([[3, 4, 5, 6, 7]])
    out = plan_hidden(p, capsule, plan, table, DECODER)
    changed = plan_hidden(p, capsule, plan.at[0, 2].set(9), table, DECODER)
    assert jnp.array_equal(out[0, :3], changed[0, :3]) and not np.any(np.all(out[0, 3:] == changed[0, 3:], axis=1))
    told = jax.jacobian(lambda c: jnp.sum(plan_hidden(p, c, plan, table, DECODER), axis=-1))(capsule)
    assert np.all(jnp.linalg.norm(told[0], axis=(1, 3)) > 0), "every place is told of every capsule token"
    grads = jax.grad(lambda t: jnp.sum(plan_hidden(p, capsule, plan, t, DECODER)))(table)
    assert not grads.any(), "the table gets no gradient"


def test_reading_a_plan_is_the_argmax_of_the_decoder_over_its_own_output():
    table, p = params_for(CAPSULE)["embed"]["table"], plan_params()
    capsule = 5 * jax.random.normal(jax.random.key(5), (3, 2, 4))
    plans = jax.jit(lambda c: plan_greedy(p, c, table, DECODER))(capsule)
    again = jnp.argmax(plan_hidden(p, capsule, plans, table, DECODER) @ table.T, axis=-1)
    assert jnp.array_equal(plans, again) and len({tuple(row) for row in plans.tolist()}) > 1


def test_flax_modules_hold_the_parameters_of_the_functions():
    hidden, table = jax.random.normal(jax.random.key(6), (2, 2, 16)), params_for(CAPSULE)["embed"]["table"]
    module = CapsuleBottleneck(16, capsule_width=4, num_capsules=2, mode="parallel", table=table, rngs=nnx.Rngs(0))
    tree = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert all(map(jnp.array_equal, module(hidden), capsule_make(tree, hidden, module.config)))
    linen = LinenCapsuleBottleneck(16, capsule_width=4, num_capsules=2, mode="parallel")
    assert all(map(jnp.array_equal, linen.apply({"params": tree}, hidden), module(hidden)))
    fresh = linen.init(jax.random.key(0), hidden)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, tree) and fresh["rho"] == 0.25
    decoder = PlanDecoder(16, capsule_width=4, num_capsules=2, decoder_width=8, heads=2, max_plan=6, rngs=nnx.Rngs(0))
    plan, capsule = jnp.array([[3, 4], [5, 6]]), module(hidden)[0]
    tree = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    linen = LinenPlanDecoder(16, capsule_width=4, num_capsules=2, config=DECODER)
    logits = linen.apply({"params": tree}, capsule, plan, table)
    assert logits.shape == (2, 2, 32) and jnp.array_equal(logits, decoder(capsule, plan, table))
    assert decoder.read(capsule, table).shape == (2, 6)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            lambda: params_for(dataclasses.replace(CAPSULE, width=16)),
            "capsule_width 16 is no bottleneck for model width 16; choose at most 15",
        ),
        (lambda: CapsuleConfig(num_capsules=-1), "num_capsules must be at least 0, got -1"),
        (lambda: CapsuleConfig(width=0), "width must be at least 1, got 0"),
        (lambda: CapsuleConfig(source="hidden", mode="parallel"), "one by one"),
        (lambda: PlanDecoderConfig(width=6, heads=4), "6 is not a multiple of its 4 heads"),
        (lambda: PlanDecoderConfig(layers=0), "layers of the plan decoder must be at least 1"),
        (
            lambda: plan_hidden(plan_params(), jnp.ones((1, 2, 4)), jnp.ones((1, 7), int), jnp.ones((32, 16)), DECODER),
            "longer than max_plan 6",
        ),
        (lambda: MODEL.apply(params_for(CAPSULE), PROMPTS, output="first"), "output must be 'normed' or 'last'"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
