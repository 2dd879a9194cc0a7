# SPDX-License-Identifier: Apache-2.0
"""Laws of perplexity by length of a model on disk."""

import jax
import numpy as np
import pytest

from jaxlm.checkpoints import save
from jaxlm.config import RunConfig
from jaxlm.data import DataConfig, LongText, Task, byte_tokenizer, text_tokens
from jaxlm.evaluation import evaluate_checkpoint, length_table
from jaxlm.methods import Sft
from jaxlm.nn import Model, ModelConfig, Rope
from jaxlm.train import RunOptions

MODEL = Model(ModelConfig(vocab_size=272, width=16, num_layers=1, num_heads=2, mlp_width=16, positions=Rope()))
PART = LongText(begin=0.9, end=0.901)
CONFIG = RunConfig(
    model=MODEL.config,
    tokenizer="bytes",
    data=DataConfig(tasks=(Task(name="text", train=LongText(end=0.01), test=PART),), length=16, on_long="split"),
    method=Sft(),
    run=RunOptions(steps=1, batch_size=8),
)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


def test_perplexity_by_length_is_that_of_each_token_with_its_window_before_it(params, tmp_path):
    save(tmp_path, MODEL, params, tokenizer=byte_tokenizer())
    metrics = evaluate_checkpoint(tmp_path, CONFIG, lengths=(8, 64))
    tokens = text_tokens(PART, byte_tokenizer())
    count = (len(tokens) - 1) // 64 * 64
    logits = jax.jit(lambda inputs: MODEL.logits(params, MODEL.apply(params, inputs)))
    for length in (8, 64):
        found = np.asarray(logits(tokens[:count].reshape(-1, length)), np.float64)
        log_probs = found - np.log(np.exp(found).sum(axis=-1, keepdims=True))
        nll = -np.take_along_axis(log_probs, tokens[1 : count + 1].reshape(-1, length)[..., None], axis=-1)[..., 0]
        assert metrics[f"perplexity/text@{length}"] == pytest.approx(np.exp(nll.mean()), rel=1e-5)
        assert metrics[f"tail_perplexity/text@{length}"] == pytest.approx(np.exp(nll[:, -128:].mean()), rel=1e-5)
    assert "text      64" in length_table(metrics)
    assert evaluate_checkpoint(tmp_path, CONFIG).keys() == {name for name in metrics if "@" not in name}


def test_a_text_too_short_for_common_windows_is_refused(params, tmp_path):
    save(tmp_path, MODEL, params, tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match=r"windows of 8, 4096 need 4097 held-out tokens .* there are \d\d\d:"):
        evaluate_checkpoint(tmp_path, CONFIG, lengths=(8, 4096))
