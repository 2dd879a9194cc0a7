# SPDX-License-Identifier: Apache-2.0
"""Generation through a capsule: what is sampled is what training saw, and the capsule can be read."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import checkpoints
from jaxlm.data import byte_tokenizer
from jaxlm.generate import Sampler, Sampling
from jaxlm.generate.capsules import CapsuleModel, explain, read_capsule
from jaxlm.generate.from_disk import open_sampler
from jaxlm.methods import RCapsule
from jaxlm.methods.plan_batches import Encoded, add_marks, assemble
from jaxlm.methods.r_capsule import capsule_pass
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import Model

pytestmark = pytest.mark.usefixtures("quick_compiles")

START = Model(ModelConfig(vocab_size=259, width=16, num_layers=2, num_heads=2, mlp_width=24, max_length=192))
METHOD = dataclasses.replace(RCapsule.tiny(), keep_decoder=True)
PROMPTS = ["12: c*3 a+7=", "5: b-2 q+8 a*9 z-1=", "9="]


@functools.cache
def made():
    """Tokenizer with marks, the model, its parameters; all larger than at first, so that capsules matter."""
    tokenizer = byte_tokenizer()
    marks = add_marks(tokenizer)
    model = METHOD.model(START, marks)
    phase = METHOD.phase(model, num_tasks=1, steps=1, marks=marks)
    params = phase.finish(jax.jit(phase.prepare)(START.init(jax.random.key(0)), jax.random.key(1)))
    return tokenizer, marks, model, {**params, "embed": {"table": 4 * params["embed"]["table"]}}


@functools.cache
def sampler(given="own"):
    tokenizer, marks, model, params = made()
    speaker = METHOD.speaker(model, params, tokenizer)
    assert speaker == CapsuleModel(model, METHOD.capsule, marks.cap, marks.end)
    return Sampler(dataclasses.replace(speaker, given=given), params, tokenizer, slots=4)


GREEDY = Sampling(temperature=0.0, max_tokens=12)


def test_greedy_tokens_are_the_argmax_of_the_training_pass_over_them():
    _, marks, model, params = made()
    found = [group[0].tokens.tolist() for group in sampler().sample(PROMPTS, GREEDY)]
    assert len({tuple(tokens) for tokens in found}) > 1
    records = [Encoded(list(p.encode()), [1, 258], tokens) for p, tokens in zip(PROMPTS, found, strict=True)]
    batch = assemble([[(0, i, record)] for i, record in enumerate(records)], METHOD.layout, marks)
    batch.pop("record_ids")
    hidden = jax.jit(lambda p, b: capsule_pass(model, p, b, METHOD.capsule)[0])(params, batch)
    best = np.asarray(jnp.argmax(model.logits(params, hidden), axis=-1))
    for row, tokens in enumerate(found):
        # e_K, then </cap>, from which the first token is drawn
        assert best[row, 1 : 1 + len(tokens)].tolist() == tokens


def test_a_sample_does_not_depend_on_its_neighbours_but_one_with_exchanged_capsules_does():
    def said(engine, prompts):
        return [group[0].raw_log_probs for group in engine.sample(prompts, GREEDY)]

    together, alone = said(sampler(), PROMPTS[:2]), [said(sampler(), [prompt])[0] for prompt in PROMPTS[:2]]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    for control in ("shuffled", "mean"):
        changed, again = said(sampler(control), PROMPTS[:2]), said(sampler(control), PROMPTS[:1])
        assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(changed, together, strict=True))
        np.testing.assert_allclose(again[0], alone[0], atol=1e-5)  # nobody to exchange with


def test_a_capsule_is_read_out_as_text_and_survives_the_disk(tmp_path):
    tokenizer, _, _, params = made()
    plans = explain(sampler().model, params, METHOD.decoder, tokenizer, PROMPTS)
    assert len(plans) == 3 and all(isinstance(plan, str) for plan in plans)
    model, plain, capsules = METHOD.exported(START, params, tokenizer)
    checkpoints.save(tmp_path / "model", model, plain, tokenizer=tokenizer)
    checkpoints.save_capsules(tmp_path / "model", capsules)
    again = open_sampler(tmp_path / "model", slots=4)
    decoder = checkpoints.load_capsules(tmp_path / "model").decoder
    assert explain(again.model, again.params, decoder, again.tokenizer, PROMPTS) == plans
    ours, theirs = (engine.sample(PROMPTS[:1], GREEDY)[0][0].tokens.tolist() for engine in (sampler(), again))
    assert ours == theirs
    (tmp_path / "model" / "capsule" / "leaves.safetensors").unlink()
    with pytest.raises(ValueError, match=r"leaves.safetensors is missing"):
        open_sampler(tmp_path / "model")


def test_the_script_prints_the_plan_and_a_server_knows_none(tmp_path, generate):
    tokenizer, _, _, params = made()
    model, plain, capsules = METHOD.exported(START, params, tokenizer)
    checkpoints.save(tmp_path / "model", model, plain, tokenizer=tokenizer)
    checkpoints.save_capsules(tmp_path / "model", capsules)
    [plan] = explain(sampler().model, params, METHOD.decoder, tokenizer, PROMPTS[:1])
    how = ("--explain", "--temperature", 0, "--max-tokens", 4, PROMPTS[0])
    code, printed, _ = generate(tmp_path / "model", "--json", *how)
    assert code == 0 and json.loads(printed)["plan"] == plan
    code, printed, _ = generate(tmp_path / "model", *how)
    assert code == 0 and printed.startswith(f"--- plan 0\n{plan}\n")
    code, _, errors = generate("name", "--server", "http://127.0.0.1:9", *how)
    assert code == 2 and "capsule tokens are embeddings; use the embedded engine: --explain without --server" in errors


def test_room_is_needed_for_the_capsule_too():
    long = [1] * 180  # with 4 tokens of the capsule and its frame, 184 of 192
    with pytest.raises(ValueError, match=r"has 184 tokens, and 12 more exceed the 192"):
        sampler().sample([long], GREEDY)


def test_what_cannot_be_is_refused():
    tokenizer, _, model, params = made()
    dropped = {name: leaf for name, leaf in params.items() if name != "plan_decoder"}
    with pytest.raises(ValueError, match="no plan decoder to read the capsule with: it was dropped"):
        read_capsule(dropped, jnp.ones((1, 2, 4)), METHOD.decoder, tokenizer)
    with pytest.raises(ValueError, match="makes no capsule"):
        explain(model, params, METHOD.decoder, tokenizer, PROMPTS)
    with pytest.raises(ValueError, match="does not say where its capsule stands"):
        sampler().score(["a"], ["b"])
    with pytest.raises(ValueError, match="answered with once they are merged"):
        METHOD.speaker(model, {"capsule": {"marks": {}}}, tokenizer)
    assert METHOD.speaker(model, {}, tokenizer) is model
