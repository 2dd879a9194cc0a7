# SPDX-License-Identifier: Apache-2.0
"""What Hugging Face calls our parameters: one name table a family. No jax.

A row says: our path, their name (`{}` is the layer), and how one layer's array is turned.
"""

import dataclasses
from typing import Literal

How = Literal["copy", "transpose", "third 0", "third 1", "third 2"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: `ours` under blocks/ is stacked over layers, `theirs` holds one layer.

    how: "copy"; "transpose", torch's Linear keeps (out, in) where we keep (in, out); "third i", ours is the i-th of
    three equal parts of their last dimension (GPT-2 fuses query, key and value).
    """

    ours: str
    theirs: str
    how: How = "copy"


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type`, the class that transformers loads it with, and its name table."""

    name: str
    architecture: str
    prefix: str  # of every name but the head's; absent in checkpoints of the bare model
    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()  # regular expressions of tensors that old checkpoints carry and nothing reads

    @property
    def bare(self) -> str:
        """The class without a head."""
        return self.architecture.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")


def _linear(ours: str, theirs: str) -> tuple[Row, ...]:
    return Row(f"{ours}/kernel", f"{theirs}.weight", "transpose"), Row(f"{ours}/bias", f"{theirs}.bias")


def _thirds(theirs: str) -> tuple[Row, ...]:
    """Query, key and value out of one kernel that is stored (in, out), and of one bias."""
    parts: tuple[tuple[str, How], ...] = (("query", "third 0"), ("key", "third 1"), ("value", "third 2"))
    return tuple(
        Row(f"blocks/attention/{part}/{leaf}", f"{theirs}.{name}", how)
        for part, how in parts
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    )


def _norm(ours: str, theirs: str) -> tuple[Row, ...]:
    return Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")


HEAD = Row("head/kernel", "lm_head.weight", "transpose")
EMBED = Row("embed/table", "model.embed_tokens.weight")
LAYER = "model.layers.{}"

LLAMA_ROWS = (
    EMBED,
    *_norm("blocks/attention_norm", f"{LAYER}.input_layernorm"),
    *_linear("blocks/attention/query", f"{LAYER}.self_attn.q_proj"),
    *_linear("blocks/attention/key", f"{LAYER}.self_attn.k_proj"),
    *_linear("blocks/attention/value", f"{LAYER}.self_attn.v_proj"),
    *_linear("blocks/attention/out", f"{LAYER}.self_attn.o_proj"),
    *_norm("blocks/mlp_norm", f"{LAYER}.post_attention_layernorm"),
    *_linear("blocks/mlp/gate", f"{LAYER}.mlp.gate_proj"),
    *_linear("blocks/mlp/up", f"{LAYER}.mlp.up_proj"),
    *_linear("blocks/mlp/down", f"{LAYER}.mlp.down_proj"),
    *_norm("final_norm", "model.norm"),
    HEAD,
)

QUERY_KEY_NORM_ROWS = (
    Row("blocks/attention/query_norm/scale", f"{LAYER}.self_attn.q_norm.weight"),
    Row("blocks/attention/key_norm/scale", f"{LAYER}.self_attn.k_norm.weight"),
)


def _replace_norms(rows: tuple[Row, ...], **names: str) -> tuple[Row, ...]:
    """Llama's rows with the norms of a block under other names."""
    kept = tuple(row for row in rows if not row.ours.startswith(("blocks/attention_norm", "blocks/mlp_norm")))
    return kept + tuple(row for ours, name in names.items() for row in _norm(f"blocks/{ours}", f"{LAYER}.{name}"))


OLMO2_ROWS = QUERY_KEY_NORM_ROWS + _replace_norms(
    LLAMA_ROWS, attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"
)

GEMMA2_ROWS = _replace_norms(
    LLAMA_ROWS,
    attention_norm="input_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)

GPT2_ROWS = (
    Row("embed/table", "transformer.wte.weight"),
    Row("positions/table", "transformer.wpe.weight"),
    *_norm("blocks/attention_norm", "transformer.h.{}.ln_1"),
    *_thirds("transformer.h.{}.attn.c_attn"),
    Row("blocks/attention/out/kernel", "transformer.h.{}.attn.c_proj.weight"),
    Row("blocks/attention/out/bias", "transformer.h.{}.attn.c_proj.bias"),
    *_norm("blocks/mlp_norm", "transformer.h.{}.ln_2"),
    Row("blocks/mlp/up/kernel", "transformer.h.{}.mlp.c_fc.weight"),
    Row("blocks/mlp/up/bias", "transformer.h.{}.mlp.c_fc.bias"),
    Row("blocks/mlp/down/kernel", "transformer.h.{}.mlp.c_proj.weight"),
    Row("blocks/mlp/down/bias", "transformer.h.{}.mlp.c_proj.bias"),
    *_norm("final_norm", "transformer.ln_f"),
    HEAD,
)

_NATIVE = (
    "embed/table positions/table final_norm/scale final_norm/bias head/kernel",
    "attention_norm attention_post_norm mlp_norm mlp_post_norm",
    "attention/query attention/key attention/value attention/out mlp/gate mlp/up mlp/down",
    "attention/query_norm/scale attention/key_norm/scale attention/sink attention/positions/gap "
    "attention/positions/slope",
)


def _native_rows() -> tuple[Row, ...]:
    """Our own names, for what no family of Hugging Face has: layers one by one, all else as it is."""
    whole, norms, dense, single = (names.split() for names in _NATIVE)
    layered = [f"{name}/{leaf}" for name in norms for leaf in ("scale", "bias")]
    layered += [f"{name}/{leaf}" for name in dense for leaf in ("kernel", "bias")] + single
    rows = [Row(name, name.replace("/", ".")) for name in whole]
    return (*rows, *(Row(f"blocks/{name}", f"blocks.{{}}.{name.replace('/', '.')}") for name in layered))


ROTARY = (r".*rotary_emb\.inv_freq",)

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", "model.", LLAMA_ROWS, ROTARY),
        Family("mistral", "MistralForCausalLM", "model.", LLAMA_ROWS, ROTARY),
        Family("qwen2", "Qwen2ForCausalLM", "model.", LLAMA_ROWS, ROTARY),
        Family("qwen3", "Qwen3ForCausalLM", "model.", LLAMA_ROWS + QUERY_KEY_NORM_ROWS, ROTARY),
        Family("olmo2", "Olmo2ForCausalLM", "model.", OLMO2_ROWS, ROTARY),
        Family("gemma2", "Gemma2ForCausalLM", "model.", GEMMA2_ROWS, ROTARY),
        Family("gpt2", "GPT2LMHeadModel", "transformer.", GPT2_ROWS, (r".*\.attn\.(masked_)?bias",)),
        Family("jaxlm", "JaxlmDecoder", "", _native_rows()),  # the last one, which every model fits
    )
}


def find_family(model_type: object) -> Family:
    """The family of a config's `model_type`; a ValueError lists those there are."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported: jaxlm reads {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
