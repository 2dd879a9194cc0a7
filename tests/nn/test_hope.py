# SPDX-License-Identifier: Apache-2.0
"""Laws of hyperbolic rotary positions: basis, rates, the family that holds RoPE and NoPE, the form that fails."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxlm.nn import (
    Alibi,
    Hope,
    Model,
    ModelConfig,
    Nope,
    Rope,
    Xpos,
    channel_survival,
    fold_lightcone,
    hope_rates,
    hope_theta,
    to_lightcone,
)
from jaxlm.nn.attention import attend, attention
from jaxlm.nn.positions import encoding, falloff, rotary_frequencies, rotary_table, rotate
from jaxlm.nn.shapes import attention_leaves, initialise

H = 16
RNG = np.random.default_rng(0)
CONFIG = ModelConfig(vocab_size=31, width=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=48)


def boost(x):
    return np.array([[np.cosh(x), np.sinh(x)], [np.sinh(x), np.cosh(x)]])


def turn(x):
    return np.array([[np.cos(x), -np.sin(x)], [np.sin(x), np.cos(x)]])


def published_score(q, k, m, n, theta, damping):
    """Algorithm 1 of the paper for one query and key, pairs interleaved, the factors of the difference."""
    total = 0.0
    for i, rapidity in enumerate(theta):
        pair = slice(2 * i, 2 * i + 2)
        total += np.exp(-(m - n) * damping[i]) * q[pair] @ boost((m - n) * rapidity) @ k[pair]
    return total


@pytest.mark.parametrize("damping", ["global", "per_pair"])
def test_decays_in_the_lightcone_are_boosts_in_the_published_basis(damping):
    theta = hope_theta(H, scale=0.05, base=100.0)
    gap = 0.01
    rates = hope_rates(theta, gap, damping=damping)
    damp = np.full_like(theta, theta.max() + gap) if damping == "global" else theta + gap
    q, k = RNG.normal(size=(2, H))

    def lightcone(x):
        return np.concatenate([x[0::2] + x[1::2], x[0::2] - x[1::2]]) / np.sqrt(2)

    for m, n in ((0, 0), (3, 1), (40, 0), (1000, 977)):
        ours = np.sum(np.exp(-rates * (m - n)) * lightcone(q) * lightcone(k))
        np.testing.assert_allclose(ours, published_score(q, k, m, n, theta, damp), rtol=1e-12, atol=1e-12)


def test_interleaved_pairs_are_halves_after_a_permutation():
    x = jnp.asarray(RNG.normal(size=(3, H)), jnp.float32)
    halves = jnp.concatenate([x[:, 0::2], x[:, 1::2]], axis=-1)
    assert jnp.array_equal(to_lightcone(x, pairing="interleaved"), to_lightcone(halves, pairing="half"))
    np.testing.assert_allclose(to_lightcone(to_lightcone(x)), x, atol=1e-6)  # U is its own inverse


def test_a_folded_projection_gives_what_turning_its_output_gives():
    x = jnp.asarray(RNG.normal(size=(5, 32)), jnp.float32)
    kernel = jnp.asarray(RNG.normal(size=(32, 2 * H)), jnp.float32)
    turned = to_lightcone((x @ kernel).reshape(5, 2, H)).reshape(5, 2 * H)
    np.testing.assert_allclose(x @ fold_lightcone(kernel, num_heads=2), turned, atol=2e-5)


def test_a_model_in_the_published_basis_is_the_folded_model_in_the_lightcone():
    kind = Hope(theta_scale=0.05, damping="per_pair", basis="boost")
    config = dataclasses.replace(CONFIG, positions=kind)
    params = Model(config).init(jax.random.key(0))
    tokens = jnp.asarray(RNG.integers(0, 31, (2, 9)), jnp.int32)
    published = Model(config).apply(params, tokens)
    heads = {"query": 4, "key": 2}
    branch = dict(params["blocks"]["attention"])
    for name, count in heads.items():
        branch[name] = {"kernel": fold_lightcone(branch[name]["kernel"], num_heads=count)}
    folded = params | {"blocks": params["blocks"] | {"attention": branch}}
    ours = Model(dataclasses.replace(config, positions=dataclasses.replace(kind, basis="lightcone"))).apply(
        folded, tokens
    )
    np.testing.assert_allclose(ours, published, atol=2e-5)


def generator(theta, damping, omega):
    """A = -damping I + theta K + omega J: the family that holds boosts and rotations."""
    return -damping * np.eye(2) + theta * np.array([[0, 1], [1, 0]]) + omega * np.array([[0, -1], [1, 0]])


@pytest.mark.parametrize(
    ("theta", "omega"), [(0.3, 0.1), (-0.3, 0.1), (0.1, 0.3), (0.1, -0.3), (0.0, 0.2), (0.25, 0.0)]
)
def test_every_pair_of_the_family_either_boosts_or_rotates(theta, omega):
    damping, distance = 0.35, 7.0
    exact = scipy.linalg.expm(distance * generator(theta, damping, omega))
    if abs(theta) > abs(omega):
        ratio = ((theta - omega) / (theta + omega)) ** 0.25
        inner = boost(np.sign(theta) * np.sqrt(theta**2 - omega**2) * distance)
    else:
        ratio = ((omega - theta) / (omega + theta)) ** 0.25
        inner = turn(np.sign(omega) * np.sqrt(omega**2 - theta**2) * distance)
    shear = np.diag([ratio, 1 / ratio])
    ours = np.exp(-damping * distance) * shear @ inner @ np.linalg.inv(shear)
    np.testing.assert_allclose(ours, exact, atol=1e-12)


def test_an_imaginary_rapidity_is_a_rotation():
    w = 0.7
    imaginary = np.diag([1, 1j])
    boosted = np.array([[np.cosh(1j * w), np.sinh(1j * w)], [np.sinh(1j * w), np.cosh(1j * w)]])
    np.testing.assert_allclose(np.linalg.inv(imaginary) @ boosted @ imaginary, turn(w), atol=1e-14)


def layer_out(kind, length=9, **changes):
    config = dataclasses.replace(CONFIG, positions=kind, **changes)
    p = initialise(attention_leaves(config), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, length, 32))
    return attention(p, x, config, encoding=encoding(config, length))


def test_all_pairs_rotating_without_damping_is_rope_and_no_rates_is_nope():
    almost = Hope(theta_scale=1e-12, rotating=1.0, damping="per_pair")
    np.testing.assert_allclose(layer_out(almost), layer_out(Rope()), atol=2e-6)
    np.testing.assert_allclose(layer_out(Hope(theta_scale=1e-12)), layer_out(Nope()), atol=2e-6)


def test_xpos_is_its_published_form():
    length, width, base = 40, 16, 512.0
    q, k, v = (jnp.asarray(RNG.normal(size=(1, length, 2, width)), jnp.float32) for _ in range(3))
    table = rotary_table(jnp.arange(length, dtype=jnp.int32)[None], rotary_frequencies(width, 1e4))
    zeta = (np.arange(0, width, 2) + 0.4 * width) / (1.4 * width)
    growth = zeta[None] ** (np.arange(length)[:, None] / base)  # multiplies queries, divides keys
    growth = jnp.asarray(np.concatenate([growth, growth], -1)[None, :, None], jnp.float32)
    expected = attend(rotate(q, table) * growth, rotate(k, table) / growth, v)
    config = ModelConfig(vocab_size=3, width=32, num_layers=1, num_heads=2, positions=Xpos(scale_base=base))
    places, fall = encoding(config, length), falloff({}, config)
    ours = attend(
        *(rotate(x, places.rotation) for x in (q, k)), v, rates=fall.rates, max_rate=fall.max_rate, clock=places.clock
    )
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_alibi_is_a_bias_on_scores():
    length = 12
    q, k, v = (jnp.asarray(RNG.normal(size=(1, length, 4, 8)), jnp.float32) for _ in range(3))
    slopes = 2.0 ** (-2.0 * np.arange(1, 5))
    scores = np.einsum("blnh,bmnh->bnlm", q, k) / np.sqrt(8)
    apart = np.arange(length)[:, None] - np.arange(length)[None]
    scores = np.where(apart >= 0, scores - slopes[None, :, None, None] * apart, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bnlm,bmnh->blnh", weights / weights.sum(-1, keepdims=True), v)
    config = ModelConfig(vocab_size=3, width=32, num_layers=1, num_heads=4, positions=Alibi())
    np.testing.assert_allclose(attend(q, k, v, slopes=falloff({}, config).slopes), expected, atol=2e-6)


def test_the_rates_gradient_has_a_closed_form():
    """-sum_t t (q_t dq_t - k_t dk_t), in float64, against differentiation of the dense form."""
    length, width = 23, 6
    q, k, v, cotangent = RNG.normal(size=(4, length, width))
    rates = RNG.uniform(0.01, 0.5, width)
    apart = np.arange(length)[:, None] - np.arange(length)[None]

    def out(q, k, rates):
        scores = jnp.einsum("lc,mc,lmc->lm", q, k, jnp.exp(-rates * np.maximum(apart, 0)[..., None]))
        return jax.nn.softmax(jnp.where(apart >= 0, scores, -jnp.inf), -1) @ v

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _, pull = jax.vjp(out, *(jnp.asarray(x) for x in (q, k, rates)))
        dq, dk, d_rates = pull(jnp.asarray(cotangent))
        clock = np.arange(length)[:, None] - length // 2
        np.testing.assert_allclose(-np.sum(clock * (q * dq - k * dk), axis=0), d_rates, rtol=1e-10)


@pytest.mark.parametrize("learn", ["layer", "head"])
@pytest.mark.parametrize("bound", [None, 1.0])
def test_a_learned_gap_starts_where_it_is_told_and_has_the_gradient_of_a_difference(learn, bound):
    kind = Hope(theta_scale=0.1, learn_gap=learn, gap_max=bound)
    config = dataclasses.replace(CONFIG, positions=kind)
    p = initialise(attention_leaves(config), jax.random.key(0))
    fixed = falloff({}, dataclasses.replace(config, positions=Hope(theta_scale=0.1)))
    started = falloff(p, config)
    np.testing.assert_allclose(started.rates, jnp.broadcast_to(fixed.rates, started.rates.shape), rtol=1e-5)
    assert (started.max_rate is None) == (bound is None)
    x = jax.random.normal(jax.random.key(1), (2, 30, 32))

    @jax.jit
    def loss(leaf):
        changed = p | {"positions": {"gap": leaf}}
        return jnp.sum(jnp.sin(attention(changed, x, config, encoding=encoding(config, 30))))

    leaf = p["positions"]["gap"]
    found = jnp.sum(jax.grad(loss)(leaf))
    step = 0.05
    difference = (loss(leaf + step) - loss(leaf - step)) / (2 * step)
    np.testing.assert_allclose(found, difference, rtol=5e-3)


def test_a_learned_gap_never_breaks_the_constraint():
    for value in (-80.0, 0.0, 80.0):
        config = dataclasses.replace(CONFIG, positions=Hope(learn_gap="layer", gap_max=2.0))
        fall = falloff({"positions": {"gap": jnp.float32(value)}}, config)
        assert jnp.all(fall.rates >= 0) and float(jnp.max(fall.rates)) <= fall.max_rate * (1 + 1e-6)


def test_learned_gaps_and_slopes_learn_in_a_whole_model():
    kind = Hope(theta_scale=0.05, damping="per_pair", learn_gap="head", slopes="learned")
    model = Model(dataclasses.replace(CONFIG, positions=kind, attention_sink=True))
    params = model.init(jax.random.key(0))
    tokens = jnp.asarray(RNG.integers(0, 31, (2, 12)), jnp.int32)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, tokens))))(params)["blocks"]["attention"]
    assert params["blocks"]["attention"]["positions"]["gap"].shape == (2, 2)
    for leaf in (grads["positions"]["gap"], grads["positions"]["slope"], grads["sink"]):
        assert jnp.all(jnp.isfinite(leaf)) and jnp.all(leaf != 0)


def literal_scores(q, k, theta, dtype):
    """Queries and keys boosted and damped at their own absolute positions, as the paper's algorithm is written."""
    length = len(q)
    n = np.arange(length, dtype=dtype)[:, None]
    theta = theta.astype(dtype)
    damping = dtype(theta.max() * 1.0001)

    def placed(x, sign):
        a, b = x[:, 0::2].astype(dtype), x[:, 1::2].astype(dtype)
        cosh, sinh = np.cosh(n * theta), np.sinh(n * theta) * dtype(sign)
        grow = np.exp(-sign * n * damping)
        return np.concatenate([grow * (cosh * a + sinh * b), grow * (sinh * a + cosh * b)], -1)

    with np.errstate(over="ignore", invalid="ignore"):
        return placed(q, 1.0) @ placed(k, -1.0).T


