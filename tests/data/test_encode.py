# SPDX-License-Identifier: Apache-2.0
"""Masks: exactly the assistant's tokens with their end marker, under several chat templates."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from jaxlm.data.encode import Encoder
from jaxlm.data.records import BadRecord, parse
from jaxlm.data.tokenizers import byte_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>")
MARKED_WITH_NEWLINE = MARKED.replace("'<|im_end|>' }}{% endgen", "'<|im_end|>\n' }}{% endgen").replace("{{ '\n' }}", "")
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
REWRITING = (  # like templates that add an empty thought to the last turn only
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "the quick brown fox says hello to 12 dogs.\n\nThen  it sleeps; yes, it does!\n def f(x):\n    return x\n" * 3


def bpe_tokenizer(template, *, eos, trim_offsets=True, writes_bos=True):
    """A byte-level BPE that merges words, white space and punctuation, as those of Llama 3 and GPT-2 do."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(
                    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|[^\r\n\p{L}\p{N}]?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    special = ["<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens(special)
    processors = [tokenizers.processors.ByteLevel(trim_offsets=trim_offsets)]
    if writes_bos:
        bos = [("<s>", backend.token_to_id("<s>"))]
        processors.append(tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=bos))
    backend.post_processor = tokenizers.processors.Sequence(processors)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos, chat_template=template
    )


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


CASES = {  # name -> tokenizer, what follows each answer and is trained, number of BOS
    "chatml": (byte_tokenizer(), "<|im_end|>", None),
    "llama3": (bpe_tokenizer(LLAMA3, eos="<|eot_id|>"), "<|eot_id|>", 1),
    "marked": (with_template(MARKED), "<|im_end|>", None),
    "marked without end": (with_template(MARKED_WITHOUT_END), "<|im_end|>", None),
    "marked with newline": (with_template(MARKED_WITH_NEWLINE), "<|im_end|>", None),
    "brackets": (bpe_tokenizer(BRACKETS, eos="</s>"), "</s>", 1),
    "tokenizer writes bos": (bpe_tokenizer(MARKED, eos="<|im_end|>"), "<|im_end|>", 1),
}
words = st.text(st.sampled_from(list("ab 12.;\nx\u00e9(")), min_size=1, max_size=12).filter(lambda text: text.strip())
turns = st.lists(st.tuples(words, words), min_size=1, max_size=3)


def chat(turns):
    return parse(
        {"messages": [{"role": r, "content": c} for t in turns for r, c in zip(("user", "assistant"), t, strict=True)]}
    )


