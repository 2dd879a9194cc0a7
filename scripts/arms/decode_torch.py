# SPDX-License-Identifier: Apache-2.0
"""transformers' `generate` with torch, greedy, with its cache, on CPU."""

import numpy as np
import torch
import transformers

from arms import shapes, torch_eager
from arms.shapes import Shape


def build(shape: Shape, num_slots: int):
    """(prompts [B, T], new tokens) -> tokens [B, new]."""
    if shape.dtype != "float32":
        raise ImportError("the torch arm is float32 on CPU")
    config = torch_eager.config(shape, use_cache=True)
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(torch_eager.state_dict(shapes.weights(shape), shape))

    def generate(prompts: np.ndarray, new: int) -> np.ndarray:
        ids = torch.from_numpy(prompts).long()
        how = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        with torch.no_grad():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        return found[:, ids.shape[1] :].numpy()

    return generate
