# SPDX-License-Identifier: Apache-2.0
"""Held-out metrics: loss, perplexity and exact match under teacher forcing, or of answers that the model generates.

python scripts/evaluate.py runs/quickstart
python scripts/evaluate.py runs/quickstart --json run.batch_size=64
python scripts/evaluate.py runs/books --lengths 512,4096,16384
python scripts/evaluate.py runs/quickstart --generate --max-tokens 16
python scripts/evaluate.py runs/quickstart --generate -n 8 --temperature 1 --max-tokens 16 --ks 1,4,8 --records 50
python scripts/evaluate.py assets/model.gguf --config configs/sft_smollm2.py --generate --out out

With --generate the answers, their scores and a page are left in RUN/generated, or where --out says.
"""

import json
import pathlib
from typing import Any

from jaxlm.command import Parser, call
from jaxlm.config import load_config


def main() -> int:
    """Reads the arguments, evaluates, prints a table or JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="a run directory; with --config a Hugging Face folder or .gguf file")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="such as run.batch_size=64")
    parser.add_argument("--config", help="whose tasks and tokenizer to use; default: the run's own")
    parser.add_argument("--lengths", default="", metavar="L,L", help="also perplexity in windows of so many tokens")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    answers = parser.add_argument_group("answers", "defaults are those of the config's generation, else as told here")
    answers.add_argument("--generate", action="store_true", help="let the model answer, and judge its answers")
    fields = _generation(answers)
    answers.add_argument(
        "--verifier",
        action="append",
        default=[],
        metavar="[TASK=]NAME",
        help="who judges, for one task or all, such as NumericMatch (default: the generator's own scorer, else "
        "NormalisedMatch)",
    )
    answers.add_argument("--out", metavar="DIR", help="for samples.jsonl, evaluation.json and report.html")
    arguments = parser.parse_intermixed_args()
    is_run = (pathlib.Path(arguments.model) / "metrics.jsonl").is_file()
    if not is_run and not arguments.config:
        raise ValueError(f"{arguments.model} is no run directory: say with --config which tasks to evaluate it on")
    given = [
        f"{path}={getattr(arguments, name)}" for name, path in fields.items() if getattr(arguments, name) is not None
    ]
    if not arguments.generate and (given or arguments.stop or arguments.verifier or arguments.out):
        raise ValueError("options of answers, such as --num-samples, belong to --generate")
    if arguments.generate and arguments.lengths:
        raise ValueError("--lengths and --generate are two evaluations: ask for one of them")
    stop = [f"generation.sampling.stop={json.dumps(arguments.stop)}"] if arguments.stop else []
    asked = ["generation=Generation", *given, *stop] if arguments.generate else []
    config = load_config(arguments.config or arguments.model, [*asked, *arguments.overrides])
    # Late, because it imports jax, and --help must not.
    from jaxlm import evaluation

    if arguments.generate:
        config = evaluation.judged_by(config, arguments.verifier)
        out = arguments.out or (pathlib.Path(arguments.model) / "generated" if is_run else None)
        found = (evaluation.generate_run if is_run else evaluation.generate_checkpoint)(
            arguments.model, config, out=out
        )
        print(json.dumps(found.value, indent=1) if arguments.json else evaluation.answers_table(found))
        if out and not arguments.json:
            print(f"\nreport: {pathlib.Path(out) / 'report.html'}")
        return 0
    lengths = [_length(text) for text in arguments.lengths.split(",") if text]
    evaluate = evaluation.evaluate_run if is_run else evaluation.evaluate_checkpoint
    metrics = evaluate(arguments.model, config, lengths=lengths)
    tables = [text for text in (evaluation.table(metrics), evaluation.length_table(metrics)) if text]
    print(json.dumps(metrics, indent=1) if arguments.json else "\n\n".join(tables))
    return 0


def _generation(group: Any) -> dict[str, str]:
    """Adds the options that are fields of the config; returns which: argument -> path."""
    told = {
        "num_samples": "of each record (default 1)",
        "max_tokens": "of an answer (default 256)",
        "temperature": "0 takes the most probable token (default 0)",
        "top_p": "the fewest tokens of this probability (default 1: all)",
        "top_k": "the most probable so many tokens (default: all)",
        "min_p": "least probability relative to the best (default 0)",
        "seed": "of the draws (default 0)",
    }
    for name, text in told.items():
        names = ["-n"] if name == "num_samples" else []
        group.add_argument(*names, f"--{name.replace('_', '-')}", metavar="X", help=text)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; may be repeated")
    group.add_argument("--ks", metavar="K,K", help="of pass@k and majority@k (default: the number of samples)")
    group.add_argument("--tasks", metavar="NAME,NAME", help="which to ask (default: all that have held-out records)")
    group.add_argument("--records", metavar="X", help="of each task, the first ones (default: all)")
    group.add_argument("--slots", metavar="X", help="samples decoded at once; answers do not depend on it (default 16)")
    own = {name: f"generation.{name}" for name in ("ks", "tasks", "records", "slots")}
    return {name: f"generation.sampling.{name}" for name in told} | own


def _length(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise ValueError(f"--lengths are numbers of tokens such as 256,1024, got {text!r}")
    return int(text)


if __name__ == "__main__":
    call(main)
