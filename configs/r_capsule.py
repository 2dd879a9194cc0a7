# SPDX-License-Identifier: Apache-2.0
"""R-Capsule from nothing on scrambled recipes: the order of work in two latent tokens, the running values as text.

  python scripts/train.py configs/r_capsule.py
  python scripts/train.py configs/r_capsule.py method.num_capsules=4 run.directory=runs/r_capsule_4
  python scripts/generate.py runs/r_capsule --explain --temperature 0 --max-tokens 32 "7: c*3 a+8 b-4="

It took about 11 minutes on two CPU cores beside other work. docs/methods/r_capsule.md compares it with ways to do
without a capsule.
"""

from jaxlm.config import RunConfig
from jaxlm.data import DataConfig, ProceduralPlans, Task
from jaxlm.evaluation_options import Generation
from jaxlm.generate.engine import Sampling
from jaxlm.methods import RCapsule, Sft
from jaxlm.nn import ModelConfig
from jaxlm.train import AdamW, RunOptions

EASY = {"least": 2, "most": 4, "keys": 6, "modulus": 10}
TASK = Task(
    name="recipe",
    train=ProceduralPlans(generator="recipe", size=50_000, options=EASY),
    test=ProceduralPlans(generator="recipe", size=200, seed=1, options=EASY),
)


def get_config() -> RunConfig:
    """The run."""
    return RunConfig(
        model=ModelConfig(vocab_size=264, width=64, num_layers=4, num_heads=4, max_length=256),
        tokenizer="bytes",
        data=DataConfig(tasks=(TASK,), length=96, packing="none"),
        method=RCapsule(
            sft=Sft(optimizer=AdamW(learning_rate=2e-3, warmup=0.05)),
            num_capsules=2,
            capsule_width=32,
            decoder_layers=1,
            decoder_width=64,
            max_plan=32,
            keep_decoder=True,
            bucket=8,
        ),
        run=RunOptions(steps=1200, batch_size=64, log_every=50, save_every=400, directory="runs/r_capsule"),
        generation=Generation(sampling=Sampling(temperature=0.0, max_tokens=32), records=200, slots=64),
    )
