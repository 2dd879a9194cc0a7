# SPDX-License-Identifier: Apache-2.0
"""R-Capsule's own laws: what it is without capsules, one way to the plan, exact sums, what is left at the end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import checkpoints
from jaxlm.data import byte_tokenizer
from jaxlm.methods import RCapsule, Sft
from jaxlm.methods.plan_batches import Encoded, Marks, add_marks, assemble
from jaxlm.methods.r_capsule import _plan_terms, _Settings, capsule_pass, with_marks
from jaxlm.nn.capsule_config import CapsuleConfig, PlanDecoderConfig
from jaxlm.nn.config import Lora, ModelConfig
from jaxlm.nn.decoder import Model
from jaxlm.nn.lora import LEAVES
from jaxlm.train.loop import train
from jaxlm.train.mesh import make_mesh
from jaxlm.train.options import AdamW, MeshOptions, RunOptions
from jaxlm.weights.names import named_leaves

pytestmark = pytest.mark.usefixtures("quick_compiles")

BARE = Model(ModelConfig(vocab_size=29, width=16, num_layers=1, num_heads=2, mlp_width=24))
METHOD = dataclasses.replace(RCapsule.tiny(), bucket=4)
MARKS = Marks(29, 30, 31)
DRAW = np.random.default_rng(0)
RECORDS = []
for i in range(8):
    asked, planned, worked = (DRAW.integers(1, 29, n).tolist() for n in (3 + i % 4, 1 + i % 5, 2 + i % 3))
    RECORDS.append(Encoded(asked, planned, [*worked, 31, 7]))


def rows_of(method, records=RECORDS):
    return assemble([[(i % 2, i, record)] for i, record in enumerate(records)], method.layout, MARKS)


@functools.cache
def phase_and_params(method):
    phase = method.phase(method.model(BARE), num_tasks=2, steps=10)
    return phase, jax.jit(phase.prepare)(BARE.init(jax.random.key(0)), jax.random.key(1))


def objective(phase, params, batch, weights=None):
    """What the step differentiates: every total over the weight of the whole."""
    terms = phase.loss_fn(params, {k: v for k, v in batch.items() if k != "record_ids"}, None)
    weights = weights or {name: term.weight for name, term in terms.items()}
    return sum(t.coefficient * t.total / weights[name] for name, t in terms.items() if t.coefficient), terms


@functools.cache
def gradients(method):
    phase, params = phase_and_params(method)
    batch = rows_of(method)
    return jax.jit(jax.grad(lambda p: objective(phase, p, batch), has_aux=True))(params)


def test_without_capsules_it_is_plain_fine_tuning():
    method = dataclasses.replace(METHOD, num_capsules=0)
    phase, params = phase_and_params(method)
    batch = rows_of(method)
    assert not {"capsule", "plan_decoder"} & set(params) and "plan_tokens" not in batch and 29 not in batch["tokens"]
    for i, record in enumerate(RECORDS):  # x s <ans> y <eos>, what follows x is learnt
        ids = [*record.prompt, *record.text]
        assert batch["tokens"][i, : len(ids)].tolist() == ids
        assert (
            batch["loss_weights"][i].sum() == len(record.text) == batch["loss_weights"][i, len(record.prompt) :].sum()
        )
    plain = Sft().phase(method.model(BARE), num_tasks=2, steps=10)
    ours, theirs = (
        jax.jit(jax.grad(lambda p, f=f: objective(f, p, batch), has_aux=True))(params) for f in (phase, plain)
    )
    assert ours[1].keys() == theirs[1].keys()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_every_part_gets_a_gradient():
    grads, terms = gradients(METHOD)
    still = [name for name, x in named_leaves(grads).items() if not np.any(x)]
    assert set(still) == {"capsule/rho", "plan_decoder/pool/kernel", "plan_decoder/pool/bias"}
    assert terms["loss"].weight == sum(len(r.text) for r in RECORDS) == terms["plan_loss"].weight
    assert terms["plan_nll"].weight == sum(len(r.plan) for r in RECORDS)


def test_the_pooled_reading_trains_the_pool():
    grads, _ = gradients(dataclasses.replace(METHOD, recon="embedding"))
    assert grads["plan_decoder"]["pool"]["kernel"].any() and not grads["plan_decoder"]["token_out"]["kernel"].any()
    assert grads["capsule"]["to_capsule"]["kernel"].any()


def test_lambda_zero_leaves_the_decoder_alone_and_the_model_as_without_one():
    idle = dataclasses.replace(METHOD, recon_weight=0.0)
    (phase, params), batch = phase_and_params(idle), rows_of(METHOD)
    watched, terms = jax.jit(jax.grad(lambda p: objective(phase, p, batch), has_aux=True))(params)
    assert not any(x.any() for x in jax.tree.leaves(watched["plan_decoder"])) and terms["plan_loss"].coefficient == 0
    without, _ = gradients(dataclasses.replace(METHOD, recon="none"))
    rest = {name: leaf for name, leaf in watched.items() if name != "plan_decoder"}
    for a, b in zip(jax.tree.leaves(rest), jax.tree.leaves(without), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reconstruction_sees_the_capsule_alone():
    (_, params), batch = phase_and_params(METHOD), rows_of(METHOD)
    settings = _Settings(METHOD.capsule, METHOD.decoder, "tokens", 0.3)
    capsule = jnp.asarray(DRAW.normal(size=(8, 1, 2, 4)), jnp.float32)
    other = batch | {"tokens": (batch["tokens"] + 5) % 29}

    @jax.jit
    def plan_loss(params, batch, capsule):
        model = METHOD.model(BARE)
        return _plan_terms(model, params, batch, jax.lax.stop_gradient(capsule), settings)["plan_loss"].total

    both, grads = (jax.jit(f)(params, batch, capsule) for f in (plan_loss, jax.grad(plan_loss)))
    assert both == plan_loss(params, other, capsule) != plan_loss(params, batch, capsule[::-1])
    assert not any(x.any() for name, x in named_leaves(grads).items() if not name.startswith("plan_decoder/"))
    assert grads["plan_decoder"]["memory"]["kernel"].any()


def test_a_batch_in_parts_of_unequal_lengths_gives_the_gradient_of_the_whole():
    grads, terms = gradients(METHOD)
    phase, params = phase_and_params(METHOD)
    weights, batch = {name: term.weight for name, term in terms.items()}, rows_of(METHOD)
    part = jax.jit(jax.grad(lambda p, rows: objective(phase, p, rows, weights)[0]))
    parts = [part(params, {name: x[i::4] for name, x in batch.items()}) for i in range(4)]
    for whole, *cut in zip(jax.tree.leaves(grads), *map(jax.tree.leaves, parts), strict=True):
        np.testing.assert_allclose(sum(cut), whole, rtol=0, atol=2e-6 * max(1.0, float(jnp.max(jnp.abs(whole)))))


def test_packed_rows_of_the_parallel_form_give_the_loss_of_separate_rows():
    method = dataclasses.replace(METHOD, mode="parallel")
    phase, params = phase_and_params(method)
    named = [(i % 2, i, record) for i, record in enumerate(RECORDS)]
    packed = assemble([named[:3], named[3:5], named[5:8], []], method.layout, MARKS)
    assert packed["plan_tokens"].shape[1] == 4 and packed["segment_ids"].max() == 3
    run = jax.jit(lambda p, b: objective(phase, p, b)[1])
    ours, theirs = run(params, packed), run(params, rows_of(method))
    for name, term in theirs.items():
        np.testing.assert_allclose(ours[name].total, term.total, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours[name].weight, term.weight, rtol=1e-6)


def test_the_plan_decoder_goes_at_the_end_unless_it_is_kept_and_no_bit_of_the_rest_changes(tmp_path):
    phase, params = phase_and_params(METHOD)
    left = phase.finish(params)
    assert "plan_decoder" not in left and set(params) == {*left, "plan_decoder"}
    assert all(
        np.array_equal(left[name][k], params[name][k])
        for name in ("embed", "capsule")
        for k in left[name]
        if k in ("table", "rho")
    )
    kept = dataclasses.replace(METHOD, keep_decoder=True)
    assert "plan_decoder" in phase_and_params(kept)[0].finish(params)
    tokenizer = byte_tokenizer()
    marks = add_marks(tokenizer)
    start = Model(dataclasses.replace(BARE.config, vocab_size=259))
    model = kept.model(start, marks)
    assert model.config.vocab_size == 264 and marks == (259, 260, 261)
    long = kept.phase(model, num_tasks=1, steps=1, marks=marks)
    trained = long.finish(jax.jit(long.prepare)(start.init(jax.random.key(0)), jax.random.key(1)))
    saved, plain, capsules = kept.exported(start, trained, tokenizer)
    checkpoints.save(tmp_path / "model", saved, plain, tokenizer=tokenizer)
    checkpoints.save_capsules(tmp_path / "model", capsules)
    alone, params = checkpoints.load(tmp_path / "model")  # in a run without this method
    again = checkpoints.load_capsules(tmp_path / "model")
    assert alone.config.vocab_size == 264 and again[:4] == capsules[:4] == (kept.capsule, kept.decoder, 259, 260)
    for ours, theirs in ((params, plain), (again.leaves, capsules.leaves)):
        assert named_leaves(ours).keys() == named_leaves(theirs).keys()
        assert all(np.array_equal(x, named_leaves(theirs)[name]) for name, x in named_leaves(ours).items())


def test_new_rows_lie_near_the_mean_and_the_old_ones_stay():
    _, params = phase_and_params(METHOD)
    old, new = (np.asarray(p["embed"]["table"]) for p in (BARE.init(jax.random.key(0)), params))
    assert new.shape == (32, 16) and np.array_equal(new[:29], old)
    apart = np.abs(new[29:] - old.mean(0)) / old.std(0)
    assert np.all(apart < 0.06) and np.all(apart.max(axis=1) > 0)
    rms = np.sqrt(np.mean(new**2, axis=1)).mean()
    np.testing.assert_allclose(params["capsule"]["rho"], rms, rtol=1e-6)


def test_beside_adapters_the_capsule_and_the_rows_of_the_marks_train_and_nothing_else():
    sft = Sft(optimizer=AdamW(learning_rate=1e-2), lora=Lora(rank=2))
    method = dataclasses.replace(METHOD, sft=sft)
    phase, params = phase_and_params(method)
    batch = rows_of(method)
    state = phase.tx.init(params)
    grads = jax.jit(jax.grad(lambda p: objective(phase, p, batch)[0]))(params)
    assert grads["capsule"]["marks"]["table"].any(axis=1).all()
    updates, _ = jax.jit(phase.tx.update)(grads, state, params)
    moved = {name for name, x in named_leaves(updates).items() if np.any(x)}
    assert {name.partition("/")[0] for name in moved} == {"capsule", "plan_decoder", "blocks"}
    assert all(name.endswith(LEAVES) for name in moved if name.startswith("blocks"))
    left = phase.finish(params)
    assert jax.tree.structure(left) == jax.tree.structure(
        phase_and_params(METHOD)[0].finish(phase_and_params(METHOD)[1])
    )
    changed = {**params, "capsule": params["capsule"] | {"marks": {"table": jnp.ones((3, 16))}}}
    assert np.all(phase.finish(changed)["embed"]["table"][29:] == 1) and with_marks(params, None) is params


def test_equal_numbers_share_one_loss_and_lengths_of_a_bucket_one_program():
    one, two = (METHOD.phase(METHOD.model(BARE), num_tasks=2, steps=n) for n in (5, 9))
    assert one.loss_fn is two.loss_fn
    shapes = {tuple(x.shape for x in rows_of(METHOD, [record]).values()) for record in RECORDS}
    assert len(shapes) <= 4, "prompts of 4 to 7 tokens and plans of 1 to 5 lie in two buckets of 4 each"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_capsules": -1}, "num_capsules must be at least 0, got -1"),
        ({"recon_weight": -0.1}, "recon_weight must be at least 0, got -0.1"),
        ({"source": "pause"}, "no capsule to rebuild a plan from: set recon='none'"),
        ({"keep_decoder": True, "recon": "none"}, "there is none"),
        ({"keep_decoder": True, "recon": "embedding"}, "trains no tokens to read out"),
        ({"bucket": 0}, "need bucket >= 1"),
        ({"decoder_width": 10, "decoder_heads": 4}, "10 is not a multiple of its 4 heads"),
    ],
)
def test_numbers_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RCapsule(**fields)


def test_a_capsule_as_wide_as_the_model_and_a_model_that_cannot_go_on_are_refused():
    wide = dataclasses.replace(METHOD, capsule_width=16)
    with pytest.raises(ValueError, match="capsule_width 16 is no bottleneck for model width 16; choose at most 15"):
        phase_and_params(wide)
    with pytest.raises(ValueError, match="int is no decoder"):
        METHOD.model(3)


def test_a_pass_in_steps_ignores_what_stands_in_the_places_of_capsules_and_padding():
    (_, params), batch = phase_and_params(METHOD), rows_of(METHOD)
    run = jax.jit(lambda b: capsule_pass(METHOD.model(BARE), params, b, METHOD.capsule)[0])
    P, other = batch["prompt_mask"].shape[1], batch["tokens"].copy()
    other[:, :P] = np.where(batch["prompt_mask"], other[:, :P], 3)
    real = batch["segment_ids"][:, P + 1 :] > 0
    ours, theirs = run(batch), run(batch | {"tokens": other})
    assert np.array_equal(ours[real], theirs[real])
    assert CapsuleConfig() == RCapsule().capsule and PlanDecoderConfig() == RCapsule().decoder


def test_the_capsule_learns_to_stand_for_the_plan():
    """Three digits, which the plan turns round: without a capsule nothing says better than log(10) for each of them."""
    method = dataclasses.replace(METHOD, capsule_width=8, decoder_width=32, recon_weight=1.0)
    draw = np.random.default_rng(1)

    def batch():
        digits = draw.integers(1, 11, (32, 3))
        records = [Encoded(row.tolist(), [*row[::-1].tolist(), 28], [31, int(row.sum() % 10), 28]) for row in digits]
        return rows_of(method, records)

    phase, _ = phase_and_params(method)
    mesh = make_mesh(MeshOptions(data=1), devices=jax.devices()[:1])
    options = RunOptions(steps=250, batch_size=32, log_every=250)
    state = train(phase, BARE.init(jax.random.key(0)), (batch() for _ in range(250)), options=options, mesh=mesh)
    params, held = jax.device_get(state.params), batch()

    @jax.jit
    def nll(params, held, shift):
        _, capsule, _ = capsule_pass(method.model(BARE), params, held, method.capsule)
        settings = _Settings(method.capsule, method.decoder, "tokens", 1.0)
        term = _plan_terms(method.model(BARE), params, held, jnp.roll(capsule, shift, axis=0), settings)["plan_nll"]
        return term.total / term.weight

    own, exchanged = float(nll(params, held, 0)), float(nll(params, held, 1))
    assert own < exchanged - 0.1 and own < 3 / 4 * np.log(10) - 0.1, (own, exchanged)
