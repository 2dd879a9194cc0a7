# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of every family, made by transformers and torch, with the logits they should give.

  python tests/checkpoints/make_golden.py        # rewrites tests/checkpoints/golden; needs torch

Weights are rounded to bfloat16 (half the bytes, and the cast on load is tested); logits come from them in float32.
"""

import pathlib
import sys

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"

SMALL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

VARIANTS = {
    "llama": ("LlamaConfig", SMALL | {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "llama_tied": ("LlamaConfig", SMALL | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama_scaled": ("LlamaConfig", SMALL | {"tie_word_embeddings": True, "head_dim": 12, "rope_parameters": LLAMA3}),
    "llama_linear": (
        "LlamaConfig",
        SMALL | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}, "hidden_act": "gelu"},
    ),
    "llama_bias": ("LlamaConfig", SMALL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", SMALL | {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("Qwen2Config", SMALL | {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2Config",
        SMALL | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 12, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2Config", SMALL),
    "gemma2": (
        "Gemma2Config",
        SMALL
        | {
            "num_hidden_layers": 3,
            "head_dim": 12,
            "query_pre_attn_scalar": 10,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 64,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 28,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
}


def make_model(name: str, *, seed: int = 0, rounded: bool = False):
    """A transformers model of a variant with weights far from their initial values, so that no part is silent.

    rounded: to numbers that bfloat16 holds; the model is float32 all the same.
    """
    import torch  # here, because the newest Python has none
    import transformers

    kind, fields = VARIANTS[name]
    config = getattr(transformers, kind)(**fields)
    config._attn_implementation = "eager"  # soft caps exist only there
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    for path, parameter in model.named_parameters():
        is_norm = parameter.ndim == 1 and not path.endswith("bias")
        centre = 1.0 if is_norm and name != "gemma2" else 0.0  # Gemma stores the distance from one
        scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
        values = centre + scale * torch.randn_like(parameter)
        parameter.data = (values.bfloat16() if rounded else values).float()
    return model


def make_batch(*, vocab: int = 64, length: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    """Three rows: one long text; two texts packed, then padding; padding on the left. Segment 0 is padding."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((3, length), np.int32)
    positions = np.zeros((3, length), np.int32)
    for row, segment, start, stop in ((0, 1, 0, length), (1, 1, 0, 9), (1, 2, 9, 17), (2, 1, 6, length)):
        segments[row, start:stop] = segment
        positions[row, start:stop] = np.arange(stop - start)
    tokens = rng.integers(3, vocab, (3, length)).astype(np.int32)
    return {"tokens": np.where(segments > 0, tokens, 0), "segment_ids": segments, "positions": positions}


def reference_logits(model, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of every real position, [number of real positions, vocabulary], in row-major order.

    Packed texts go through transformers one by one; the row padded on the left goes through whole, with its mask.
    """
    import torch

    tokens, segments = torch.tensor(batch["tokens"]).long(), batch["segment_ids"]
    with torch.no_grad():
        rows = [
            model(tokens[row : row + 1, segments[row] == segment]).logits[0]
            for row in (0, 1)
            for segment in range(1, segments[row].max() + 1)
        ]
        mask = torch.tensor(segments[2:] > 0).long()
        padded = model(tokens[2:], attention_mask=mask, position_ids=torch.tensor(batch["positions"][2:]).long())
    rows.append(padded.logits[0, segments[2] > 0])
    return torch.cat(rows).float().numpy()


def main() -> None:
    """Writes golden/<variant>: an ordinary checkpoint folder and expected.npz."""
    for name in VARIANTS:
        model = make_model(name, rounded=True)
        batch = make_batch(seed=len(name))
        folder = GOLDEN / name
        logits = reference_logits(model, batch)
        model.bfloat16().save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "expected.npz", logits=logits, **batch)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{name:14} {size / 1000:6.1f} kB  spread of logits {logits.std():.2f}", file=sys.stderr)


if __name__ == "__main__":
    main()
