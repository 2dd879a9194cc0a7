# SPDX-License-Identifier: Apache-2.0
"""R-Capsule from nothing on scrambled recipes: the order of work in two latent tokens, the running values as text.

  python scripts/train.py configs/r_capsule.py
  python scripts/train.py configs/r_capsule.py method.num_capsules=4 run.directory=runs/r_capsule_4
  python scripts/generate.py runs/r_capsule --explain --temperature 0 "12: c*3 a+7 b-4="

Not yet trained to its end: docs/methods/r_capsule.md says what was tried.
"""

from jaxlm.config import RunConfig
from jaxlm.data import DataConfig, ProceduralPlans, Task
from jaxlm.evaluation_options import Generation
from jaxlm.generate.engine import Sampling
from jaxlm.methods import RCapsule, Sft
from jaxlm.nn import ModelConfig
from jaxlm.train import AdamW, RunOptions

TASK = Task(
    name="recipe",
    train=ProceduralPlans(generator="recipe", size=50_000),
    test=ProceduralPlans(generator="recipe", size=200, seed=1),
)


def get_config() -> RunConfig:
    """The run."""
    return RunConfig(
        model=ModelConfig(vocab_size=264, width=128, num_layers=4, num_heads=4, max_length=256),
        tokenizer="bytes",
        data=DataConfig(tasks=(TASK,), length=96, packing="none"),
        method=RCapsule(
            sft=Sft(optimizer=AdamW(learning_rate=1e-3, warmup=0.05)),
            num_capsules=2,
            capsule_width=32,
            decoder_width=128,
            max_plan=32,
            keep_decoder=True,
        ),
        run=RunOptions(steps=2000, batch_size=64, log_every=50, save_every=500, directory="runs/r_capsule"),
        generation=Generation(sampling=Sampling(temperature=0.0, max_tokens=32), records=200, slots=64),
    )
