# SPDX-License-Identifier: Apache-2.0
"""What a plan is good for: not at all, as text, in a capsule; with its controls, sweeps and a neighbour.

  python scripts/compare.py configs/compare_capsule.py
  python scripts/compare.py configs/compare_capsule.py --report

Every arm starts from the same random decoder of 4 layers, sees the same recipes (2 to 4 operations on numbers below 10)
and makes as many updates. A training run took 3.4 to 8.3 minutes on two CPU cores beside other work.
"""

import dataclasses

from jaxlm.config import PlanComparison, RunConfig
from jaxlm.data import DataConfig, ProceduralPlans, Task
from jaxlm.generate.engine import Sampling
from jaxlm.methods import RCapsule, Sft
from jaxlm.nn import ModelConfig
from jaxlm.train import AdamW, RunOptions

EASY = {"least": 2, "most": 4, "keys": 6, "modulus": 10}
HARDER = {**EASY, "least": 5, "most": 6}
PLAIN = RCapsule(
    sft=Sft(optimizer=AdamW(warmup=0.05)),
    num_capsules=0,
    capsule_width=32,
    decoder_layers=1,
    decoder_width=64,
    max_plan=32,
    bucket=8,
)
CAPSULE = dataclasses.replace(PLAIN, num_capsules=2, keep_decoder=True)
UNREAD = dataclasses.replace(CAPSULE, recon="none", keep_decoder=False)


def recipes(size: int, seed: int, **options: int) -> ProceduralPlans:
    """Exercises of one seed."""
    return ProceduralPlans(generator="recipe", size=size, seed=seed, options=EASY | options)


def get_comparison() -> PlanComparison:
    """The comparison."""
    told = {
        "CoT-SFT, spelled out": PLAIN,
        "Plan-SFT": dataclasses.replace(PLAIN, targets="plan_steps_and_answer"),
        "capsule": CAPSULE,
        "capsule, no reconstruction": UNREAD,
        "capsule, d = 8": dataclasses.replace(CAPSULE, capsule_width=8),
    }
    untold = {
        "answer only": PLAIN,
        "no steps: capsule": CAPSULE,
        "no steps: capsule, K = 4": dataclasses.replace(CAPSULE, num_capsules=4),
        "no steps: capsule, no reconstruction": UNREAD,
        "no steps: pause tokens": dataclasses.replace(UNREAD, source="pause"),
        "no steps: hidden states fed back": dataclasses.replace(UNREAD, source="hidden"),
    }
    untold = {name: dataclasses.replace(method, targets="answer") for name, method in untold.items()}
    return PlanComparison(
        run=RunConfig(
            model=ModelConfig(vocab_size=264, width=64, num_layers=4, num_heads=4, max_length=256),
            tokenizer="bytes",
            data=DataConfig(
                tasks=(Task(name="recipe", train=recipes(50_000, 0), test=recipes(200, 1)),),
                length=96,
                packing="none",
            ),
            method=PLAIN,
            run=RunOptions(steps=1200, batch_size=64, log_every=20, directory="runs/compare_capsule"),
        ),
        arms={
            "CoT-SFT": PLAIN,
            **told,
            **untold,
        },
        follows={name: "CoT-SFT" for name in (*told, *untold)},
        learns_from={"CoT-SFT, spelled out": recipes(50_000, 0, spelled=True)},
        learning_rates=(1e-3, 2e-3, 4e-3),
        seeds=(0, 1),
        plain="CoT-SFT",
        chosen_on=recipes(200, 1),
        tests={"held out": recipes(400, 2), "5 to 6 operations": recipes(400, 2, **HARDER)},
        sampling=Sampling(temperature=0.0, max_tokens=64),
    )
