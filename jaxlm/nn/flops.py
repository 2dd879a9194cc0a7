# SPDX-License-Identifier: Apache-2.0
"""How many floating-point operations a decoder takes: what MFU is reckoned from.  No jax."""

from jaxlm.nn.config import ModelConfig


def model_flops(config: ModelConfig, *, tokens: int, length: int, causal: bool = True) -> float:
    """FLOPs of the matrix products of one forward pass; a multiply and an add are two.

        per token: 2 * (every kernel's entries, the head included) + per layer 4 * N * H * (keys seen, on average)

    A training step takes three times as much: the backward pass has two products for each of the forward one.
    Recomputation (remat) is not counted, so it lowers MFU; norms, rotations and softmax are not counted either.

    Args:
      config: the decoder.
      tokens: in all rows.
      length: of a row; decides how many keys a token sees.
      causal: True counts the keys that a token truly sees, half the row on average, less with a window; False counts
        the whole row, the convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    >>> tiny = ModelConfig(vocab_size=10, width=4, num_layers=1, num_heads=2, mlp_width=8)
    >>> model_flops(tiny, tokens=1, length=1)  # 2 * (4 * 16 + 3 * 32 + 40) + 4 * 4
    416.0
    """
    D, F = config.width, config.mlp_size
    queries, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
    kernels = 2 * D * queries + 2 * D * keys + (3 if config.gated else 2) * D * F
    per_token = 2.0 * (config.num_layers * kernels + D * config.vocab_size)
    seen = sum(keys_seen(length, window) if causal else length for window in config.layer_windows)
    return tokens * (per_token + 4.0 * queries * seen)


def keys_seen(length: int, window: int | None) -> float:
    """Keys that a token of a row sees on average, itself included.

    >>> keys_seen(4, None), keys_seen(4, 2)  # 1 + 2 + 3 + 4 and 1 + 2 + 2 + 2, over 4
    (2.5, 1.75)
    """
    width = length if window is None else min(window, length)
    return (width * (width + 1) / 2 + (length - width) * width) / length
