# SPDX-License-Identifier: Apache-2.0
"""Generation through a capsule: the question, K latent steps, `</cap>`, then text; and what the capsule stands for.

B prompts, T tokens of a prompt, K capsule tokens, D model width.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxlm.generate.engine import Prompt
from jaxlm.generate.texts import prompt_tokens
from jaxlm.nn.cache import Cache, Entries
from jaxlm.nn.capsule import Rollout, capsule_rollout
from jaxlm.nn.capsule_config import CapsuleConfig, PlanDecoderConfig
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import EMBEDDED, Model, Params
from jaxlm.nn.plan_decoder import plan_greedy


@dataclasses.dataclass(frozen=True)
class CapsuleModel:
    """A decoder that thinks a capsule before it says anything: what a `Sampler` takes in place of a `Model`.

    Attributes:
      model: the decoder.
      capsule: how its capsules are made; the parameters hold their leaves under "capsule".
      cap, end: ids of `<cap>` and `</cap>`.
      given: what text goes on from: one's own capsule; or a control, over the prompts that are read together: its
        neighbour's, or the mean of all embeddings, place by place.
    """

    model: Model
    capsule: CapsuleConfig
    cap: int
    end: int
    given: Literal["own", "shuffled", "mean"] = "own"

    @property
    def config(self) -> ModelConfig:
        """The decoder's."""
        return self.model.config

    @property
    def unseen(self) -> int:
        """Tokens that `prefill` puts behind a prompt."""
        return self.capsule.num_capsules + 2 if self.capsule.num_capsules else 0

    def think(self, params: Params, tokens: jax.Array, lengths: jax.Array, *, size: int, page: int) -> Rollout:
        """The rollout behind prompts [B, T] of `lengths` [B] tokens, `<cap>` added."""
        places = jnp.arange(tokens.shape[1] + 1, dtype=jnp.int32)[None]
        with_cap = jnp.where(places == lengths[:, None], self.cap, jnp.pad(tokens, ((0, 0), (0, 1))))
        roll = functools.partial(capsule_rollout, self.model, params, with_cap, places <= lengths[:, None])
        made = roll(self.capsule, size=size, page=page)
        if self.given == "own":
            return made
        rows, real = jnp.arange(len(lengths)), jnp.sum(lengths > 0)  # prompts come first, padding behind them
        if self.given == "shuffled":
            others = jnp.take(made.embeddings, jnp.where(rows == 0, jnp.maximum(real - 1, 0), rows - 1), axis=0)
        else:
            summed = jnp.sum(made.embeddings, axis=0, where=(rows < real)[:, None, None], keepdims=True)
            others = jnp.broadcast_to(summed / jnp.maximum(real, 1), made.embeddings.shape)
        return roll(self.capsule, size=size, page=page, given=others)

    def prefill(
        self, params: Params, tokens: jax.Array, lengths: jax.Array, *, size: int, page: int = 64
    ) -> tuple[jax.Array, Cache]:
        """As `Model.prefill`, with the capsule and `</cap>` behind each prompt; `size` counts without them.

        Returns: the hidden state of `</cap>` in every column, [B, T, D], for it is what text goes on from; the cache.
        """
        B, T = tokens.shape
        if not self.capsule.num_capsules:
            return self.model.prefill(params, tokens, lengths, size=size, page=page)
        made = self.think(params, tokens, lengths, size=size + self.unseen, page=page)
        last = jnp.broadcast_to(jnp.array([[EMBEDDED, self.end]], jnp.int32), (B, 2))
        embeddings = jnp.pad(made.embeddings[:, -1:], ((0, 0), (0, 1), (0, 0)))
        hidden, cache = self.model.extend(params, last, made.cache, embeddings=embeddings)
        return jnp.broadcast_to(hidden[:, -1:], (B, T, hidden.shape[-1])), cache

    def extend(self, *args: Any, **options: Any) -> tuple[jax.Array, Cache]:
        """`Model.extend`."""
        return self.model.extend(*args, **options)

    def peek(self, *args: Any, **options: Any) -> tuple[jax.Array, Entries]:
        """`Model.peek`."""
        return self.model.peek(*args, **options)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """`Model.logits`."""
        return self.model.logits(params, hidden)

    def head(self, params: Params) -> jax.Array:
        """`Model.head`."""
        return self.model.head(params)

    def apply(self, params: Params, tokens: jax.Array, **options: Any) -> jax.Array:
        """Refused where there is a capsule: rows of tokens do not say where it stands."""
        if self.capsule.num_capsules:
            raise ValueError(
                "a row of tokens does not say where its capsule stands: sample, or score without a capsule"
            )
        return self.model.apply(params, tokens, **options)


def read_capsule(
    params: Params,
    capsule: jax.Array,
    decoder: PlanDecoderConfig | None,
    tokenizer: PreTrainedTokenizerFast,
) -> list[str]:
    """The most probable plan of each capsule [B, K, d], as text.

    Args:
      params: with the plan decoder, and the embedding table that it was trained with.
      decoder: its numbers.
      tokenizer: whose end marker ends a plan.
    Raises: ValueError where the plan decoder was dropped.
    """
    if decoder is None or "plan_decoder" not in params:
        raise ValueError(
            "there is no plan decoder to read the capsule with: it was dropped after training; train with "
            "method.keep_decoder=true"
        )
    plans = np.asarray(_read(decoder, params["plan_decoder"], params["embed"]["table"], capsule))
    texts = []
    for plan in plans.tolist():
        end = plan.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in plan else len(plan)
        texts.append(str(tokenizer.decode(plan[:end], clean_up_tokenization_spaces=False)))
    return texts


@functools.partial(jax.jit, static_argnums=0)
def _read(config: PlanDecoderConfig, p: Mapping[str, Any], table: jax.Array, capsule: jax.Array) -> jax.Array:
    return plan_greedy(p, capsule, table, config)


def explain(
    model: Any,
    params: Params,
    decoder: PlanDecoderConfig | None,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
) -> list[str]:
    """The plan that stands in the capsule of each prompt.

    Raises: ValueError for a model without capsules, or one whose plan decoder was dropped.
    """
    if not isinstance(model, CapsuleModel) or model.capsule.source != "capsule" or not model.capsule.num_capsules:
        raise ValueError("this model makes no capsule: --explain is for models trained by r_capsule")
    encoded = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    T = -(-max(map(len, encoded)) // 64) * 64
    tokens = np.stack([np.pad(ids, (0, T - len(ids))) for ids in encoded])
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    return read_capsule(params, _think(model, params, tokens, lengths), decoder, tokenizer)


@functools.partial(jax.jit, static_argnums=0)
def _think(model: CapsuleModel, params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return model.think(params, tokens, lengths, size=tokens.shape[1] + model.unseen, page=64).capsule
