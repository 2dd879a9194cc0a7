# SPDX-License-Identifier: Apache-2.0
"""google-tunix: its Llama 3 model and its own sampler, greedy.

Runs in an environment of its own and so imports nothing of jaxlm.
"""

import numpy as np
from tunix.generate import sampler as tunix_sampler

from arms import tunix_trainer
from arms.shapes import Shape


class Ids:
    """A tokenizer whose texts are token ids; what the sampler asks of one."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """A text of ids."""
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        """0: none is put before."""
        return 0

    def eos_id(self) -> int:
        """No token ends a text."""
        return -1

    def pad_id(self) -> int:
        """Not in any prompt."""
        return 0


def build(shape: Shape, num_slots: int):
    """(prompts [B, T], new tokens) -> tokens [B, new]."""
    model = tunix_trainer.model_of(shape)
    samplers = {}

    def generate(prompts: np.ndarray, new: int) -> np.ndarray:
        size = prompts.shape[1] + new
        if size not in samplers:
            cache = tunix_sampler.CacheConfig(size, shape.L, shape.K, shape.H)
            samplers[size] = tunix_sampler.Sampler(model, Ids(), cache)
        texts = [" ".join(map(str, row)) for row in prompts.tolist()]
        found = samplers[size](texts, max_generation_steps=new, max_prompt_length=prompts.shape[1])
        return np.stack([np.asarray(row)[:new] for row in found.tokens])

    return generate
