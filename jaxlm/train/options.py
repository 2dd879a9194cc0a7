# SPDX-License-Identifier: Apache-2.0
"""Numbers of a run, its mesh and its optimizer; no jax, so that configs load at once."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """How many devices each mesh axis gets; one axis may be -1, which takes what is left."""

    data: int = -1  # copies of the model, each with its own rows
    fsdp: int = 1  # rows too, parameters and optimizer state divided
    sequence: int = 1  # the tokens of a row divided, for long rows (docs/long_contexts.md)
    tensor: int = 1  # heads, mlp and vocabulary divided


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One run of the loop."""

    steps: int  # updates
    batch_size: int = 8  # rows an update, over all processes
    micro_batches: int = 1  # parts an update is cut into; divides batch_size
    seed: int = 0
    directory: str = ""  # holds config, metrics, checkpoints and report; "" writes nothing
    log_every: int = 10  # updates between two lines of metrics
    evaluate_every: int = 0  # updates between two evaluations on the way; 0: none, only before and after the run
    save_every: int = 0  # updates between two checkpoints; 0: at the end only
    keep_last: int = 2  # checkpoints kept
    keep_best: str = ""  # an evaluation metric (lower is better) whose best checkpoint is kept too, such as "loss"
    bad_checkpoint: Literal["refuse", "previous"] = "refuse"  # when the newest checkpoint cannot be read
    save_retries: int = 3  # tries after a save that failed, with 1, 2, 4 ... seconds between them
    step_timeout: float = 3600.0  # seconds of one update after which a hanging run ends; elsewhere ten times; 0: never
    compile_cache: str = ""  # a folder of compiled programs, shared by processes and runs; "": what jax is set to
    peak_tflops: float | None = None  # of one device, for MFU; None: known device kinds, else measured
    profile: str = ""  # "20:23": a trace of updates 20, 21 and 22 is written to profile/ in the directory; "": none


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with a schedule (Loshchilov and Hutter 2017, arXiv:1711.05101)."""

    learning_rate: float = 1e-4  # the peak
    schedule: Literal["constant", "linear", "cosine", "wsd"] = (
        "cosine"  # after the warm-up; wsd: stable, then linear decay
    )
    warmup: float = 0.03  # fraction of the steps
    decay: float = 0.2  # fraction of the steps that wsd decays over
    final: float = 0.1  # fraction of the peak that is left at the end
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    decayed: tuple[str, ...] = (r".*/(kernel|table|lora_a|lora_b)",)  # paths that decay; full matches
    clip_norm: float | None = 1.0  # global norm of the gradient; None: no clipping
