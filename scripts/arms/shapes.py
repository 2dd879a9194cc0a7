# SPDX-License-Identifier: Apache-2.0
"""The shapes that are measured, their weights and their batches: NumPy, from fixed seeds, alike in every arm.

Letters: V vocabulary, D width, L layers, N query heads, K key heads, H head width, F inner width, B rows, T tokens.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LEARNING_RATE, B1, B2, EPSILON, DECAY = 1e-4, 0.9, 0.999, 1e-8, 0.01  # of AdamW in every arm; no clipping
NORM_EPSILON = 1e-6
ROPE_BASE = 1_000_000.0  # google-tunix 0.1.7 rotates with this one, whatever its config says


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with an untied head, and its batch; `tolerance` is how far logits may differ between arms."""

    V: int
    D: int
    L: int
    N: int
    K: int
    H: int
    F: int
    B: int
    T: int
    dtype: str = "float32"  # of the computation; weights are float32 masters
    tolerance: float = 1e-4


SHAPES = {
    "tiny": Shape(V=64, D=16, L=2, N=2, K=1, H=8, F=24, B=2, T=16),  # for the tests
    "cpu-s": Shape(V=4096, D=256, L=4, N=4, K=2, H=64, F=688, B=8, T=256),
    "cpu-m": Shape(V=32000, D=512, L=8, N=8, K=4, H=64, F=1376, B=2, T=512),
    # 1.1B parameters, for accelerators
    "1b": Shape(V=32000, D=2048, L=22, N=32, K=4, H=64, F=5632, B=1, T=4096, dtype="bfloat16", tolerance=0.1),
}


def weights(shape: Shape) -> dict[str, Any]:
    """Float32 arrays in jaxlm's names and layout: kernels are (in, out), layers are stacked on the first axis."""
    import numpy as np  # here, so that --help needs no numpy

    rng = np.random.default_rng(0)
    V, D, L, F = shape.V, shape.D, shape.L, shape.F
    queries, keys = shape.N * shape.H, shape.K * shape.H

    def normal(*size: int) -> "np.ndarray":
        values = rng.standard_normal(size, dtype=np.float32)
        values *= 0.02
        return values

    def scale(*size: int) -> dict[str, "np.ndarray"]:
        return {"scale": 1 + normal(*size)}

    sizes = {"query": (D, queries), "key": (D, keys), "value": (D, keys), "out": (queries, D)}
    inner = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    return {
        "embed": {"table": normal(V, D)},
        "final_norm": scale(D),
        "head": {"kernel": normal(D, V)},
        "blocks": {
            "attention": {name: {"kernel": normal(L, *size)} for name, size in sizes.items()},
            "mlp": {name: {"kernel": normal(L, *size)} for name, size in inner.items()},
            "attention_norm": scale(L, D),
            "mlp_norm": scale(L, D),
        },
    }


def batches(shape: Shape) -> Iterator["np.ndarray"]:
    """Endless tokens [B, T] int32; every token is trained on but the first of a row."""
    import numpy as np

    rng = np.random.default_rng(1)
    while True:
        yield rng.integers(0, shape.V, (shape.B, shape.T), dtype=np.int32)
