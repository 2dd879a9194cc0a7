# SPDX-License-Identifier: Apache-2.0
"""A GGUF file of the llama architecture, seen as a Hugging Face checkpoint: dequantised, under Hugging Face's names.

GGUF keeps the rows of query and key in interleaved rotary order; they are put back to the half-split order here.
"""

import pathlib
from typing import Any

import numpy as np

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_READ = {
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
}
_READ |= {"rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "vocab_size"}


def _library() -> Any:
    """The optional package `gguf`."""
    try:
        import gguf  # optional: an extra
    except ImportError as error:
        raise ImportError("reading a .gguf file needs the package gguf: pip install 'jaxlm[gguf]'") from error
    return gguf


class GgufFile:
    """Tensors and metadata of one file.

    Attributes:
      metadata: the file's key-value pairs.
      shapes: Hugging Face name -> shape (out, in).

    Raises: ImportError without the package gguf; ValueError for a file that is no GGUF or of another architecture.
    """

    def __init__(self, path: pathlib.Path):
        self._gguf, self.path = _library(), path
        try:
            reader = self._gguf.GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path} is not a whole GGUF file ({error}): fetch it again") from error
        self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path}: architecture {architecture!r} is not supported, only 'llama'")
        self._tensors = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
        if "rope_freqs.weight" in self._tensors:
            raise ValueError(
                f"{path}: rope_freqs.weight (llama3 scaling) is not supported: load the safetensors folder"
            )
        self._last = ("", np.zeros(0, np.float32))
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one tensor as float32; the whole tensor is dequantised for it."""
        return self._whole(name)[index]

    def _whole(self, name: str) -> np.ndarray:
        if self._last[0] != name:
            self._last = (name, self._dequantise(name))
        return self._last[1]

    def _dequantise(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        values = self._gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        heads = {"q_proj": "attention.head_count", "k_proj": "attention.head_count_kv"}
        key = heads.get(name.split(".")[-2])
        return values if key is None else _half_split(values, self._get(key, self._get("attention.head_count")))

    def _get(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"llama.{key}", default)
        if value is None:
            raise ValueError(f"{self.path} lacks llama.{key}: fetch the file again")
        return value

    def config(self) -> dict[str, Any]:
        """The config.json that this file would have; unknown llama.* keys are refused by name."""
        known = _REQUIRED.keys() | _READ
        for key, value in self.metadata.items():
            if key.startswith("llama.") and key.removeprefix("llama.") not in known and value not in (0, False, None):
                raise ValueError(f"{self.path}: {key} = {value!r} is not supported: load the safetensors folder")
        values: dict[str, Any] = {theirs: self._get(key) for key, theirs in _REQUIRED.items()}
        width = values["hidden_size"] // values["num_attention_heads"]
        head = self._get("attention.key_length", self._get("rope.dimension_count", width))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._get(key, head) != head:
                raise ValueError(f"{self.path}: llama.{key} {self._get(key)} is not the width of a head, {head}")
        rope = {
            "rope_type": self._get("rope.scaling.type", "none"),
            "rope_theta": self._get("rope.freq_base", 10_000.0),
        }
        if rope["rope_type"] == "none":
            rope["rope_type"] = "default"
        else:
            rope["factor"] = self._get("rope.scaling.factor")
        epsilon = self._get("attention.layer_norm_rms_epsilon")
        ids = {f"{kind}_token_id": self.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
        return (
            values
            | ids
            | {
                "model_type": "llama",
                "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
                "num_key_value_heads": self._get("attention.head_count_kv", values["num_attention_heads"]),
                "head_dim": head,
                "vocab_size": self.shapes["model.embed_tokens.weight"][0],
                "rms_norm_eps": float(str(np.float32(epsilon))),  # 1e-05, not 9.99999974e-06
                "rope_parameters": rope,
                "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            }
        )


def _hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; an unknown name stays as it is."""
    *place, kind, leaf = name.split(".")
    if kind not in _NAMES:
        return name
    layer = f"model.layers.{place[1]}." if place else ""
    return f"{layer}{_NAMES[kind]}.{leaf}"


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of (out, ...) from interleaved rotary pairs to halves, head by head."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)
