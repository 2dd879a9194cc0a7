# SPDX-License-Identifier: Apache-2.0
"""Logical axes of every parameter, by one table of path patterns; `train/mesh.py` says where each axis goes.

Norms and biases that are added to the residual stream stay whole on every device: they are small.
"""

import re
from typing import Any

import jax

AXES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (r"embed/table", ("vocab", "embed")),
    (r"positions/table", (None, "embed")),
    (r"final_norm/(scale|bias)", (None,)),
    (r"head/kernel", ("embed", "vocab")),
    (r"head/lora_a", ("embed", "rank")),
    (r"head/lora_b", ("rank", "vocab")),
    (r"blocks/attention/query/kernel", ("layers", "embed", "heads")),
    (r"blocks/attention/(key|value)/kernel", ("layers", "embed", "kv_heads")),
    (r"blocks/attention/out/kernel", ("layers", "heads", "embed")),
    (r"blocks/attention/(query|key|value)/lora_a", ("layers", "embed", "rank")),
    (r"blocks/attention/query/lora_b", ("layers", "rank", "heads")),
    (r"blocks/attention/(key|value)/lora_b", ("layers", "rank", "kv_heads")),
    (r"blocks/attention/out/lora_a", ("layers", "heads", "rank")),
    (r"blocks/attention/out/lora_b", ("layers", "rank", "embed")),
    (r"blocks/attention/query/bias", ("layers", "heads")),
    (r"blocks/attention/(key|value)/bias", ("layers", "kv_heads")),
    (r"blocks/attention/(query_norm|key_norm)/scale", ("layers", None)),
    (r"blocks/attention/(sink|positions/slope)", ("layers", None)),
    (r"blocks/attention/positions/gap", ("layers", ...)),
    (r"blocks/mlp/(gate|up)/kernel", ("layers", "embed", "mlp")),
    (r"blocks/mlp/down/kernel", ("layers", "mlp", "embed")),
    (r"blocks/mlp/(gate|up)/lora_a", ("layers", "embed", "rank")),
    (r"blocks/mlp/(gate|up)/lora_b", ("layers", "rank", "mlp")),
    (r"blocks/mlp/down/lora_a", ("layers", "mlp", "rank")),
    (r"blocks/mlp/down/lora_b", ("layers", "rank", "embed")),
    (r"blocks/mlp/(gate|up)/bias", ("layers", "mlp")),
    (r"blocks/(attention/out|mlp/down)/bias", ("layers", None)),
    (r"blocks/(attention|mlp)(_post)?_norm/(scale|bias)", ("layers", None)),
    (r"capsule/.*", (...,)),  # small: whole on every device
    (r"plan_decoder/.*", (...,)),
)


def logical_axes(params: Any) -> Any:
    """A tree like `params` whose leaves are tuples of axis names, one a dimension; None is never divided.

    Args:
      params: arrays or shapes, as `Model.init` lays them out, with or without adapters.
    Raises: ValueError naming the parameter that no pattern covers, or whose number of dimensions differs.
    """

    def axes(key_path, leaf):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        for pattern, names in AXES:
            if re.fullmatch(pattern, path):
                if names[-1] is ...:  # any dimensions more, whole
                    return (*names[:-1], *(None,) * (len(leaf.shape) - len(names) + 1))
                if len(names) != len(leaf.shape):
                    raise ValueError(f"parameter {path!r} has shape {leaf.shape}, its axes are {names}")
                return names
        raise ValueError(f"no logical axes for parameter {path!r}: add a row to AXES in jaxlm/nn/axes.py")

    return jax.tree.map_with_path(axes, params)
