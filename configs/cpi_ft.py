# SPDX-License-Identifier: Apache-2.0
"""CPI-FT on four exercises: DPI's cores and stages, the separately tuned models fused in, a short integration.

  python scripts/train.py configs/quickstart.py
  python scripts/train.py configs/cpi_ft.py

The probes come on top of the 480 updates that every config of this family has. Under two minutes on one CPU core; the
four end at 84, 97, 48 and 67 % exact match, mostly because the integration sees all of them again
(docs/results_isolation.md).
"""

from jaxlm.config import Pretrained, RunConfig
from jaxlm.data import DataConfig, Procedural, Task
from jaxlm.methods import CpiFt, Dpi, Sft
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
        method=CpiFt(dpi=Dpi(sft=Sft(optimizer=AdamW(learning_rate=1e-3, warmup=0.05)), fraction=0.1, probe_steps=60)),
        run=RunOptions(steps=480, batch_size=16, save_every=120, directory="runs/cpi_ft"),
    )