@pytest.mark.parametrize(("reach", "least", "most"), [(2.0, 0.0, 1e-3), (8.2, 1.0, np.inf), (10.2, 50.0, np.inf)])
def test_the_literal_form_loses_its_scores_where_predicted(reach, least, most):
    length = 1024
    theta = hope_theta(64, scale=reach / length, base=10_000.0)
    q, k = RNG.normal(size=(2, length, 64))
    low = literal_scores(q, k, theta, np.float32)
    # The same sums without absolute positions: boosts of the difference, in float64.
    apart = np.tril(np.arange(length)[:, None] - np.arange(length)[None])
    damping = theta.max() * 1.0001
    u = (q[:, 0::2] + q[:, 1::2]) / 2**0.5, (k[:, 0::2] + k[:, 1::2]) / 2**0.5
    v = (q[:, 0::2] - q[:, 1::2]) / 2**0.5, (k[:, 0::2] - k[:, 1::2]) / 2**0.5
    exact = np.zeros((length, length))
    for i, rapidity in enumerate(theta):
        exact += np.exp(-(damping - rapidity) * apart) * np.outer(u[0][:, i], u[1][:, i])
        exact += np.exp(-(damping + rapidity) * apart) * np.outer(v[0][:, i], v[1][:, i])
    worst = np.abs(np.tril(low - exact)).max()
    assert least <= worst <= most, worst


