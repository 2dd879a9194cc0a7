# SPDX-License-Identifier: Apache-2.0
"""Elastic weight consolidation over four exercises in turn: a soft pull where isolation holds.

  python scripts/train.py configs/quickstart.py
  python scripts/train.py configs/ewc.py

The strength is not tuned.
"""

from jaxlm.config import Pretrained, RunConfig
from jaxlm.data import DataConfig, Procedural, Task
from jaxlm.methods import Ewc, Sft
from jaxlm.train import AdamW, RunOptions


def exercises(generator: str, *, trained: bool = True, **options: int) -> Task:
    """A task with 200 held-out exercises; what the quickstart taught is only looked at."""
    return Task(
        name=generator,
        train=Procedural(generator=generator, size=20_000, options=options) if trained else None,
        test=Procedural(generator=generator, size=200, seed=1, options=options),
    )


def get_config() -> RunConfig:
    """The run."""
    return RunConfig(
        model=Pretrained(path="runs/quickstart/model"),
        data=DataConfig(
            tasks=(
                exercises("sorting", trained=False, count=5),
                exercises("reversal", trained=False, length=5),
                exercises("maximum", trained=False, count=3),
                exercises("decrement"),
                exercises("rotation"),
                exercises("descending"),
                exercises("complement"),
            ),
            length=64,
        ),
        method=Ewc(sft=Sft(optimizer=AdamW(learning_rate=1e-3, warmup=0.05))),
        run=RunOptions(steps=480, batch_size=16, save_every=120, directory="runs/ewc"),
    )
