# SPDX-License-Identifier: Apache-2.0
"""The byte tokenizer: any text, and the same after it was saved."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.tokenizers import byte_tokenizer, digest, load_tokenizer

TOKENIZER = byte_tokenizer()


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_tokens_are_the_bytes_and_decode_to_the_text(text):
    tokens = TOKENIZER(text).input_ids
    assert tokens == list(text.encode())
    assert TOKENIZER.decode(tokens, clean_up_tokenization_spaces=False) == text


def test_every_id_is_a_byte_or_one_of_three_marks():
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(259))
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.bos_token_id) == (256, 258, None)


def test_a_saved_tokenizer_is_read_back_equal(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert digest(again) == digest(TOKENIZER)
    text = TOKENIZER.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert again(text).input_ids == TOKENIZER(text).input_ids


def test_using_a_tokenizer_leaves_its_digest_alone():
    tokenizer = byte_tokenizer()
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert digest(tokenizer) == digest(TOKENIZER)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