@pytest.mark.parametrize(("dtype", "position"), [(np.float16, 6), (np.float32, 45)])
def test_the_literal_form_overflows_at_the_position_the_page_says(dtype, position):
    n = np.arange(64, dtype=np.float64)
    with np.errstate(over="ignore"):
        key = (np.exp(n * 1.0001).astype(dtype) * np.cosh(n).astype(dtype)).astype(dtype)
    assert int(np.argmax(np.isinf(key))) == position


def test_survival_is_the_table_of_the_published_and_the_per_pair_damping():
    theta = hope_theta(64, scale=0.005, base=10_000.0)
    found = [channel_survival(hope_rates(theta, 0.00025, damping=d), (1024, 4096)) for d in ("global", "per_pair")]
    assert found == [{1024: 7, 4096: 1}, {1024: 61, 4096: 55}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hope_theta(63, scale=0.1, base=10.0), "head width must be even, got 63"),
        (
            lambda: ModelConfig(vocab_size=3, width=21, num_layers=1, num_heads=3, positions=Hope()),
            "must be even for Hope.*got 7",
        ),
        (lambda: hope_rates(np.array([0.005]), -0.001), r"damping 0.004 <= max theta 0.005: give gap > 0"),
        (lambda: hope_rates(np.array([0.005]), 0.001, damping="both"), "'global' or 'per_pair', got 'both'"),
        (lambda: Hope(damping="both"), "'global' or 'per_pair', got 'both'"),
        (lambda: Hope(gap=0.0), "gap must be > 0, got 0.0"),
        (lambda: Hope(gap=2.0, gap_max=1.0, learn_gap="layer"), "gap_max 1.0 must exceed gap 2.0"),
        (lambda: Hope(gap_max=1.0), "set learn_gap"),
        (lambda: Hope(rotating=2.0), r"share of the pairs in \[0, 1\], got 2.0"),
        (lambda: to_lightcone(jnp.ones((1, 4)), pairing="thirds"), "'half' or 'interleaved', got 'thirds'"),
    ],
)
def test_bad_settings_are_refused_with_a_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()