def runs(tokenizer, encoded):
    """The decoded text of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(encoded.trained)) + 1
    pieces = zip(np.split(encoded.tokens, edges), np.split(encoded.trained, edges), strict=True)
    return [tokenizer.decode(tokens, clean_up_tokenization_spaces=False) for tokens, trained in pieces if trained[0]]


@pytest.mark.parametrize("case", CASES)
@settings(deadline=None, max_examples=30)
@given(turns=turns)
def test_each_turn_of_the_assistant_is_trained_with_its_end_marker_and_nothing_else(case, turns):
    tokenizer, end, _ = CASES[case]
    turns = [(question.strip(), answer.strip()) for question, answer in turns]
    encoded = Encoder(tokenizer).encode(chat(turns))
    space = " " if case == "brackets" else ""  # written by the template after the prompt
    assert runs(tokenizer, encoded) == [space + answer + end for _, answer in turns]


@pytest.mark.parametrize("case", CASES)
def test_a_chat_holds_as_many_beginnings_as_it_should(case):
    tokenizer, _, expected = CASES[case]
    encoded = Encoder(tokenizer).encode(chat([("hi", "yes"), ("and?", "no")]))
    if expected is not None:
        assert (encoded.tokens == tokenizer.bos_token_id).sum() == expected
        assert encoded.tokens[0] == tokenizer.bos_token_id


def test_tokens_are_those_of_the_rendered_chat():
    for tokenizer, _, bos in CASES.values():
        record = chat([("hello to 12 dogs", "yes,  it does!"), ("and\n\nthen?", "sleeps")])
        text = tokenizer.apply_chat_template(list(record.messages), tokenize=False)
        ours = Encoder(tokenizer).encode(record).tokens.tolist()
        theirs = tokenizer(text, add_special_tokens=False).input_ids
        assert ours in (theirs, [tokenizer.bos_token_id, *theirs]) and (bos is None or ours.count(ours[0]) == 1)


@pytest.mark.parametrize("completion", ["\n\n hello\n", "hello  ", "  hello;\n "])
def test_white_space_at_the_edge_of_an_answer_belongs_to_it(completion):
    """Byte-level tokenizers trim white space from offsets: a mask made of those loses it."""
    tokenizer = bpe_tokenizer(None, eos="</s>")
    encoded = Encoder(tokenizer).encode(parse({"prompt": "fox says:", "completion": completion}))
    assert runs(tokenizer, encoded) == [completion + "</s>"]


@settings(deadline=None, max_examples=30)
@given(prompt=words, completion=words)
def test_a_raw_completion_is_trained_with_the_end_and_the_prompt_is_not(prompt, completion):
    encoded = Encoder(byte_tokenizer()).encode(parse({"prompt": prompt, "completion": completion}))
    assert runs(byte_tokenizer(), encoded) == [completion + "<|im_end|>"]


def test_a_token_across_the_boundary_is_trained():
    tokenizer = bpe_tokenizer(None, eos="</s>")
    encoded = Encoder(tokenizer).encode(parse({"prompt": "fox says he", "completion": "llo"}))
    assert runs(tokenizer, encoded) == [" hello</s>"]


def test_the_end_marker_is_trained_where_it_is_also_the_padding():
    tokenizer = CASES["llama3"][0]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for record in ({"prompt": "fox", "completion": " says"}, {"text": "fox says"}):
        encoded = Encoder(tokenizer).encode(parse(record))
        assert encoded.tokens[-1] == tokenizer.eos_token_id and encoded.trained[-1]


def test_raw_text_has_one_beginning_and_one_end_also_where_it_brings_its_own():
    tokenizer = bpe_tokenizer(None, eos="</s>")
    for text in ("fox says", "<s>fox says", "fox says</s>", "<s>fox says</s>"):
        encoded = Encoder(tokenizer).encode(parse({"text": text}))
        assert tokenizer.decode(encoded.tokens) == "<s>fox says</s>"
        assert encoded.trained.tolist() == [False] + [True] * (len(encoded.tokens) - 1)
    plain = bpe_tokenizer(None, eos="</s>", writes_bos=False)
    assert plain.decode(Encoder(plain).encode(parse({"text": "fox says"})).tokens) == "fox says</s>"


def test_a_prompt_becomes_a_turn_where_the_config_says_so():
    encoder = Encoder(byte_tokenizer(), prompts="chat")
    given_turns = encoder.encode(chat([("1+1=", "2")]))
    assert (
        encoder.encode(parse({"prompt": "1+1=\n", "completion": " 2"})).tokens.tolist() == given_turns.tokens.tolist()
    )


@pytest.mark.parametrize(
    ("tokenizer", "record", "reason", "message"),
    [
        (with_template(REWRITING), chat([("a", "b"), ("c", "d")]), "template", "rewrites earlier text"),
        (CASES["brackets"][0], parse({"messages": [{"role": "system", "content": "x"}, *chat([("a", "b")]).messages]}),
         "template", "only user and assistant"),
        (byte_tokenizer(), chat([("a<|im_end|>", "b")]), "special token", "message 0 holds '<|im_end|>'"),
        (bpe_tokenizer(None, eos="</s>"), parse({"text": "fox <s> says"}), "special token", "'<s>'"),
        (with_template(None), chat([("a", "b")]), "template", "has none"),
        (byte_tokenizer(), parse({"messages": [{"role": "assistant", "content": "x"}]}), "template", "begins with"),
        (with_template("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
                       "{% if add_generation_prompt %}assistant: {% endif %}"),
         chat([("a", "b")]), "template", "no end-of-turn token"),
        (with_template(MARKED.replace("{% else %}", "{% elif m['role'] == 'user' %}")),
         parse({"messages": [{"role": "tool", "content": "result"}, *chat([("a", "b")]).messages]}),
         "template", "does not write message 0 of role 'tool'"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_tell_is_refused_by_name(tokenizer, record, reason, message):
    with pytest.raises(BadRecord, match=message.replace("|", r"\|")) as caught:
        Encoder(tokenizer).encode(record)
    assert caught.value.reason == reason


def test_a_tool_is_heard_where_the_template_speaks_of_it():
    record = parse(
        {"messages": [*chat([("a", "b")]).messages, {"role": "tool", "content": "7"}, *chat([("c", "d")]).messages]}
    )
    assert runs(byte_tokenizer(), Encoder(byte_tokenizer()).encode(record)) == ["b<|im_end|>", "d<|im_end|>"]


def test_prompts_as_chat_need_a_template():
    with pytest.raises(ValueError, match="prompts='raw'"):
        Encoder(with_template(None), prompts="chat")
