# SPDX-License-Identifier: Apache-2.0
"""Laws of a text that grows by tokens: said piece by piece it is the text of all of them."""

import numpy as np
import pytest

from jaxlm.data import byte_tokenizer
from jaxlm.generate.texts import Piece, TextSoFar

TOKENIZER = byte_tokenizer()


def piece(tokens):
    return Piece(np.asarray(tokens, np.int32), *np.zeros((2, len(tokens)), np.float32))


def grown(tokens, cuts, stop=()):
    """(what was said piece by piece, the completion)."""
    text, said, start = TextSoFar(TOKENIZER, stop), "", 0
    for stop_at in [*cuts, len(tokens)]:
        said += text.add(piece(tokens[start:stop_at]), stops=np.array([-1]))
        start = stop_at
    text.end("length")
    return said + text.rest(), text.completion()


def decoded(tokens):
    return TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_join_to_the_text_of_all_tokens(seed):
    """Letters, characters of several bytes, bytes that are no text, special tokens; cut anywhere."""
    rng = np.random.default_rng(seed)
    good = list(("plain words \u00e4\u20ac\U0001f600 " * 6).encode())
    tokens = [*good[: rng.integers(150)], *rng.integers(0, 259, 40).tolist(), *good[rng.integers(9) :]]
    cuts = sorted(rng.integers(0, len(tokens), rng.integers(0, 30)).tolist())
    said, completion = grown(tokens, cuts)
    assert said == completion.text == decoded(tokens)
    assert completion.tokens.tolist() == tokens


def test_a_stop_string_over_the_border_of_two_pieces_is_found():
    tokens = list(b"some words that are long enough to be settled, then STOP and more")
    at = len(tokens) - 10
    said, completion = grown(tokens, [20, 40, at], stop=("STOP",))
    assert said == completion.text == "some words that are long enough to be settled, then "
    assert decoded(completion.tokens) == completion.text + "STOP" and completion.finish_reason == "stop"


def test_only_the_newest_tokens_are_decoded_again():
    longest = 0

    class Counting:
        def decode(self, tokens, **options):
            nonlocal longest
            longest = max(longest, len(tokens))
            return TOKENIZER.decode(tokens, **options)

    text = TextSoFar(Counting())
    for _ in range(100):
        text.add(piece(list(b"sixteen letters!")), stops=np.array([-1]))
    assert longest <= 64 and len(text.rest() + "") == 0
