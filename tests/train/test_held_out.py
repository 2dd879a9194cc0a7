# SPDX-License-Identifier: Apache-2.0
"""Laws of the held-out metrics: they are what a loop in NumPy says, however the rows are cut or divided."""

import functools

import jax
import numpy as np
import optax
import pytest

from jaxlm.nn import Model, ModelConfig
from jaxlm.train.held_out import evaluate, score_items, score_windows
from jaxlm.train.loop import train
from jaxlm.train.mesh import make_mesh
from jaxlm.train.options import MeshOptions, RunOptions

TASKS = ("copy", "sum", "idle")
ROWS, LENGTH, VOCAB = 37, 16, 64


@pytest.fixture(scope="module")
def model():
    return Model(ModelConfig(vocab_size=VOCAB, width=16, num_layers=2, num_heads=2, mlp_width=32))


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def rows(model, params):
    """Packed rows of two or three records of one of two tasks; many targets are set to the model's own argmax."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH), dtype=np.int32)
    segment_ids = np.zeros((ROWS, LENGTH), np.int32)
    positions = np.zeros((ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        cuts = sorted(rng.choice(np.arange(2, LENGTH - 1), size=rng.integers(2, 4), replace=False))
        for number, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True), 1):
            segment_ids[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
    weights = ((rng.random((ROWS, LENGTH)) < 0.5) & (segment_ids > 0)).astype(np.float32)
    for t in range(1, LENGTH):  # left to right, since each choice changes what follows
        best = np.asarray(_logits(model, params, tokens, positions, segment_ids))[:, t - 1].argmax(-1)
        tokens[:, t] = np.where(rng.random(ROWS) < 0.7, best, tokens[:, t])
    task_ids = np.broadcast_to(rng.integers(0, 2, (ROWS, 1), dtype=np.int32), (ROWS, LENGTH))
    batch = {"tokens": tokens, "loss_weights": weights, "positions": positions, "segment_ids": segment_ids}
    numbers = 3 * rng.permutation(ROWS)[:, None] + segment_ids  # no two segments are one record, no row comes in order
    record_ids = np.where(segment_ids > 0, numbers, -1).astype(np.int32)
    return batch | {"task_ids": task_ids, "record_ids": record_ids}


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, positions, segment_ids):
    return model.logits(params, model.apply(params, tokens, positions=positions, segment_ids=segment_ids))


def cut(rows, batch_size):
    """Batches of one shape, the last one filled up with rows of padding."""
    missing = -ROWS % batch_size
    padded = {name: np.concatenate([x, np.zeros((missing, LENGTH), x.dtype)]) for name, x in rows.items()}
    for start in range(0, ROWS + missing, batch_size):
        yield {name: x[start : start + batch_size] for name, x in padded.items()}


def each_record(model, params, rows):
    """(task, record, nll, tokens, correct) again, record by record."""
    logits = np.asarray(_logits(model, params, rows["tokens"], rows["positions"], rows["segment_ids"]), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row in range(ROWS):
        for segment in range(1, rows["segment_ids"][row].max() + 1):
            inside = np.flatnonzero(rows["segment_ids"][row] == segment)
            targets = [t for t in inside[1:] if rows["loss_weights"][row, t] > 0]
            if not targets:
                continue
            tokens = rows["tokens"][row]
            nll = -sum(log_probs[row, t - 1, tokens[t]] for t in targets)
            correct = sum(logits[row, t - 1].argmax() == tokens[t] for t in targets)
            names = rows["task_ids"][row, inside[0]], rows["record_ids"][row, inside[0]]
            yield *names, nll, len(targets), correct


def by_loops(model, params, rows):
    """The metrics again, from those records."""
    nll, weight, right, records = (dict.fromkeys(TASKS, 0.0) for _ in range(4))
    for task_id, _, loss, tokens, correct in each_record(model, params, rows):
        task = TASKS[task_id]
        nll[task] += loss
        weight[task] += tokens
        records[task] += 1
        right[task] += tokens == correct
    metrics = {"loss": sum(nll.values()) / sum(weight.values())}
    for task in ("copy", "sum"):
        loss = nll[task] / weight[task]
        metrics |= {
            f"loss/{task}": loss,
            f"perplexity/{task}": np.exp(loss),
            f"exact_match/{task}": right[task] / records[task],
        }
    return metrics


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_metrics_are_those_of_a_loop_over_records_for_every_batch_size(model, params, rows, batch_size):
    expected = by_loops(model, params, rows)
    found = evaluate(model, params, cut(rows, batch_size), TASKS)
    assert found.keys() == expected.keys(), "a task without a weighted token is left out"
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert 0 < expected["exact_match/copy"] < 1, "the records are neither all right nor all wrong"


@pytest.mark.parametrize("batch_size", [1, 32])
def test_every_record_is_scored_by_itself_in_order_whatever_the_batch(model, params, rows, batch_size):
    expected = sorted(each_record(model, params, rows))
    found = score_items(model, params, cut(rows, batch_size))
    assert list(zip(found.task_ids, found.record_ids, strict=True)) == [record[:2] for record in expected]
    np.testing.assert_allclose(found.nll, [record[2] for record in expected], rtol=1e-5)
    np.testing.assert_array_equal(found.tokens, [record[3] for record in expected])
    np.testing.assert_array_equal(found.correct, [record[4] for record in expected])


def test_scores_of_a_record_do_not_depend_on_batch_or_devices(model, params, rows):
    one, many = (score_items(model, params, cut(rows, batch_size)) for batch_size in (1, 32))
    eight = score_items(model, params, cut(rows, 8), make_mesh(MeshOptions(data=4, fsdp=2)))
    for other in (many, eight):
        np.testing.assert_allclose(other.nll, one.nll, rtol=1e-6, atol=1e-6)
        for name in ("task_ids", "record_ids", "tokens", "correct"):
            np.testing.assert_array_equal(getattr(other, name), getattr(one, name), err_msg=name)


def test_records_of_batches_that_do_not_name_them_are_all_there(model, params, rows):
    nameless = {name: x for name, x in rows.items() if name != "record_ids"}
    found = score_items(model, params, cut(nameless, 8))
    assert set(found.record_ids) == {-1}
    assert found.nll.sum() == pytest.approx(score_items(model, params, cut(rows, 8)).nll.sum(), rel=1e-12)


def test_eight_devices_say_what_one_says(model, params, rows):
    mesh = make_mesh(MeshOptions(data=4, fsdp=2))
    one = evaluate(model, params, cut(rows, 8), TASKS)
    eight = evaluate(model, params, cut(rows, 8), TASKS, mesh)
    assert eight == pytest.approx(one, rel=1e-5)


def test_one_program_serves_all_batches_and_all_evaluations(model, params, rows):
    seen = []

    def listener(name, seconds, **_):
        seen.extend([name] if "backend_compile" in name else [])

    batches = list(cut(rows, 5))
    other = jax.block_until_ready(jax.tree.map(lambda x: x + 0.0, params))
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        evaluate(model, params, batches, TASKS)
        evaluate(model, other, batches, TASKS)
        assert len(seen) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_training_with_evaluations_ends_with_the_bits_of_training_without(tiny):
    other = Model(tiny.config)
    start = jax.jit(other.init)(jax.random.key(1))
    phase = tiny.phase(optax.with_extra_args_support(optax.adam(1e-2)), noise=0.1)
    options = RunOptions(steps=4, batch_size=16, evaluate_every=1)
    seen = []

    def measure(params):
        seen.append(score_items(other, params, [tiny.make_batch(99)], tiny.mesh(data=2)))
        return {"loss": float(seen[-1].nll.sum())}

    ends = [
        train(phase, start, tiny.Rows(), options=options, mesh=tiny.mesh(data=2), evaluate=evaluate)
        for evaluate in (None, measure)
    ]
    assert len(seen) >= 4 and len({float(items.nll.sum()) for items in seen}) == len(seen), "it did evaluate"
    assert tiny.bits(ends[0]) == tiny.bits(ends[1])


def test_nothing_to_evaluate_is_an_error(model, params, rows):
    silent = rows | {"loss_weights": np.zeros((ROWS, LENGTH), np.float32)}
    with pytest.raises(ValueError, match=r"no held-out row of copy, sum, idle has a token with a weight"):
        evaluate(model, params, cut(silent, 8), TASKS)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(model, params, [], TASKS)


def test_windows_are_scored_token_by_token_however_they_are_batched(model, params):
    text = np.random.default_rng(1).integers(0, VOCAB, 61, dtype=np.int32)
    inputs, targets = text[:60].reshape(5, 12), text[1:].reshape(5, 12)
    positions = np.broadcast_to(np.arange(12), inputs.shape)
    logits = np.asarray(_logits(model, params, inputs, positions, np.ones_like(inputs)), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    wanted = -np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    for mesh in (None, make_mesh(MeshOptions())):
        for tokens_at_once in (1, 24, 1000):
            found = score_windows(model, params, inputs, targets, mesh, tokens_at_once=tokens_at_once)
            np.testing.assert_allclose(found, wanted, atol=2e-6)
