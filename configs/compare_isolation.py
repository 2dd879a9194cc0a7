# SPDX-License-Identifier: Apache-2.0
"""Does isolating parameters help? Every method of isolation, its controls and its neighbours, on the same updates.

  python scripts/compare.py configs/compare_isolation.py

A model of a million parameters learns four exercises on strings of digits; then each arm teaches it four more, one
after the other, 60 updates each, or all at once. Every arm has the same tokens, its own learning rate of four, three
seeds of data order. About an hour on two CPU cores; the same command goes on where it was stopped. Results:
docs/results_isolation.md.
"""

import dataclasses
from typing import Any

from jaxlm.config import Comparison, RunConfig
from jaxlm.data import DataConfig, Procedural, Task
from jaxlm.methods import CpiFt, Dpi, Epi, Ewc, MultiStage, Sft
from jaxlm.nn import Lora, ModelConfig
from jaxlm.train import AdamW, RunOptions

OLD = ("copying", "mirroring", "ascending", "increment")
NEW = ("decrement", "rotation", "descending", "complement")
DIRECTORY = "runs/compare_isolation"


def exercises(generator: str, *, trained: bool) -> Task:
    """A task with 200 held-out exercises."""
    return Task(
        name=generator,
        train=Procedural(generator=generator, size=20_000) if trained else None,
        test=Procedural(generator=generator, size=200, seed=1),
    )


def get_comparison() -> Comparison:
    """The comparison."""
    sft = Sft(optimizer=AdamW(clip_norm=1.0, warmup=0.05))
    epi = Epi(sft=sft, fraction=0.5, refresh_every=20, warmup=20, decay=0.95)
    dpi = Dpi(sft=sft, fraction=0.2, order="given", groups="separate", probe_steps=60)
    model = ModelConfig(vocab_size=272, width=128, num_layers=4, num_heads=4, mlp_width=384, max_length=64)

    def staged(**options: Any) -> MultiStage:
        return MultiStage(method=dataclasses.replace(epi, **options))

    return Comparison(
        base=RunConfig(
            model=model,
            tokenizer="bytes",
            data=DataConfig(tasks=tuple(exercises(name, trained=True) for name in OLD), length=64),
            method=Sft(optimizer=AdamW(learning_rate=2e-3)),
            run=RunOptions(steps=600, batch_size=16, log_every=100),
        ),
        run=RunConfig(
            model=model,
            tokenizer="bytes",
            data=DataConfig(
                tasks=tuple(exercises(name, trained=name in NEW) for name in (*OLD, *NEW)),
                length=64,
            ),
            method=sft,
            run=RunOptions(steps=240, batch_size=16, log_every=10, directory=DIRECTORY),
        ),
        arms={
            "joint SFT": sft,
            "joint EPI": epi,
            "joint EPI, random": dataclasses.replace(epi, select="random"),
            "stages": MultiStage(method=sft),
            "stages, 10 % replayed": MultiStage(method=sft, replay=0.1),
            "static": staged(refresh_every=None),
            "EPI": staged(),
            "EPI, Adam's nu": staged(importance_source="adam_nu"),
            "EPI, by task": staged(per_task=True),
            "EPI, random": staged(select="random"),
            "DPI": dpi,
            "DPI, random": dataclasses.replace(dpi, cores="random"),
            "CPI-FT": CpiFt(dpi=dpi),
            "half held": MultiStage(method=sft, hold_random=0.5),
            "EWC": Ewc(sft=sft),
            "LoRA": MultiStage(method=Sft(optimizer=sft.optimizer, lora=Lora(rank=8, alpha=16.0))),
        },
        learning_rates=(1e-4, 3e-4, 1e-3, 3e-3),
        scale={"LoRA": 3.0},
        seeds=(0, 1, 2),
        plain="stages",
        controls={
            "EPI": "EPI, random",
            "EPI, Adam's nu": "EPI, random",
            "EPI, by task": "EPI, random",
            "static": "EPI, random",
            "joint EPI": "joint EPI, random",
            "DPI": "DPI, random",
            "CPI-FT": "stages, 10 % replayed",
        },
        joint="joint SFT",
    )
