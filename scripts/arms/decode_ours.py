# SPDX-License-Identifier: Apache-2.0
"""jaxlm's embedded sampler, at temperature 0; prompts may share a prefix, and compilations are counted."""

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from arms import shapes
from arms.ours import model_config
from arms.shapes import Shape
from jaxlm.generate import Sampler, Sampling
from jaxlm.nn.decoder import Model

COMPILED: list[str] = []  # one entry a compilation, whatever is compiled


def _heard(event: str, duration_secs: float, **_: str | int) -> None:
    if event.endswith("backend_compile_duration"):
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_heard)


def words(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one word a token, so that texts are decoded as they would be."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def build(shape: Shape, num_slots: int):
    """(prompts [B, T], new tokens, samples of each) -> tokens [B x samples, new]."""
    model = Model(model_config(shape))
    params = jax.tree.map(jnp.asarray, shapes.weights(shape))
    if shape.dtype != "float32":  # to serve, weights need no float32 masters: a step would read twice the bytes
        params = jax.tree.map(lambda x: x.astype(shape.dtype), params)
    sampler = Sampler(model, params, words(shape.V), slots=num_slots)

    def generate(prompts: np.ndarray, new: int, num_samples: int = 1) -> np.ndarray:
        how = Sampling(max_tokens=new, temperature=0.0, num_samples=num_samples)
        found = sampler.sample(list(prompts), how)
        return np.stack([completion.tokens for samples in found for completion in samples])

    return generate
