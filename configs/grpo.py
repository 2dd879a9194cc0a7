# SPDX-License-Identifier: Apache-2.0
"""GRPO on top of the quickstart's model: the maximum of more numbers than it was taught.

  python scripts/train.py configs/quickstart.py
  python scripts/train.py configs/grpo.py

Nine minutes on two busy CPU cores: held-out exact match rises from 69 % to 80 % for four numbers, from 44 % to 76 % for
six.
"""

from jaxlm.config import Pretrained, RunConfig
from jaxlm.data import DataConfig, Procedural, Task
from jaxlm.methods import Grpo
from jaxlm.train import AdamW, RunOptions


def exercises(name: str, count: int) -> Task:
    """A task with 200 held-out exercises, none of which the quickstart has seen."""
    options = {"count": count}
    return Task(
        name=name,
        train=Procedural(generator="maximum", size=20_000, seed=2, options=options),
        test=Procedural(generator="maximum", size=200, seed=3, options=options),
    )


def get_config() -> RunConfig:
    """The run."""
    return RunConfig(
        model=Pretrained(path="runs/quickstart/model"),
        data=DataConfig(tasks=(exercises("four", 4), exercises("six", 6)), length=32, packing="none"),
        method=Grpo(
            optimizer=AdamW(learning_rate=1e-4, warmup=0.1),
            group_size=8,
            max_tokens=6,
            normalize="none",
            clip_high=0.28,
            kl=0.01,
        ),
        run=RunOptions(steps=150, batch_size=128, evaluate_every=50, save_every=50, directory="runs/grpo"),
    )
