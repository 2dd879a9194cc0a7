# SPDX-License-Identifier: Apache-2.0
"""Merges small made-up tensors with mergekit and stores the results that `test_task_vectors` and others compare with.

python3.11 -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5 torch==2.13.0
mergekit/bin/python tests/weights/make_golden.py

DARE drops at random: torch's draw is replaced by one of ours, stored beside the results.
"""

from pathlib import Path

import numpy as np
import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup
from safetensors.numpy import save_file

TARGET = Path(__file__).parent / "golden" / "mergekit.safetensors"
SHAPES = {"table": (11, 8), "scale": (8,), "kernel": (8, 12)}
WEIGHTS = {"one": 0.7, "two": 0.5, "three": -0.2}


def inputs() -> dict[str, np.ndarray]:
    """A base and three models of it, one of them far away."""
    draw = np.random.default_rng(0)
    tensors = {}
    for name, shape in SHAPES.items():
        base = draw.standard_normal(shape, np.float32)
        tensors[f"base/{name}"] = base
        for model, step in (("one", 0.05), ("two", 0.1), ("three", 2.0)):
            tensors[f"{model}/{name}"] = base + np.float32(step) * draw.standard_normal(shape, np.float32)
    return tensors


def merge(method: str, tensors: dict[str, np.ndarray], models: tuple[str, ...], base: str | None, **parameters):
    """One result a tensor name."""
    out = {}
    for name in SHAPES:
        given = ([base] if base else []) + list(models)
        group = TensorGroup.from_tensors(
            [torch.from_numpy(tensors[f"{model}/{name}"]) for model in given],
            ids=given,
            base_index=0 if base else None,
            name=name,
        )
        torch.manual_seed(len(name))
        (result,) = registry.get(method)([group], parameters=parameters)
        out[name] = result.numpy()
    return out


def main() -> None:
    """Writes the file."""
    tensors = inputs()
    models = tuple(WEIGHTS)
    given = {"weight": dict(WEIGHTS)}
    cases = {
        "linear": merge("linear", tensors, models, None, **given),
        "sum": merge("linear", tensors, models, None, normalize=False, **given),
        "slerp": merge("slerp", tensors, ("three",), "one", t=0.3),
        "slerp_near": merge("slerp", tensors, ("one",), "base", t=0.3),
        "task_arithmetic": merge("task_arithmetic", tensors, models, "base", **given, **{"lambda": 1.5}),
        "ties": merge("ties", tensors, models, "base", density=dict.fromkeys(models, 0.4), **given),
        "ties_sum": merge(
            "ties", tensors, models, "base", density=dict.fromkeys(models, 0.4), normalize=False, **given
        ),
    }
    keeps: dict[str, np.ndarray] = {}
    drawn: list[torch.Tensor] = []

    def bernoulli(chances: torch.Tensor) -> torch.Tensor:
        drawn.append((torch.rand(chances.shape) < chances).to(chances.dtype))
        return drawn[-1]

    torch.bernoulli = bernoulli
    for method in ("dare_linear", "dare_ties"):
        drawn.clear()
        cases[method] = merge(method, tensors, models, "base", density=dict.fromkeys(models, 0.6), **given)
        order = [(model, name) for name in SHAPES for model in models]
        keeps |= {f"kept/{m}/{n}": keep.numpy() != 0 for (m, n), keep in zip(order, drawn, strict=True)}
    results = {f"{case}/{name}": result for case, tensors_ in cases.items() for name, result in tensors_.items()}
    save_file(tensors | results | keeps, TARGET)
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
