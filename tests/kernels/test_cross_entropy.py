# SPDX-License-Identifier: Apache-2.0
"""Chunked log-likelihood equals the plain one, holds no logits, and stays where the batch lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.kernels.cross_entropy import token_log_probs, weighted_nll

B, T, D, V = 3, 13, 16, 50


def make_inputs(seed=0, rows=B, length=T, width=D, vocabulary=V):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (rows, length, width))
    head = jax.random.normal(keys[1], (width, vocabulary))
    targets = jax.random.randint(keys[2], (rows, length), 0, vocabulary)
    weights = jnp.maximum(jax.random.uniform(keys[3], (rows, length)) - 0.3, 0.0)  # a third of them exactly 0
    return hidden, head, targets, weights


def plain_log_probs(hidden, head, targets, softcap):
    logits = hidden @ head
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] - lse, lse


def plain_total(hidden, head, targets, weights, softcap, z_loss):
    log_probs, lse = plain_log_probs(hidden, head, targets, softcap)
    return jnp.sum(weights * (z_loss * lse**2 - log_probs))


def assert_same(actual, expected, relative=1e-6):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=relative, atol=relative * float(jnp.max(jnp.abs(e))))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 12, 1024])  # one token a row; 4 a row, which does not divide 13; all at once
def test_chunked_equals_plain_in_value_and_gradient(softcap, z_loss, chunk):
    hidden, head, targets, weights = make_inputs()

    def ours(h, k, w):
        return weighted_nll(h, k, targets, w, chunk=chunk, softcap=softcap, z_loss=z_loss).total

    def plain(h, k, w):
        return plain_total(h, k, targets, w, softcap, z_loss)

    assert_same(ours(hidden, head, weights), plain(hidden, head, weights))  # not differentiated: the other code path
    assert_same(
        jax.value_and_grad(ours, (0, 1, 2))(hidden, head, weights),
        jax.value_and_grad(plain, (0, 1, 2))(hidden, head, weights),
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [12, 1024])
def test_log_probs_take_any_cotangent(softcap, chunk):
    hidden, head, targets, _ = make_inputs()
    cotangent = jax.random.normal(jax.random.key(9), targets.shape)
    ours, pull = jax.vjp(lambda h, k: token_log_probs(h, k, targets, chunk=chunk, softcap=softcap), hidden, head)
    plain, plain_pull = jax.vjp(lambda h, k: plain_log_probs(h, k, targets, softcap)[0], hidden, head)
    assert_same((ours, pull(cotangent)), (plain, plain_pull(cotangent)))


def test_total_is_three_lines_of_numpy():
    hidden, head, targets, weights = (np.asarray(x) for x in make_inputs())
    logits = hidden.astype(np.float64) @ head.astype(np.float64)
    log_probs = np.take_along_axis(logits, targets[..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
    result = weighted_nll(*map(jnp.asarray, (hidden, head, targets, weights)), chunk=12)
    np.testing.assert_allclose(result.total, -(weights * log_probs).sum(), rtol=1e-6)
    np.testing.assert_allclose(result.log_probs_BT, log_probs, rtol=1e-5)
    np.testing.assert_array_equal(result.correct_BT, logits.argmax(-1) == targets)
    np.testing.assert_allclose(result.z_total, (weights * np.log(np.exp(logits).sum(-1)) ** 2).sum(), rtol=1e-6)


def test_a_tie_is_won_by_the_first_word():
    correct = weighted_nll(jnp.ones((1, 2, 4)), jnp.zeros((4, 8)), jnp.array([[0, 1]]), jnp.ones((1, 2))).correct_BT
    assert correct.tolist() == [[True, False]]


def test_only_the_total_carries_a_gradient():
    hidden, head, targets, weights = make_inputs()

    def others(h):
        return sum(jnp.sum(x) for x in weighted_nll(h, head, targets, weights)[1:3])

    assert not jnp.any(jax.grad(others)(hidden))


def test_tokens_of_weight_zero_give_no_gradient_even_when_their_loss_is_huge():
    hidden, head, targets, weights = make_inputs()
    weights = weights.at[:, 5].set(0.0)
    gradient = jax.grad(lambda h: weighted_nll(h.at[:, 5].mul(1e4), head, targets, weights).total)(hidden)
    assert not jnp.any(gradient[:, 5]) and jnp.all(jnp.isfinite(gradient))


def test_bfloat16_states_meet_float32_logits_and_sums():
    hidden, head, targets, weights = make_inputs()
    low = hidden.astype(jnp.bfloat16)

    def ours(h, k):
        return weighted_nll(h, k, targets, weights, chunk=12).total

    value, (d_hidden, d_head) = jax.value_and_grad(ours, (0, 1))(low, head)
    exact = head.astype(jnp.bfloat16).astype(jnp.float32)
    expected = plain_total(low.astype(jnp.float32), exact, targets, weights, None, 0.0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # products of bfloat16 are exact in float32
    assert (value.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    true_head = jax.grad(plain_total, 1)(low.astype(jnp.float32), exact, targets, weights, None, 0.0)
    np.testing.assert_allclose(d_head, true_head, atol=0.01 * float(jnp.max(jnp.abs(true_head))))


def test_the_program_holds_no_logits_of_the_whole_batch():
    rows, length, width, vocabulary = 4, 64, 8, 512
    inputs = make_inputs(0, rows, length, width, vocabulary)

    def step(h, k, t, w):
        return jax.value_and_grad(lambda h, k: weighted_nll(h, k, t, w, chunk=32).total, (0, 1))(h, k)

    memory = jax.jit(step).lower(*inputs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * length * vocabulary * 4 / 2

    def plain(h, k, t, w):
        return jax.value_and_grad(lambda h, k: plain_total(h, k, t, w, None, 0.0), (0, 1))(h, k)

    assert jax.jit(plain).lower(*inputs).compile().memory_analysis().temp_size_in_bytes > rows * length * vocabulary * 4


def test_without_differentiation_there_is_one_product():
    inputs = make_inputs()
    value = jax.jit(lambda *x: weighted_nll(*x).total)
    slope = jax.jit(jax.grad(lambda *x: weighted_nll(*x).total, (0, 1)))

    def products(f):
        return f.lower(*inputs).as_text().count("stablehlo.dot_general")

    assert (products(value), products(slope)) == (1, 3)


def test_eight_devices_equal_one_and_hidden_states_stay_put():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    inputs = make_inputs(0, 16, 24, 32, 64)
    by_row = NamedSharding(mesh, P("data"))
    placed = [jax.device_put(x, NamedSharding(mesh, P()) if x is inputs[1] else by_row) for x in inputs]
    step = jax.jit(jax.value_and_grad(lambda *x: weighted_nll(*x, chunk=64, z_loss=0.1).total, (0, 1)))
    assert_same(step(*placed), step(*inputs))
    assert step(*placed)[1][0].sharding.is_equivalent_to(by_row, 3)
    assert "all-gather" not in step.lower(*placed).compile().as_text()


@pytest.mark.parametrize("score", ["nll", "log_probs"])
def test_with_a_group_a_device_the_gradient_of_the_head_crosses_devices_once(score):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    inputs = make_inputs(0, 16, 24, 32, 64)
    by_row = NamedSharding(mesh, P("data"))
    placed = [jax.device_put(x, NamedSharding(mesh, P()) if x is inputs[1] else by_row) for x in inputs]

    def slope(groups):
        def value(hidden, head, targets, weights):
            if score == "nll":
                return weighted_nll(hidden, head, targets, weights, chunk=8, groups=groups).total
            return jnp.sum(weights * token_log_probs(hidden, head, targets, chunk=8, groups=groups))

        return jax.jit(jax.grad(value, (0, 1)))

    assert_same(slope(8)(*placed), slope(1)(*inputs))

    def reductions(groups):
        program = slope(groups).lower(*placed).compile().as_text()
        bodies = [part for part in program.split("\n\n") if not part.lstrip().startswith("ENTRY")]
        return sum("f32[32,64]" in line and "all-reduce(" in line for part in bodies for line in part.splitlines())

    assert reductions(1) > 0, "this test looks for the wrong thing"
    assert reductions(8) == 0


def test_a_divided_vocabulary_equals_a_whole_one_and_logits_stay_put():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    hidden, head, targets, weights = make_inputs(0, 4, 24, 16, 512)
    by_row = NamedSharding(mesh, P("data"))
    placed = [jax.device_put(x, by_row) for x in (hidden, targets, weights)]
    placed.insert(1, jax.device_put(head, NamedSharding(mesh, P(None, "tensor"))))
    step = jax.jit(jax.value_and_grad(lambda *x: weighted_nll(*x, chunk=64).total, (0, 1)))
    assert_same(step(*placed), step(hidden, head, targets, weights))
    gathers = [line for line in step.lower(*placed).compile().as_text().splitlines() if " all-gather" in line]
    assert not [line for line in gathers if ",512]" in line.split("all-gather")[0]], "logits or head are gathered"


def test_shapes_that_do_not_fit_are_refused():
    hidden, head, targets, weights = make_inputs()
    for arguments, message in [
        ((hidden[0], head, targets, weights), "do not fit"),
        ((hidden, head.T, targets, weights), "do not fit"),
        ((hidden, head, targets[:, 1:], weights), "one target a token"),
        ((hidden, head, targets, weights[:, 1:]), "one weight a token"),
    ]:
        with pytest.raises(ValueError, match=message):
            weighted_nll(*arguments)
    for options, message in [
        ({"chunk": 0}, "at least 1"),
        ({"softcap": 0.0}, "> 0"),
        ({"z_loss": -1.0}, ">= 0"),
        ({"groups": 2}, "divide the 3 rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            weighted_nll(hidden, head, targets, weights, **options)
