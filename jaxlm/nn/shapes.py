# SPDX-License-Identifier: Apache-2.0
"""Which parameters a configuration has: one table from path to shape and initial value.  Letters as in `config`."""

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.config import ModelConfig
from jaxlm.nn.hope import gap_leaf
from jaxlm.nn.position_kinds import Hope, Learned
from jaxlm.nn.positions import alibi_slopes
from jaxlm.weights.names import nested


class Leaf(NamedTuple):
    """One parameter before it exists.

    Attributes:
      shape: without the layer axis.
      spread: standard deviation of its initial values; 0 makes it constant.
      mean: their mean, a number or an array of the shape.
    """

    shape: tuple[int, ...]
    spread: float
    mean: float | np.ndarray = 0.0


def norm_leaves(path: str, width: int, config: ModelConfig) -> dict[str, Leaf]:
    """A normalisation that starts by multiplying with one."""
    leaves = {f"{path}/scale": Leaf((width,), 0.0, 1.0 - config.norm_offset)}
    return leaves | ({f"{path}/bias": Leaf((width,), 0.0)} if config.norm == "layer" else {})


def dense_leaves(path: str, inputs: int, outputs: int, *, bias: bool, gain: float = 1.0) -> dict[str, Leaf]:
    """A linear map that keeps the size of its input times `gain`."""
    leaves = {f"{path}/kernel": Leaf((inputs, outputs), gain * inputs**-0.5)}
    return leaves | ({f"{path}/bias": Leaf((outputs,), 0.0)} if bias else {})


def attention_leaves(config: ModelConfig) -> dict[str, Leaf]:
    """Parameters of one attention branch; the way back into the residual stream starts small, as in GPT-2."""
    D, H, bias = config.width, config.head_size, config.attention_bias
    N, K = config.num_heads, config.kv_heads
    leaves = dense_leaves("query", D, N * H, bias=bias)
    leaves |= dense_leaves("key", D, K * H, bias=bias)
    leaves |= dense_leaves("value", D, K * H, bias=bias)
    gain = (2 * config.num_layers) ** -0.5
    leaves |= dense_leaves("out", N * H, D, bias=config.attention_out_bias, gain=gain)
    if config.query_key_norm != "none":
        full = config.query_key_norm == "full"
        leaves["query_norm/scale"] = Leaf((N * H if full else H,), 0.0, 1.0 - config.norm_offset)
        leaves["key_norm/scale"] = Leaf((K * H if full else H,), 0.0, 1.0 - config.norm_offset)
    return leaves | mixing_leaves(config)


def mixing_leaves(config: ModelConfig) -> dict[str, Leaf]:
    """What is learned between the projections of one layer: a sink, a gap, slopes, where configured."""
    kind = config.positions
    leaves = {"sink": Leaf((config.num_heads,), 0.0)} if config.attention_sink else {}
    if isinstance(kind, Hope) and kind.learn_gap != "fixed":
        leaves["positions/gap"] = Leaf((config.kv_heads,) if kind.learn_gap == "head" else (), 0.0, gap_leaf(kind))
    if isinstance(kind, Hope) and kind.slopes == "learned":  # a softplus away from ALiBi's
        leaves["positions/slope"] = Leaf((config.num_heads,), 0.0, np.log(np.expm1(alibi_slopes(config.num_heads))))
    return leaves


def mlp_leaves(config: ModelConfig) -> dict[str, Leaf]:
    """Parameters of one feed-forward branch."""
    D, F, bias = config.width, config.mlp_size, config.mlp_bias
    leaves = dense_leaves("gate", D, F, bias=bias) if config.gated else {}
    leaves |= dense_leaves("up", D, F, bias=bias)
    return leaves | dense_leaves("down", F, D, bias=bias, gain=(2 * config.num_layers) ** -0.5)


def block_leaves(config: ModelConfig) -> dict[str, Leaf]:
    """Parameters of one layer."""
    leaves = {f"attention/{path}": leaf for path, leaf in attention_leaves(config).items()}
    leaves |= {f"mlp/{path}": leaf for path, leaf in mlp_leaves(config).items()}
    for branch in ("attention", "mlp"):
        if config.norm_placement in ("pre", "both"):
            leaves |= norm_leaves(f"{branch}_norm", config.width, config)
        if config.norm_placement in ("post", "both"):
            leaves |= norm_leaves(f"{branch}_post_norm", config.width, config)
    return leaves


def decoder_leaves(config: ModelConfig) -> dict[str, Leaf]:
    """Parameters of the whole decoder; those under `blocks/` with their leading layer axis."""
    D, spread = config.width, config.width**-0.5
    leaves = {"embed/table": Leaf((config.vocab_size, D), spread)}
    if isinstance(config.positions, Learned):
        leaves["positions/table"] = Leaf((config.max_length, D), spread)
    for path, leaf in block_leaves(config).items():
        leaves[f"blocks/{path}"] = leaf._replace(shape=(config.num_layers, *leaf.shape))
    leaves |= norm_leaves("final_norm", D, config)
    if not config.tied:
        leaves |= dense_leaves("head", D, config.vocab_size, bias=False)
    return leaves


def initialise(leaves: dict[str, Leaf], key: jax.Array) -> dict[str, Any]:
    """A nested dict of float32 arrays.  Each leaf's values depend on `key` and its own path only."""

    def values(path: str, leaf: Leaf) -> Any:
        if not leaf.spread:
            return jnp.broadcast_to(jnp.asarray(leaf.mean, jnp.float32), leaf.shape)
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return leaf.mean + leaf.spread * jax.random.normal(leaf_key, leaf.shape, jnp.float32)

    return nested({path: values(path, leaf) for path, leaf in leaves.items()})


def count(leaves: dict[str, Leaf]) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in leaves.values())
