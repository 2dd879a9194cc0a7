# SPDX-License-Identifier: Apache-2.0
"""transformers' Llama with torch in eager mode, AdamW of torch, on CPU."""

import torch
import transformers

from arms import shapes
from arms.shapes import Shape

NAMES = {
    "attention": {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"},
    "mlp": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}


def state_dict(params, shape: Shape):
    """jaxlm's tree under transformers' names; kernels are transposed."""
    entries = {
        "model.embed_tokens.weight": params["embed"]["table"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["head"]["kernel"].T,
    }
    for i in range(shape.L):
        layer, blocks = f"model.layers.{i}", params["blocks"]
        entries[f"{layer}.input_layernorm.weight"] = blocks["attention_norm"]["scale"][i]
        entries[f"{layer}.post_attention_layernorm.weight"] = blocks["mlp_norm"]["scale"][i]
        for part, theirs in (("attention", "self_attn"), ("mlp", "mlp")):
            for name, other in NAMES[part].items():
                entries[f"{layer}.{theirs}.{other}.weight"] = blocks[part][name]["kernel"][i].T
    return {name: torch.from_numpy(value) for name, value in entries.items()}


def config(shape: Shape, *, use_cache: bool) -> transformers.LlamaConfig:
    """The shape as transformers knows it."""
    return transformers.LlamaConfig(
        vocab_size=shape.V,
        hidden_size=shape.D,
        num_hidden_layers=shape.L,
        num_attention_heads=shape.N,
        num_key_value_heads=shape.K,
        head_dim=shape.H,
        intermediate_size=shape.F,
        max_position_embeddings=max(shape.T, 1024),
        rms_norm_eps=shapes.NORM_EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": shapes.ROPE_BASE},
        tie_word_embeddings=False,
        use_cache=use_cache,
    )


def build(shape: Shape):
    """(logits of tokens, one update and its loss)."""
    if shape.dtype != "float32":
        raise ImportError("the torch arm is float32 on CPU")
    model = transformers.LlamaForCausalLM(config(shape, use_cache=False))
    model.load_state_dict(state_dict(shapes.weights(shape), shape))
    betas = (shapes.B1, shapes.B2)
    optimizer = torch.optim.AdamW(
        model.parameters(), shapes.LEARNING_RATE, betas, shapes.EPSILON, weight_decay=shapes.DECAY
    )

    def logits(tokens):
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()

    def step(tokens):
        ids = torch.from_numpy(tokens).long()
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return logits, step
