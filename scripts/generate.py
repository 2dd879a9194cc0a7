# SPDX-License-Identifier: Apache-2.0
"""Completions of prompts: from the command line, standard input, or a JSON Lines file; by a model on disk or a server.

  python scripts/generate.py SmolLM2-135M-Instruct.Q4_1.gguf --chat "What is the capital of France?"
  python scripts/generate.py runs/quickstart "Sort: 3 1 2" --temperature 0 --max-tokens 32
  python scripts/generate.py runs/r_capsule --explain --max-tokens 32 "7: c*3 a+8 b-4="
  echo "Once upon a time" | python scripts/generate.py model/ -n 4
  python scripts/generate.py NAME --server http://127.0.0.1:8000/v1 --file prompts.jsonl --json --journal done.jsonl

A line of a file is {"prompt": text}, {"messages": [...]} or {"tokens": [...]}; --json prints one line a prompt.
"""

import contextlib
import json
import sys
from typing import Any

from jaxlm.command import Parser, call


def main() -> int:
    """Reads arguments and prompts, samples, prints."""
    arguments = _arguments()
    prompts = _prompts(arguments)
    # Late, because they import jax, and --help must not.
    from jaxlm.generate.engine import Engine, Sampling

    sampling = Sampling(
        num_samples=arguments.num_samples,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        stop=tuple(arguments.stop),
        seed=arguments.seed,
    )
    engine: Engine
    kept: dict[str, Any] = {}
    plans: list[str] = []
    if arguments.server and arguments.explain:
        raise ValueError("capsule tokens are embeddings; use the embedded engine: --explain without --server")
    if arguments.server:
        from jaxlm.generate.remote import RemoteEngine

        engine = RemoteEngine(
            arguments.server,
            arguments.model,
            dialect=arguments.dialect,
            key_variable=arguments.key_variable,
            concurrency=arguments.concurrency,
        )
        kept = {"journal": arguments.journal}
    elif arguments.journal or arguments.key_variable:
        raise ValueError("--journal and --key-variable belong to --server")
    else:
        from jaxlm.generate.from_disk import open_sampler

        engine = open_sampler(arguments.model, slots=arguments.slots, size=arguments.size, dtype=arguments.dtype)
        if arguments.explain:
            plans = _plans(arguments.model, engine, prompts)
    for i, plan in enumerate(plans if not arguments.json else []):
        print(f"--- plan {i}\n{plan}", flush=True)
    live = len(prompts) == arguments.num_samples == 1 and not arguments.json
    found = engine.sample(prompts, sampling, stream=_say if live else None, **kept)
    if live:
        print(flush=True)
        return 0
    for i, (prompt, samples) in enumerate(zip(prompts, found, strict=True)):
        if arguments.json:
            told = {"plan": plans[i]} if plans else {}
            print(json.dumps({"prompt": prompt, **told, "completions": [_plain(sample) for sample in samples]}))
            continue
        for n, sample in enumerate(samples):
            print(f"--- prompt {i}, sample {n}, {sample.finish_reason}\n{sample.text}")
    return 0


def _arguments() -> Any:
    """What the command line says."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "model", help="a Hugging Face folder, .gguf file or run directory; with --server its name there"
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="texts; without any, standard input is one")
    parser.add_argument("--file", help="prompts as JSON Lines")
    parser.add_argument("--chat", action="store_true", help="a text is what a user says, put into the chat template")
    parser.add_argument("--system", help="with --chat: the message before it")
    parser.add_argument("--explain", action="store_true", help="print the plan in each prompt's capsule (r_capsule)")
    parser.add_argument("--json", action="store_true", help="print JSON Lines, and nothing else, on stdout")
    how = parser.add_argument_group("sampling")
    how.add_argument("-n", "--num-samples", type=int, default=1, help="completions of each prompt (default 1)")
    how.add_argument("--max-tokens", type=int, default=256, help="of a completion (default 256)")
    how.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token (default 1)")
    how.add_argument("--top-p", type=float, default=1.0, help="the fewest tokens of this probability (default 1: all)")
    how.add_argument("--top-k", type=int, help="the most probable so many tokens (default: all)")
    how.add_argument("--min-p", type=float, default=0.0, help="least probability relative to the best (default 0)")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a completion; may be repeated")
    how.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    here = parser.add_argument_group("a model on disk")
    here.add_argument("--slots", type=int, default=16, help="samples that are decoded at once (default 16)")
    here.add_argument("--size", type=int, help="tokens of prompt and completion together (default: the model's)")
    here.add_argument("--dtype", default="float32", help="of the computation: float32 or bfloat16")
    there = parser.add_argument_group("a server")
    there.add_argument("--server", metavar="URL", help="such as http://127.0.0.1:8000/v1")
    there.add_argument("--dialect", default="vllm", help="vllm (and scripts/serve.py), sglang or openai (default vllm)")
    there.add_argument("--key-variable", metavar="NAME", help="environment variable with the server's key")
    there.add_argument("--concurrency", type=int, default=32, help="requests at a time (default 32)")
    there.add_argument("--journal", metavar="FILE", help="keep answers; the same command again asks only for the rest")
    return parser.parse_intermixed_args()


def _plans(model: str, engine: Any, prompts: list[Any]) -> list[str]:
    """The plan in the capsule of each prompt, by the plan decoder that lies beside the model."""
    from jaxlm.checkpoints import load_capsules
    from jaxlm.generate.capsules import explain
    from jaxlm.generate.from_disk import model_path

    capsules = load_capsules(model_path(model))
    decoder = None if capsules is None else capsules.decoder
    return explain(engine.model, engine.params, decoder, engine.tokenizer, prompts)


def _say(prompt: int, sample: int, text: str) -> None:
    print(text, end="", flush=True)


def _plain(sample: Any) -> dict[str, Any]:
    """A completion as JSON; what is not known is null."""
    numbers = {name: getattr(sample, name).tolist() for name in ("tokens", "log_probs", "raw_log_probs")}
    known = {name: [None if x != x else x for x in values] for name, values in numbers.items()}
    return {"text": sample.text, "finish_reason": sample.finish_reason} | known


def _prompts(arguments: Any) -> list[Any]:
    """All prompts of the command line, the file or standard input, chats made of texts where asked."""
    found: list[Any] = list(arguments.prompts)
    if arguments.file:
        with open(arguments.file, encoding="utf-8") as lines:
            found += [_record(f"{arguments.file}:{i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        if sys.stdin.isatty():
            raise ValueError("no prompt: give one as an argument, in --file, or on standard input")
        with contextlib.closing(sys.stdin):
            text = sys.stdin.read().removesuffix("\n")
        if not text:
            raise ValueError("no prompt: standard input is empty")
        found = [text]
    if arguments.system is not None and not arguments.chat:
        raise ValueError("--system is a message of a chat: give --chat too")
    if not arguments.chat:
        return found
    before = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return [[*before, {"role": "user", "content": p}] if isinstance(p, str) else p for p in found]


def _record(where: str, line: str) -> Any:
    """The prompt of one line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    given = [name for name in ("prompt", "messages", "tokens") if isinstance(record, dict) and record.get(name)]
    if len(given) != 1 or not isinstance(record[given[0]], str if given[0] == "prompt" else list):
        raise ValueError(f'{where} must be {{"prompt": text}}, {{"messages": [...]}} or {{"tokens": [...]}}')
    return record[given[0]]


if __name__ == "__main__":
    call(main)
