# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens are those of transformers' `generate`, with our cache and without, for every family.

SmolLM2 itself is asked too where its file is at hand; it takes minutes:

  JAXLM_ASSETS=folder python -m pytest tests/generate/test_parity.py -k smollm2 -s
"""

import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import checkpoints
from jaxlm.data import byte_tokenizer
from jaxlm.generate import Sampler, Sampling

torch = pytest.importorskip("torch", reason="live parity needs torch")
import transformers  # behind torch, which it looks for

CHECKPOINTS = pathlib.Path(__file__).parents[1] / "checkpoints"
VARIANTS = sorted(path.parent.name for path in (CHECKPOINTS / "golden").glob("*/config.json"))
LENGTHS = (3, 1, 17, 8, 12, 5, 20, 9)  # tokens of the 8 prompts
NEW, BUFFER = 64, 128
pytestmark = pytest.mark.usefixtures("quick_compiles")


def theirs(model, prompts, *, eos=None):
    """Tokens of transformers' `generate` on one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids, mask = torch.zeros((2, len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    model.generation_config.eos_token_id = eos
    with torch.no_grad():
        found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    rows = found[:, longest:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def without_cache(model, params, prompts, *, eos=None):
    """One whole forward pass of all rows for each token: tokens, and the gap of the two best logits of each."""
    lengths = np.array(list(map(len, prompts)))
    rows = np.zeros((len(prompts), max(lengths) + NEW), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt

    @jax.jit
    def best(params, rows, lengths):
        hidden = jnp.take_along_axis(model.apply(params, rows), lengths[:, None, None] - 1, axis=1)[:, 0]
        values, tokens = jax.lax.top_k(model.logits(params, hidden), 2)
        return tokens[:, 0], values

    gaps = []
    for _ in range(NEW):
        tokens, values = best(params, rows, jnp.asarray(lengths, jnp.int32))
        rows[np.arange(len(rows)), lengths] = tokens
        lengths += 1
        gaps.append(np.asarray(values[:, 0] - values[:, 1]))
    found = [row[len(p) : len(p) + NEW].tolist() for row, p in zip(rows, prompts, strict=True)]
    return [row[: row.index(eos) + 1] if eos in row else row for row in found], np.array(gaps).T


def differences(one, other, gaps):
    """Where two greedy texts part: (row, step, gap of the two best logits there)."""
    found = []
    for row, (a, b) in enumerate(zip(one, other, strict=True)):
        steps = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
        if steps or len(a) != len(b):
            step = steps[0] if steps else min(len(a), len(b))
            found.append((row, step, float(gaps[row, step])))
    return found


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_golden", CHECKPOINTS / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers(variant, maker, monkeypatch, tmp_path):
    kind, fields = maker.VARIANTS[variant]
    room = "n_positions" if variant == "gpt2" else "max_position_embeddings"
    monkeypatch.setitem(maker.VARIANTS, variant, (kind, fields | {room: BUFFER}))
    reference = maker.make_model(variant, seed=3)
    reference.save_pretrained(tmp_path)
    model, params = checkpoints.load(tmp_path)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 64, length).tolist() for length in LENGTHS]
    expected = theirs(reference, prompts)
    assert all(len(row) == NEW for row in expected)
    sampler = Sampler(model, params, byte_tokenizer(), slots=8, size=BUFFER)
    cached = [s.tokens.tolist() for [s] in sampler.sample(prompts, Sampling(max_tokens=NEW, temperature=0.0))]
    whole, gaps = without_cache(model, params, prompts)
    assert not differences(cached, expected, gaps), "(row, step, gap of the two best logits)"
    assert not differences(whole, expected, gaps), "(row, step, gap of the two best logits)"


PROMPTS = (
    "What is the capital of France?",
    "Hi",
    "Tell me a long story about a dragon.",
    "Write the numbers from one to twenty.",
    "Explain in two sentences why the sky is blue, as if I were ten years old.",
    "2 + 2 =",
    "Name three colours.",
    "Translate 'good morning' into French, Spanish and German, and say when each of them is used.",
)


def test_greedy_tokens_of_smollm2_are_those_of_transformers(tmp_path):
    name, assets = "SmolLM2-135M-Instruct.Q4_1.gguf", os.environ.get("JAXLM_ASSETS")
    if not assets:
        pytest.skip(f"set JAXLM_ASSETS to a folder that contains {name}")
    [path] = sorted(pathlib.Path(assets).rglob(name))[:1]
    model, params = checkpoints.load(path)
    tokenizer = checkpoints.load_tokenizer(path)
    checkpoints.save(tmp_path, model, params, family="llama", tokenizer=tokenizer)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in PROMPTS
    ]
    eos = tokenizer.eos_token_id
    expected = theirs(reference, prompts, eos=eos)
    sampler = Sampler(model, params, tokenizer, slots=8, size=256)
    cached = [s.tokens.tolist() for [s] in sampler.sample(prompts, Sampling(max_tokens=NEW, temperature=0.0))]
    whole, gaps = without_cache(model, params, prompts, eos=eos)
    for what, found in (("cached", cached), ("whole passes", whole)):
        print(f"{what}: {sum(map(len, found))} tokens, (row, step, logit gap) of those that part:",
              differences(found, expected, gaps))  # fmt: skip
    print(f"smallest gap of the two best logits {min(g[: len(r)].min() for g, r in zip(gaps, whole, strict=True)):.2e}")
    for found in (cached, whole):
        assert all(gap < 1e-3 for _, _, gap in differences(found, expected, gaps))
