# SPDX-License-Identifier: Apache-2.0
"""What becomes of a model trained on 256 tokens when it reads 16,384: every kind of positions on the same text.

  python scripts/compare.py configs/compare_positions.py

A model of 0.4 million parameters learns bytes of the documentation that comes with Python, 300 updates of 8 x 256; the
last tenth of the text is read in windows of each length. Arms differ in `positions` alone (one has a sink as well).
About 4 minutes an arm on a CPU core of its own, four training runs each; the same command goes on where it was
stopped. For books in place of the documentation see docs/comparing.md; results: docs/results_positions.md.
"""

from typing import Any

from jaxlm.config import LengthComparison, RunConfig
from jaxlm.data import DataConfig, LongText, Task
from jaxlm.methods import Sft
from jaxlm.nn import Alibi, Hope, ModelConfig, Nope, Rope, Xpos
from jaxlm.nn.position_kinds import Positions
from jaxlm.train import AdamW, RunOptions

LENGTH = 256


def model(positions: Positions, **options: Any) -> ModelConfig:
    """The decoder that all arms share but for its positions."""
    size: Any = {
        "vocab_size": 272,
        "width": 128,
        "num_layers": 2,
        "num_heads": 2,
        "mlp_width": 344,
        "max_length": LENGTH,
    }
    return ModelConfig(positions=positions, **size, **options)


def get_comparison() -> LengthComparison:
    """The comparison."""
    text = Task(
        name="text",
        train=LongText(end=0.85),
        test=LongText(begin=0.85, end=0.9),  # rates are chosen on it
    )
    return LengthComparison(
        run=RunConfig(
            model=model(Rope()),
            tokenizer="bytes",
            data=DataConfig(tasks=(text,), length=LENGTH, on_long="split"),
            method=Sft(optimizer=AdamW(warmup=0.075, final=0.067, weight_decay=0.01)),
            run=RunOptions(steps=300, batch_size=8, log_every=50, directory="runs/compare_positions"),
        ),
        arms={
            "RoPE": model(Rope()),
            "HoPE per pair 0.05": model(Hope(theta_scale=0.05, damping="per_pair")),
            "ALiBi": model(Alibi()),
            "HoPE global 0.05": model(Hope(theta_scale=0.05)),
            "HoPE per pair 0.05, ALiBi": model(Hope(theta_scale=0.05, damping="per_pair", slopes="alibi")),
            "NoPE": model(Nope()),
            "xPos": model(Xpos()),
            "HoPE per pair 0.3": model(Hope(theta_scale=0.3, damping="per_pair")),
            "HoPE per pair 0.05, sink": model(Hope(theta_scale=0.05, damping="per_pair"), attention_sink=True),
            "HoPE mixed 0.05": model(Hope(theta_scale=0.05, damping="per_pair", rotating=0.5)),
            "HoPE mixed 0.05, ALiBi": model(Hope(theta_scale=0.05, damping="per_pair", rotating=0.75, slopes="alibi")),
            "RoPE and ALiBi": model(Hope(theta_scale=1e-9, rotating=1.0, slopes="alibi")),  # no decay: the control
            "HoPE learned gap 0.05": model(
                Hope(theta_scale=0.05, damping="per_pair", learn_gap="head", gap_max=1.0),
            ),
            "HoPE global 0.05, ALiBi": model(Hope(theta_scale=0.05, slopes="alibi")),
            "HoPE per pair 0.3, ALiBi": model(Hope(theta_scale=0.3, damping="per_pair", slopes="alibi")),
            "HoPE literal": model(Hope(theta_scale=1.0, gap=1e-4)),  # RoPE's frequencies as rapidities
        },
        yarn={"RoPE, YaRN at test": "RoPE"},
        learning_rates=(1.5e-3, 4e-3, 1e-2),
        seeds=(0, 1),
        plain="RoPE",
        text=LongText(begin=0.9),
        lengths=(LENGTH, 512, 1024, 2048, 4096, 16384),
        tokens=32768,
    )
