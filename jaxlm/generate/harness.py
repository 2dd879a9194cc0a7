# SPDX-License-Identifier: Apache-2.0
"""A model for EleutherAI's lm-evaluation-harness: its requests answered by a sampler.

Texts become tokens, long ones are cut and documents are windowed as by the harness's own class for transformers, so
that figures of both can be compared.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from jaxlm.data.tokenizers import digest
from jaxlm.generate.engine import Sampling
from jaxlm.generate.from_disk import open_sampler
from jaxlm.generate.sampler import Sampler

_LOG = logging.getLogger(__name__)
_TOGETHER = 128  # prompts of one call of `sample`; draws depend on a prompt's place, so not on the number of slots
_NAMES = {"temperature", "top_p", "top_k", "min_p", "seed"}


def harness_model(
    pretrained: Sampler | str | os.PathLike[str],
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
) -> Any:
    """A model to give to `lm_eval.simple_evaluate(model=...)`.

    Args:
      pretrained: a sampler, or what `open_sampler` reads: a Hugging Face folder, a .gguf file or a run directory.
      batch_size: the sampler's slots; None: 16. This and what follows only with a path.
      max_length: tokens that the model sees at once; None: its own.
      dtype: of the computation; None: float32.
    Raises: ImportError without the extra `harness`; ValueError for what cannot be read, or a sampler with options.
    """
    return harness_class()(pretrained, batch_size=batch_size, max_length=max_length, dtype=dtype)


@functools.cache
def harness_class() -> type:
    """The class itself; from now on the harness knows it by the name "jaxlm", in `simple_evaluate(model="jaxlm")` too.

    Raises: ImportError without the extra `harness`.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ImportError(f"a model for the harness needs lm-eval ({error}): pip install 'jaxlm[harness]'") from error

    @register_model("jaxlm")
    class JaxLM(_Answers, TemplateLM):
        """`_Answers` with what the harness's own base adds: pairs of texts to tokens, chat templates, the cache."""

    return JaxLM


class _Answers:
    """What the harness asks of a model; `harness_class` joins it with the harness's base class.

    Args: as `harness_model`. `device` is the harness's word for torch, and its command line gives one always; JAX
    chooses its own (JAX_PLATFORMS).
    """

    cache_hook: Any  # the base's, for --use_cache

    def __init__(
        self,
        pretrained: Sampler | str | os.PathLike[str],
        *,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        dtype: str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if max_batch_size is not None or not str(batch_size or 1).isdecimal():
            raise ValueError(f"batch_size must be a number, got {batch_size!r}: jaxlm does not look for the largest")
        if isinstance(pretrained, Sampler):
            if any(option is not None for option in (batch_size, max_length, dtype)):
                raise ValueError("batch_size, max_length and dtype are those of the sampler: set them there")
            self.sampler = pretrained
        else:
            self.sampler = open_sampler(
                pretrained, slots=int(batch_size or 16), size=max_length, dtype=dtype or "float32"
            )
        self.tokenizer = self.sampler.tokenizer
        self.max_length = self.sampler.size
        self.batch_size = self.sampler.num_slots

    # -- what the base asks for

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is predicted from: bos, or eos where there is none."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise ValueError("the tokenizer has neither bos nor eos, and a text without context needs one before it")
        return eos if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer and its template in the harness's caches: of another one nothing is taken."""
        return digest(self.tokenizer)

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's record of the run."""
        leaves = jax.tree.leaves(self.sampler.params)
        return {
            "model_num_parameters": sum(leaf.size for leaf in leaves),
            "model_dtype": str(self.sampler.model.config.dtype),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with the tokenizer's special tokens, unless told otherwise or the text brings its bos along."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as text; without a generation prompt the last message stays open, to be gone on with.

        Raises: ValueError without a template.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("this model's tokenizer has no chat template: leave out apply_chat_template")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # -- the three kinds of requests

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Of (key, context, continuation): log p of the continuation in nats, and whether greedy decoding says it."""
        found: list[Any] = [None] * len(requests)
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        for places in _slices(order, self.batch_size, "loglikelihood", disable_tqdm):
            for i, scored in zip(
                places, self.sampler.scored(*zip(*(pairs[i] for i in places), strict=True)), strict=True
            ):
                found[i] = float(scored.log_probs.sum(dtype="float64")), bool(scored.best.all())
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole documents, nats; those longer than the model sees in windows, each token predicted once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions, cut before the first of their stop strings."""
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for members in groups.values():
            sampling = self._sampling(requests[members[0]].args[1])
            prompts = {i: self._context(requests[i].args[0], self.max_length - sampling.max_tokens) for i in members}
            members.sort(key=lambda i: -len(prompts[i]))
            for places in _slices(members, _TOGETHER, "generate_until", disable_tqdm):
                completions = self.sampler.sample([prompts[i] for i in places], sampling)
                sampling = dataclasses.replace(sampling, seed=sampling.seed + len(places))
                for i, [completion] in zip(places, completions, strict=True):
                    found[i] = completion.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, completion.text)
        return found

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """A pair that fits: the model reads all but the last token; a long context loses its beginning."""
        room = self.max_length + 1 - len(continuation)
        if room < 1 or not continuation:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens cannot be scored: it needs at least one and at most "
                f"{self.max_length}, which the model reads"
            )
        if len(context) > room:
            _LOG.warning("a context of %d tokens is cut to its last %d", len(context), room)
        return context[-room:], continuation

    def _context(self, text: str, room: int) -> list[int]:
        """Tokens of a prompt, its last `room`."""
        tokens = self.tok_encode(text)
        if len(tokens) > room:
            _LOG.warning("a prompt of %d tokens is cut to its last %d", len(tokens), room)
        return tokens[-room:] or [self.prefix_token_id]

    def _sampling(self, given: Mapping[str, Any]) -> Sampling:
        """The harness's words for how tokens are drawn."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), 256))
        stop = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.eos_token)
        max_tokens = options.pop("max_gen_toks")
        if max_tokens >= self.max_length:
            raise ValueError(
                f"max_gen_toks={max_tokens} leaves no room for a prompt in the {self.max_length} tokens of the model: "
                "set it lower, such as gen_kwargs max_gen_toks=32"
            )
        if options.pop("do_sample") and not options.get("temperature"):
            raise ValueError("do_sample=True needs a temperature above 0: say which, or leave it out")
        if unknown := options.keys() - _NAMES:
            raise ValueError(f"generation options {sorted(unknown)} are not known here; there are {sorted(_NAMES)}")
        if (options.get("top_k") or 0) < 1:  # None, 0 and -1 mean all
            options["top_k"] = None
        return Sampling(
            **{"temperature": 0.0} | options, max_tokens=max_tokens, stop=tuple(word for word in stop if word)
        )


def _slices(places: list[int], size: int, name: str, quiet: bool) -> Iterable[list[int]]:
    """`places` in parts of at most `size`, with a bar that shows how far they are."""
    with tqdm(total=len(places), desc=f"Running {name} requests", disable=quiet) as bar:
        for start in range(0, len(places), size):
            yield places[start : start + size]
            bar.update(min(size, len(places) - start))
