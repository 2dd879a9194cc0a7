# SPDX-License-Identifier: Apache-2.0
"""Laws of the model for lm-evaluation-harness: its answers are those of the harness's own class, and by hand."""

import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra harness is not installed")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from jaxlm import checkpoints
from jaxlm.data import byte_tokenizer
from jaxlm.generate import Sampler, Sampling, harness_class, harness_model
from jaxlm.nn import Model, ModelConfig

TOKENIZER = byte_tokenizer()
CONFIG = ModelConfig(vocab_size=259, width=16, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64)
MODEL = Model(CONFIG)
PARAMS = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, MODEL.init(jax.random.key(0)))
SAMPLER = Sampler(MODEL, PARAMS, TOKENIZER, slots=16)
LONG = "all that a model reads at once is not all that there is to read, so a document is cut into windows; " * 2
PAIRS = [
    ("a", "b"),
    ("what is it? ", "this"),
    ("two  ", " more"),
    ("", "alone"),
    (LONG, " cut"),
    ("umlaut", " \u00e4\u00f6"),
]

pytestmark = pytest.mark.usefixtures("quick_compiles")


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]


def said():
    """Pairs whose continuation is what the model says itself, as far as it says letters; and the same with an error."""
    contexts = [f"question {i}:" for i in range(24)]
    found = SAMPLER.sample(contexts, Sampling(max_tokens=2, temperature=0.0))
    pairs = [(context, c.text) for context, [c] in zip(contexts, found, strict=True) if c.text.strip().isascii()]
    pairs = [(context, text) for context, text in pairs if TOKENIZER.encode(text) and "\x00" not in text]
    assert len(pairs) > 2
    return pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    checkpoints.save(path, MODEL, PARAMS, tokenizer=TOKENIZER)
    return path


@pytest.fixture(scope="module")
def ours():
    return harness_model(SAMPLER)


@pytest.fixture(scope="module")
def theirs(folder):
    pytest.importorskip("torch", reason="the harness's own class needs torch")
    pytest.importorskip("accelerate", reason="the harness's own class needs accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=3)


def test_log_likelihoods_and_greedy_flags_are_those_of_the_harness_own_class(ours, theirs):
    pairs = PAIRS + said()
    found = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    wanted = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert all(greedy for _, greedy in found[len(PAIRS) :]) and not any(greedy for _, greedy in found[: len(PAIRS)])


def test_documents_and_completions_are_those_of_the_harness_own_class(ours, theirs):
    documents = requests("loglikelihood_rolling", [("short",), (LONG,)])
    found, wanted = (model.loglikelihood_rolling(documents, disable_tqdm=True) for model in (ours, theirs))
    np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=1e-6)
    how = {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", [(context, how) for context, _ in said()] + [(LONG, how)])
    assert ours.generate_until(asked, disable_tqdm=True) == theirs.generate_until(asked, disable_tqdm=True)


def test_a_document_is_worth_the_sum_of_its_tokens_each_with_the_context_of_its_window(ours):
    tokens = TOKENIZER.encode(LONG)
    row, total, begin = [TOKENIZER.eos_token_id, *tokens], 0.0, 0
    logits_of = jax.jit(lambda row: MODEL.logits(PARAMS, MODEL.apply(PARAMS, row)))
    while begin < len(tokens):
        end = min(begin + 64, len(tokens))
        first = 0 if begin == 0 else end - 64  # of what is read; row is one ahead of tokens
        read = jnp.asarray([row[first:end]], jnp.int32)
        logits = np.asarray(logits_of(read), np.float64)[0]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total += sum(log_probs[t - first, tokens[t]] for t in range(begin, end))
        begin = end
    [found] = ours.loglikelihood_rolling(requests("loglikelihood_rolling", [(LONG,)]), disable_tqdm=True)
    np.testing.assert_allclose(found, total, rtol=1e-5)


def test_answers_do_not_depend_on_the_number_of_slots(ours, folder):
    one = harness_model(folder, batch_size=1)
    pairs = requests("loglikelihood", PAIRS)
    found, wanted = (model.loglikelihood(pairs, disable_tqdm=True) for model in (one, ours))
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], atol=1e-4)
    for how in ({"max_gen_toks": 9, "until": []}, {"max_gen_toks": 9, "until": [], "temperature": 0.9}):
        asked = requests("generate_until", [(context, how) for context in ["a", "bb", "a", LONG]])
        texts = one.generate_until(asked, disable_tqdm=True)
        assert texts == ours.generate_until(asked, disable_tqdm=True)
        assert (texts[0] == texts[2]) == ("temperature" not in how)  # a repeat is drawn anew


def test_completions_are_greedy_and_end_before_a_stop_string(ours):
    contexts = ["a", "what?", "why?"]
    free = [c.text for [c] in SAMPLER.sample(contexts, Sampling(max_tokens=30, temperature=0.0))]
    asked = requests("generate_until", [(context, {"until": [], "max_gen_toks": 30}) for context in contexts])
    assert ours.generate_until(asked, disable_tqdm=True) == free
    word = free[0][3:5]
    [found] = ours.generate_until(
        requests("generate_until", [("a", {"until": word, "max_gen_toks": 30})]), disable_tqdm=True
    )
    assert found == free[0][: free[0].index(word)]


