# SPDX-License-Identifier: Apache-2.0
"""What a plan is good for: not at all, as text, in a capsule; with its controls, sweeps and a neighbour.

  python scripts/compare.py configs/compare_capsule.py
  python scripts/compare.py configs/compare_capsule.py --report       (what is there so far)

Not run yet: the table of docs/methods/r_capsule.md is to come from it. Every arm starts from the same random decoder of
4 layers, sees the same recipes and makes as many updates.
"""

import dataclasses

from jaxlm.config import PlanComparison, RunConfig
from jaxlm.data import DataConfig, ProceduralPlans, Task
from jaxlm.generate.engine import Sampling
from jaxlm.methods import RCapsule, Sft
from jaxlm.nn import ModelConfig
from jaxlm.train import AdamW, RunOptions

HARDER = {"least": 7, "most": 8}
PLAIN = RCapsule(
    sft=Sft(optimizer=AdamW(warmup=0.05)), num_capsules=0, capsule_width=32, decoder_width=128, max_plan=32, bucket=8
)
CAPSULE = dataclasses.replace(PLAIN, num_capsules=2, keep_decoder=True)
UNREAD = dataclasses.replace(CAPSULE, recon="none", keep_decoder=False)


def recipes(size: int, seed: int, **options: int) -> ProceduralPlans:
    """Exercises of one seed."""
    return ProceduralPlans(generator="recipe", size=size, seed=seed, options=options)


def get_comparison() -> PlanComparison:
    """The comparison."""
    sweeps = {
        "capsule, K = 1": dataclasses.replace(CAPSULE, num_capsules=1),
        "capsule, K = 4": dataclasses.replace(CAPSULE, num_capsules=4),
        "capsule, K = 8": dataclasses.replace(CAPSULE, num_capsules=8),
        "capsule, d = 8": dataclasses.replace(CAPSULE, capsule_width=8),
        "capsule, d = 64": dataclasses.replace(CAPSULE, capsule_width=64),
        "capsule, lambda = 1": dataclasses.replace(CAPSULE, recon_weight=1.0),
        "capsule, bare": dataclasses.replace(CAPSULE, embed_scale="none"),
        "capsule, parallel": dataclasses.replace(CAPSULE, mode="parallel"),
        "capsule, no steps": dataclasses.replace(CAPSULE, targets="answer"),
    }
    return PlanComparison(
        run=RunConfig(
            model=ModelConfig(vocab_size=264, width=128, num_layers=4, num_heads=4, max_length=256),
            tokenizer="bytes",
            data=DataConfig(
                tasks=(Task(name="recipe", train=recipes(50_000, 0), test=recipes(200, 1)),),
                length=128,
                packing="none",
            ),
            method=PLAIN,
            run=RunOptions(steps=2000, batch_size=64, log_every=50, directory="runs/compare_capsule"),
        ),
        arms={
            "answer only": dataclasses.replace(PLAIN, targets="answer"),
            "CoT-SFT": PLAIN,
            "Plan-SFT": dataclasses.replace(PLAIN, targets="plan_steps_and_answer"),
            "capsule": CAPSULE,
            "capsule, no reconstruction": UNREAD,
            "pause tokens": dataclasses.replace(UNREAD, source="pause"),
            "hidden states fed back": dataclasses.replace(UNREAD, source="hidden"),
            **sweeps,
        },
        follows={name: "capsule" for name in ("capsule, no reconstruction", "pause tokens", *sweeps)},
        learning_rates=(5e-4, 1e-3, 2e-3),
        seeds=(0, 1, 2),
        plain="CoT-SFT",
        chosen_on=recipes(200, 1),
        tests={"held out": recipes(1000, 2), "7 to 8 operations": recipes(1000, 2, **HARDER)},
        sampling=Sampling(temperature=0.0, max_tokens=64),
    )
