# SPDX-License-Identifier: Apache-2.0
"""The feed-forward block, gated or plain.  D width, F inner width."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from jaxlm.nn.config import ModelConfig
from jaxlm.nn.dense import dense

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def mlp(p: Mapping[str, Any], x: jax.Array, config: ModelConfig) -> jax.Array:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) when not gated.

    Args:
      p: `up`, `down` and, when gated, `gate`, each the parameters of a `dense`.
      x: [..., D].
      config: reads `activation`, `gated` and `adapter_scale`.
    Returns: [..., D] in the dtype of `x`.

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    activation = ACTIVATIONS[config.activation]
    up = dense(p["up"], x, config.adapter_scale)
    if config.gated:
        up = activation(dense(p["gate"], x, config.adapter_scale)) * up
    else:
        up = activation(up)
    return dense(p["down"], up, config.adapter_scale)
