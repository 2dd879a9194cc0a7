# SPDX-License-Identifier: Apache-2.0
"""google-tunix: its Llama 3 model and the compiled train step of its PeftTrainer, all parameters trained.

Runs in an environment of its own and so imports nothing of jaxlm.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft import peft_trainer
from tunix.sft import utils as masks

from arms import shapes
from arms.shapes import Shape


def place(model, params, shape: Shape):
    """Writes jaxlm's tree into the model."""
    model.embedder.input_embedding[...] = jnp.asarray(params["embed"]["table"])
    model.final_norm.w[...] = jnp.asarray(params["final_norm"]["scale"])
    model.lm_head.w[...] = jnp.asarray(params["head"]["kernel"])
    blocks = params["blocks"]
    for i, layer in enumerate(model.layers):
        layer.input_layernorm.w[...] = jnp.asarray(blocks["attention_norm"]["scale"][i])
        layer.post_attention_layernorm.w[...] = jnp.asarray(blocks["mlp_norm"]["scale"][i])
        for name, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")):
            weight = getattr(layer.attn, theirs).w
            weight[...] = jnp.asarray(blocks["attention"][name]["kernel"][i]).reshape(weight.shape)
        for name in ("gate", "up", "down"):
            getattr(layer.mlp, f"{name}_proj").kernel[...] = jnp.asarray(blocks["mlp"][name]["kernel"][i])


def model_of(shape: Shape) -> Llama3:
    """Its Llama with our weights."""
    config = ModelConfig(
        num_layers=shape.L,
        vocab_size=shape.V,
        embed_dim=shape.D,
        hidden_dim=shape.F,
        num_heads=shape.N,
        head_dim=shape.H,
        num_kv_heads=shape.K,
        rope_theta=int(shapes.ROPE_BASE),
        norm_eps=shapes.NORM_EPSILON,
    )
    model = Llama3(config, rngs=nnx.Rngs(0))
    place(model, shapes.weights(shape), shape)
    return model


def build(shape: Shape):
    """(logits of tokens, one update and its loss)."""
    model = model_of(shape)
    tx = optax.adamw(shapes.LEARNING_RATE, shapes.B1, shapes.B2, shapes.EPSILON, weight_decay=shapes.DECAY)
    trainer = peft_trainer.PeftTrainer(model, tx, peft_trainer.TrainingConfig(eval_every_n_steps=1 << 30))

    def inputs(batch):
        mask = batch.input_mask
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": mask,
            "positions": masks.build_positions_from_mask(mask),
            "attention_mask": masks.make_causal_attn_mask(mask),
        }

    trainer.with_gen_model_input_fn(inputs)
    compiled, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def step(tokens):
        loss, _, _ = compiled(peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones(tokens.shape, bool)))
        jax.block_until_ready((loss, nnx.state(model)))
        return float(loss)

    def logits(tokens):
        batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones(tokens.shape, bool))
        given = inputs(batch)
        return model(tokens, given["positions"], None, given["attention_mask"])[0]

    return logits, step
