# SPDX-License-Identifier: Apache-2.0
"""A small decoder learns three exercises from nothing: sorting digits, reversing words, finding the maximum.

python scripts/train.py configs/quickstart.py
"""

from jaxlm.config import RunConfig
from jaxlm.data import DataConfig, Procedural, Task
from jaxlm.methods import Sft
from jaxlm.nn import ModelConfig
from jaxlm.train import AdamW, RunOptions


def exercises(generator: str, **options: int) -> Task:
    """A task whose held-out exercises are drawn from another seed; those seen in training are dropped."""
    return Task(
        name=generator,
        train=Procedural(generator=generator, size=20_000, seed=0, options=options),
        test=Procedural(generator=generator, size=200, seed=1, options=options),
    )


def get_config() -> RunConfig:
    """The run."""
    return RunConfig(
        model=ModelConfig(vocab_size=272, width=128, num_layers=4, num_heads=4, mlp_width=384, max_length=256),
        tokenizer="bytes",
        data=DataConfig(
            tasks=(exercises("sorting", count=5), exercises("reversal", length=5), exercises("maximum", count=3)),
            length=128,
        ),
        method=Sft(optimizer=AdamW(learning_rate=3e-3, weight_decay=0.01)),
        run=RunOptions(steps=200, batch_size=32, evaluate_every=50, save_every=100, directory="runs/quickstart"),
    )