def test_messages_go_through_the_template_and_can_be_gone_on_with(ours):
    messages = [{"role": "user", "content": "hello"}]
    asked = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages) == asked
    begun = [*messages, {"role": "assistant", "content": "I"}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == asked + "I"
    assert ours.chat_template(True) == TOKENIZER.chat_template
    assert len(ours.tokenizer_name) == 64


def test_bos_appears_once():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", bos)])
    model = harness_model(Sampler(MODEL, PARAMS, tokenizer))
    assert model.prefix_token_id == bos
    for text in ("a", "<|im_start|>a"):
        assert model.tok_encode(text) == [bos, 97]
    assert model.tok_encode("a", add_special_tokens=False) == [97]


CHOICES = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
KINDS = {
    "multiple_choice": 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]\n',
    "generate_until": 'doc_to_target: "{{said}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 6}\n'
    "metric_list: [{metric: exact_match}]\n",
}


def write_task(folder, kind):
    """A task of twelve questions on disk; the right answers are drawn, half of the texts are what the model says."""
    generator = np.random.default_rng(0)
    rows = []
    texts = SAMPLER.sample([f"{i}: " for i in range(12)], Sampling(max_tokens=6, temperature=0.0, stop=("\n",)))
    for i, [completion] in enumerate(texts):
        right = int(generator.integers(3))
        text = completion.text if i % 2 else "no"
        rows.append({"question": f"{i}: ", "choices": [" one", " two", " three"], "answer": right, "said": text})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CHOICES.format(data=folder / "data.jsonl", cache=folder / "cache", kind=kind) + KINDS[kind]
    (folder / "tasks").mkdir()
    (folder / "tasks" / "letters.yaml").write_text(text)
    return rows


def test_a_task_of_choices_is_evaluated_offline(ours, tmp_path):
    rows = write_task(tmp_path, "multiple_choice")
    tasks = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(model=ours, tasks=["letters"], task_manager=tasks, bootstrap_iters=0)
    right = 0
    for row in rows:
        before = TOKENIZER.encode(row["question"].rstrip())
        scores = SAMPLER.score([before] * 3, [" " + choice for choice in row["choices"]])
        right += int(np.argmax([score.sum() for score in scores])) == row["answer"]
    assert found["results"]["letters"]["acc,none"] == right / 12 and 0 < right < 12
    assert found["config"]["model_num_parameters"] == sum(x.size for x in jax.tree.leaves(PARAMS))


def test_the_script_is_the_harness_command_line(folder, tmp_path, monkeypatch, capsys):
    write_task(tmp_path, "generate_until")
    root = Path(__file__).resolve().parents[2]
    arguments = [
        "run",
        "--model",
        "jaxlm",
        "--model_args",
        f"pretrained={folder}",
        "--tasks",
        "letters",
        "--batch_size",
    ]
    arguments += ["16", "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "found.json")]
    whole = TaskManager.__init__  # to list the thousands of tasks that come with the harness takes nine seconds
    monkeypatch.setattr(TaskManager, "__init__", lambda *a, **how: whole(*a, **how | {"include_defaults": False}))
    monkeypatch.setattr(sys, "argv", [str(root / "scripts/harness.py"), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(root / "scripts/harness.py"), run_name="__main__")
    assert not end.value.code
    [report] = tmp_path.glob("found_*.json")
    assert json.loads(report.read_text())["results"]["letters"]["exact_match,none"] == 0.5
    assert "exact_match" in capsys.readouterr().out


def test_the_harness_knows_the_model_by_name(folder):
    from lm_eval.api.registry import get_model

    assert get_model("jaxlm") is harness_class()
    model = get_model("jaxlm").create_from_arg_string(f"pretrained={folder},max_length=32", {"batch_size": 2})
    assert (model.max_length, model.batch_size, model.sampler.num_slots) == (32, 2, 2)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_beams": 4}, r"\['num_beams'\] are not known here; there are .*'temperature'"),
        ({"max_gen_toks": 64}, "max_gen_toks=64 leaves no room for a prompt in the 64 tokens"),
        ({"do_sample": True, "max_gen_toks": 4}, "do_sample=True needs a temperature above 0"),
    ],
)
def test_what_cannot_be_generated_is_refused(ours, how, message):
    with pytest.raises(ValueError, match=message):
        ours.generate_until(requests("generate_until", [("a", {"until": [], "max_gen_toks": 8} | how)]))


def test_what_cannot_be_scored_or_made_is_refused(ours, folder, monkeypatch):
    with pytest.raises(ValueError, match=r"a continuation of 200 tokens cannot be scored: .* at most 64"):
        ours.loglikelihood(requests("loglikelihood", [("a", "b" * 200)]), disable_tqdm=True)
    with pytest.raises(ValueError, match="batch_size must be a number, got 'auto'"):
        harness_class()(folder, batch_size="auto")
    with pytest.raises(ValueError, match="are those of the sampler: set them there"):
        harness_model(SAMPLER, max_length=8)
    harness_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxlm\[harness\]'"):
        harness_class()
