# SPDX-License-Identifier: Apache-2.0
"""R-Capsule: a plan as a few latent tokens, steps and answer as text, a shallow decoder that checks the tokens."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.checkpoints.capsules import Capsules
from jaxlm.generate.capsules import CapsuleModel
from jaxlm.losses.capsule import pooled_plan_terms, reconstruction_terms
from jaxlm.losses.next_token import next_token_terms, target_weights
from jaxlm.methods.plan_batches import Layout, Marks, PlanBatches, Targets, add_marks
from jaxlm.methods.sft import ADAPTERS_ONLY, Sft
from jaxlm.nn.capsule import capsule_init, capsule_rollout, capsule_rows, capsules_of
from jaxlm.nn.capsule_config import CapsuleConfig, PlanDecoderConfig
from jaxlm.nn.decoder import EMBEDDED, Model
from jaxlm.nn.plan_decoder import plan_decoder_leaves, plan_hidden, plan_pooled
from jaxlm.nn.shapes import initialise
from jaxlm.train.feeding import own_rows
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.options import AdamW
from jaxlm.train.phase import LossFn, Params, Phase
from jaxlm.transforms.frozen import freeze

if TYPE_CHECKING:
    from jaxlm.train.job import Job

NEW_LEAVES = ((r"(capsule|plan_decoder)/.*", "trained"), *ADAPTERS_ONLY)
ROUND = 8  # a grown vocabulary is a multiple of it, so that meshes divide it


@dataclasses.dataclass(frozen=True, kw_only=True)
class RCapsule:
    """Supervised fine-tuning with the plan as K continuous tokens of width d (Shan et al. 2025, arXiv:2509.22131).

    Records are `question, plan, steps, answer`. A row is `x <cap> [e_1 .. e_K] </cap> s <ans> y <eos>`; what stands
    behind `</cap>` is learnt. Capsules made in steps stand one a row (`data.packing="none"`).

    Attributes:
      sft: AdamW's numbers, z_loss, and adapters; the capsule and the rows of new tokens train in full even then.
      num_capsules: K >= 0; 0 is plain fine-tuning on `x s <ans> y`.
      capsule_width: d, 1 .. D - 1.
      recon_weight: lambda >= 0, coefficient of the plan's term.
      mode, embed_scale, hidden: see `CapsuleConfig`.
      source: "capsule"; "pause" and "hidden" are controls without a bottleneck, and so without reconstruction.
      recon: what the plan decoder must give: the plan's tokens, its mean embedding, or nothing (there is no decoder).
      decoder_layers, decoder_width, decoder_heads: of the plan decoder.
      max_plan: tokens of a plan with its end marker.
      long_plans: longer ones are refused, with their number, or truncated.
      visible_plan_steps: updates at first in which the plan stands as text between x and `<cap>`.
      targets: what follows the capsule: the answer alone, the steps before it, or before them the plan too.
      prompts: "raw", the question as it is; "chat", as a turn of the user.
      keep_decoder: whether `finish` leaves the plan decoder in, to read capsules out.
      bucket: row lengths are rounded up to multiples of it; a program is compiled for each that occurs.
    """

    sft: Sft = Sft(optimizer=AdamW(learning_rate=1e-5))
    num_capsules: int = 2
    capsule_width: int = 128
    recon_weight: float = 0.3
    mode: Literal["autoregressive", "parallel"] = "autoregressive"
    source: Literal["capsule", "pause", "hidden"] = "capsule"
    recon: Literal["tokens", "embedding", "none"] = "tokens"
    embed_scale: Literal["rms", "none"] = "rms"
    hidden: Literal["last", "normed"] = "last"
    decoder_layers: int = 2
    decoder_width: int = 256
    decoder_heads: int = 4
    max_plan: int = 128
    long_plans: Literal["refuse", "truncate"] = "refuse"
    visible_plan_steps: int = 0
    targets: Targets = "steps_and_answer"
    prompts: Literal["raw", "chat"] = "raw"
    keep_decoder: bool = False
    bucket: int = 32
    whole_rows = "it makes capsules with a cache and rows of many lengths"  # why tokens cannot be divided

    def __post_init__(self):
        if not self.recon_weight >= 0:
            raise ValueError(f"recon_weight must be at least 0, got {self.recon_weight}")
        if self.source != "capsule" and self.recon != "none":
            raise ValueError(f"source {self.source!r} has no capsule to rebuild a plan from: set recon='none'")
        if self.keep_decoder and not self.has_decoder:
            raise ValueError(
                "keep_decoder keeps a plan decoder, and there is none: set recon='tokens', num_capsules > 0"
            )
        if self.keep_decoder and self.recon != "tokens":
            raise ValueError(
                f"recon={self.recon!r} trains no tokens to read out: set recon='tokens' or keep_decoder=False"
            )
        if self.bucket < 1 or self.visible_plan_steps < 0:
            raise ValueError(
                f"need bucket >= 1 and visible_plan_steps >= 0, got {self.bucket} and {self.visible_plan_steps}"
            )
        _ = self.capsule, self.decoder  # checks their numbers

    @classmethod
    def tiny(cls) -> "RCapsule":
        """For the laws that every method obeys."""
        sft = Sft(optimizer=AdamW(learning_rate=1e-2))
        return cls(sft=sft, capsule_width=4, decoder_layers=1, decoder_width=8, decoder_heads=2, max_plan=8)

    @staticmethod
    def tiny_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Text as questions of 5 tokens with `<cap>`, two places of a capsule and what follows; its plan: 4 tokens."""
        tokens, rest = batch["tokens"].copy(), np.arange(batch["tokens"].shape[1])[None] > 6
        tokens[:, 5:7] = EMBEDDED
        segments = np.maximum(batch["segment_ids"], (~rest).astype(np.int32))
        weights = batch["loss_weights"] * (np.arange(tokens.shape[1])[None] > 7)
        return batch | {
            "tokens": tokens,
            "segment_ids": segments,
            "loss_weights": weights.astype(np.float32),
            "capsule_ids": np.broadcast_to(np.eye(1, 16, 5, int) + 2 * np.eye(1, 16, 6, int), tokens.shape).astype(
                "i4"
            ),
            "prompt_mask": np.ones((len(tokens), 5), bool),
            "plan_tokens": batch["tokens"][:, None, :4],
            "plan_mask": np.ones((len(tokens), 1, 4), np.float32),
        }

    def shrunk(self) -> "RCapsule":
        """For a model of width 16."""
        few: dict[str, Any] = {
            "capsule_width": min(4, self.capsule_width),
            "decoder_width": 8,
            "decoder_heads": 2,
            "decoder_layers": 1,
        }
        return dataclasses.replace(self, **few)

    @property
    def capsule(self) -> CapsuleConfig:
        """What stands between `<cap>` and `</cap>`."""
        return CapsuleConfig(
            num_capsules=self.num_capsules,
            width=self.capsule_width,
            source=self.source,
            mode=self.mode,
            embed_scale=self.embed_scale,
            hidden=self.hidden,
        )

    @property
    def decoder(self) -> PlanDecoderConfig:
        """The plan decoder."""
        return PlanDecoderConfig(
            layers=self.decoder_layers, width=self.decoder_width, heads=self.decoder_heads, max_plan=self.max_plan
        )

    @property
    def has_decoder(self) -> bool:
        """Whether there is something to rebuild, and something to rebuild it from."""
        return self.num_capsules > 0 and self.recon != "none"

    @property
    def layout(self) -> Layout:
        """How records become rows."""
        return Layout(
            num_capsules=self.num_capsules,
            in_steps=self.capsule.in_steps,
            targets=self.targets,
            prompts=self.prompts,
            plans=self.has_decoder and self.recon_weight > 0,
            max_plan=self.max_plan,
            long_plans=self.long_plans,
            bucket=self.bucket,
        )

    def model(self, model: Model, marks: Marks | None = None) -> Model:
        """The model that this method trains: with room for the marks, and the adapters' scale when there are adapters.

        Args:
          model: a decoder.
          marks: ids of the new tokens; None: they follow the model's vocabulary.
        """
        if not hasattr(model, "extend"):
            raise ValueError(f"r_capsule goes on from what it has made, and {type(model).__name__} is no decoder")
        size = model.config.vocab_size
        needed = size + 3 if marks is None else max(marks) + 1
        if needed > size:
            grown = dataclasses.replace(model.config, vocab_size=-(-needed // ROUND) * ROUND)
            model = dataclasses.replace(model, config=grown)
        return self.sft.model(model)

    def tx(self, steps: int) -> optax.GradientTransformationExtraArgs:
        """SFT's; with adapters the capsule, the plan decoder and the new rows train beside them."""
        tx = make_optimizer(self.sft.optimizer, steps)
        return tx if self.sft.lora is None else freeze(tx, NEW_LEAVES if self.num_capsules else _NEW_ROWS)

    def phase(self, model: Model, *, num_tasks: int, steps: int, marks: Marks | None = None) -> Phase:
        """SFT's with new leaves before, another loss, and the plan decoder dropped after.

        Args:
          model: what `self.model` returned.
          num_tasks: length of the per-task metrics.
          steps: updates that the learning-rate schedule spans.
          marks: ids of the new tokens; None: the last three of the model's vocabulary.
        """
        size = model.config.vocab_size
        marks = Marks(size - 3, size - 2, size - 1) if marks is None else marks
        inner = self.sft.phase(model, num_tasks=num_tasks, steps=steps)
        settings = _Settings(self.capsule, self.decoder, self.recon if self.has_decoder else "none", self.recon_weight)
        rows = marks if self.sft.lora is not None else None
        return inner._replace(
            loss_fn=_loss_fn(model, num_tasks, self.sft.z_loss, settings, rows),
            tx=self.tx(steps),
            prepare=lambda params, rng: self._prepare(inner, model, marks, params, rng),
            finish=lambda params: self._finish(inner, marks, params),
        )

    def _prepare(self, inner: Phase, model: Model, marks: Marks, params: Params, rng: jax.Array) -> Params:
        keys = jax.random.split(rng, 4)
        params = inner.prepare(grown(params, model.config.vocab_size, marks, keys[0]), keys[1])
        table = params["embed"]["table"]
        new: dict[str, Any] = {}
        if self.num_capsules:
            new["capsule"] = capsule_init(table, self.capsule, keys[2])
        if self.has_decoder:
            leaves = plan_decoder_leaves(table.shape[1], self.capsule_width, self.num_capsules, self.decoder)
            new["plan_decoder"] = initialise(leaves, keys[3])
        if self.sft.lora is not None:
            rows = {"table": table[jnp.array(marks)]}
            if "head" in params:
                rows["head"] = params["head"]["kernel"][:, jnp.array(marks)]
            new["capsule"] = new.get("capsule", {}) | {"marks": rows}
        return {**params, **new}

    def _finish(self, inner: Phase, marks: Marks, params: Params) -> Params:
        """Rows of the marks and adapters where they belong; without the plan decoder, unless it is kept."""
        params = dict(with_marks(params, marks))
        capsule = {name: leaf for name, leaf in params.pop("capsule", {}).items() if name != "marks"}
        decoder = params.pop("plan_decoder", None)
        params = dict(inner.finish(params)) | ({"capsule": capsule} if capsule else {})
        return params | ({"plan_decoder": decoder} if self.keep_decoder else {})

    def run(self, job: "Job"):
        """Trains on the job's records; returns what `finish` leaves."""
        if job.tokenizer is None or job.record is None:
            raise ValueError("r_capsule needs the job's tokenizer and record: make the job by jaxlm.run")
        tokenizer = job.tokenizer()
        marks = add_marks(tokenizer)
        model = self.model(job.model, marks)
        phase = self.phase(model, num_tasks=len(job.task_names), steps=job.options.steps, marks=marks)
        batches = functools.partial(PlanBatches, self.layout, tokenizer, job.record, job.describe)
        options: dict[str, Any] = {"visible_plan_steps": self.visible_plan_steps}
        options["part"] = own_rows(job.mesh, job.options.batch_size)
        phase = phase._replace(batches=lambda records, params_fn: batches(records, **options))
        return jax.jit(phase.finish)(job.train(phase, model=model, records=job.batches(whole=True)).params)

    def speaker(self, model: Model, params: Params, tokenizer: Any) -> Any:
        """What samples from parameters of this method, trained or not; the tokenizer gets the marks.

        Raises: ValueError for parameters with adapters: merge them first.
        """
        if "marks" in params.get("capsule", {}):
            raise ValueError(
                "adapters are answered with once they are merged: set run.evaluate_every=0 with generation"
            )
        marks = add_marks(tokenizer)
        if "capsule" not in params:  # as they were before training, or K = 0
            return model
        return CapsuleModel(model, self.capsule, marks.cap, marks.end)

    def exported(self, model: Model, params: Params, tokenizer: Any) -> tuple[Model, Params, Capsules | None]:
        """The decoder as a model of its own, its parameters, what goes beside them; the tokenizer gets marks."""
        marks = add_marks(tokenizer)
        model = dataclasses.replace(model, config=self.model(model, marks).config)
        if self.sft.lora is not None:
            model = dataclasses.replace(model, config=dataclasses.replace(model.config, adapter_scale=1.0))
        plain = {name: leaf for name, leaf in params.items() if name not in ("capsule", "plan_decoder")}
        leaves = {name: params[name] for name in ("capsule", "plan_decoder") if name in params}
        if not leaves:
            return model, plain, None
        decoder = self.decoder if self.keep_decoder else None
        return model, plain, Capsules(self.capsule, decoder, marks.cap, marks.end, leaves)


_NEW_ROWS = ((r"capsule/marks/.*", "trained"), *ADAPTERS_ONLY)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the loss reads of a method: hashable, so that equal ones share a compiled step."""

    capsule: CapsuleConfig
    decoder: PlanDecoderConfig
    recon: Literal["tokens", "embedding", "none"]
    recon_weight: float


def grown(params: Params, size: int, marks: Marks, key: jax.Array) -> Params:
    """Embedding and head with `size` rows, those of the marks and of what is new near the mean of the others.

    row = mean + 0.01 * spread * normal noise,   over the rows that were there
    """

    def grow(table_VD: jax.Array, key: jax.Array) -> jax.Array:
        old = table_VD.shape[0]
        mean, spread = jnp.mean(table_VD, axis=0, keepdims=True), jnp.std(table_VD, axis=0, keepdims=True)
        fresh = mean + 0.01 * spread * jax.random.normal(key, (size, table_VD.shape[1]), table_VD.dtype)
        which = (jnp.arange(size) >= old) | jnp.isin(jnp.arange(size), jnp.array(marks))
        return jnp.where(which[:, None], fresh, jnp.pad(table_VD, ((0, size - old), (0, 0))))

    keys = jax.random.split(key)
    params = {**params, "embed": {"table": grow(params["embed"]["table"], keys[0])}}
    if "head" in params:
        params["head"] = {**params["head"], "kernel": grow(params["head"]["kernel"].T, keys[1]).T}
    return params


def with_marks(params: Params, marks: Marks | None) -> Params:
    """The parameters with the rows that train apart, beside adapters, in their places."""
    rows = params.get("capsule", {}).get("marks")
    if rows is None or marks is None:
        return params
    at = jnp.array(marks)
    params = {**params, "embed": {"table": params["embed"]["table"].at[at].set(rows["table"])}}
    if "head" in rows:
        params["head"] = {**params["head"], "kernel": params["head"]["kernel"].at[:, at].set(rows["head"])}
    return params


def capsule_pass(
    model: Model, params: Params, batch: dict[str, jax.Array], config: CapsuleConfig, *, num_segments: int = 1
) -> tuple[jax.Array, jax.Array | None, int]:
    """A batch of `assemble` through the model.

    Returns: hidden states after the final norm [B, T - from, D], capsules [B, M, K, d] or None, and the column `from`
      of the first hidden state.
    """
    K, segments = config.num_capsules, batch["segment_ids"]
    where: dict[str, Any] = {"positions": batch["positions"], "segment_ids": segments}
    if K == 0:
        return model.apply(params, batch["tokens"], **where), None, 0
    if not config.in_steps:
        ids = batch["capsule_ids"]
        hidden, columns = capsule_rows(model, params, batch["tokens"], ids, config, **where)
        return hidden, capsules_of(columns, ids, segments, num_segments=num_segments, num_capsules=K), 0
    T, P = batch["tokens"].shape[1], batch["prompt_mask"].shape[1]
    prompt = batch["tokens"][:, :P]
    made = capsule_rollout(model, params, prompt, batch["prompt_mask"], config, size=T, page=T)
    begin = P + K - 1  # the column of the last embedding, which nothing has read yet
    embeddings = jnp.pad(made.embeddings[:, -1:], ((0, 0), (0, T - begin - 1), (0, 0)))
    real = jnp.sum(segments[:, begin:] > 0, axis=1, dtype=jnp.int32)
    hidden, _ = model.extend(params, batch["tokens"][:, begin:], made.cache, real, embeddings=embeddings)
    return hidden, made.capsule[:, None], begin


@functools.lru_cache(maxsize=16)
def _loss_fn(model: Model, num_tasks: int, z_loss: float, settings: _Settings, marks: Marks | None) -> LossFn:
    """One function for equal arguments, so that runs which differ in anything else share a compiled step."""

    def loss_fn(params, batch, rng):
        params = with_marks(params, marks)
        plans = settings.recon != "none" and "plan_tokens" in batch
        M = batch["plan_tokens"].shape[1] if plans else 1
        hidden, capsule, begin = capsule_pass(model, params, batch, settings.capsule, num_segments=M)
        seen = {name: batch[name][:, begin:] for name in ("loss_weights", "segment_ids", "task_ids")}
        seen["tokens"] = jnp.maximum(batch["tokens"][:, begin:], 0)  # a place of a capsule is no target
        options = {"softcap": model.config.logit_softcap, "z_loss": z_loss, "groups": model.row_groups}
        terms = next_token_terms(hidden, model.head(params), seen, num_tasks=num_tasks, **options)
        if not plans or capsule is None:
            return terms
        return terms | _plan_terms(model, params, batch, capsule, settings)

    return loss_fn


def _plan_terms(model, params, batch, capsule_BMKd, settings):
    """The second term, of every segment that has a plan."""
    B, M, J = batch["plan_tokens"].shape
    weights = target_weights(batch["loss_weights"], batch["segment_ids"])
    inside = batch["segment_ids"][:, None, :] == 1 + jnp.arange(M, dtype=jnp.int32)[None, :, None]
    count_R = jnp.sum(jnp.where(inside, weights[:, None, :], 0.0), axis=2).reshape(B * M)
    capsule_RKd = capsule_BMKd.reshape(B * M, *capsule_BMKd.shape[2:])
    plan_RJ, mask_RJ = batch["plan_tokens"].reshape(B * M, J), batch["plan_mask"].reshape(B * M, J)
    p, table = params["plan_decoder"], params["embed"]["table"]
    if settings.recon == "embedding":
        guess = plan_pooled(p, capsule_RKd)
        return pooled_plan_terms(guess, table, plan_RJ, mask_RJ, count_R, recon_weight=settings.recon_weight)
    hidden = plan_hidden(p, capsule_RKd, plan_RJ, table, settings.decoder)
    options = {"recon_weight": settings.recon_weight, "groups": model.row_groups}
    return reconstruction_terms(hidden, table, plan_RJ, mask_RJ, count_R, **options)
