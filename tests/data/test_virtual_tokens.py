"""The positions of virtual tokens in a sequence, and the sequence's labels and token types."""

import pytest

from lorakit.data.chat import IGNORED
from lorakit.data.samples import Example
from lorakit.data.virtual_tokens import VirtualTokens

NONE = IGNORED
CAUSAL = VirtualTokens(first=100, prefix=2, infix=1, causal=True)
ENCODER = VirtualTokens(first=100, prefix=2, infix=1, causal=False)


def test_a_prompt_is_between_prefix_and_infix():
    row = Example(input_ids=[1, 5, 6, 7], labels=[NONE, NONE, 6, 7])
    found = CAUSAL.into(row)
    assert found.input_ids == [100, 101, 1, 5, 102, 6, 7]
    assert found.labels == [NONE, NONE, NONE, NONE, NONE, 6, 7]


def test_a_conversation_has_its_infix_before_the_first_answer():
    row = Example(input_ids=[1, 5, 6, 7], labels=[NONE, 5, NONE, 7])
    assert CAUSAL.into(row).input_ids == [100, 101, 1, 102, 5, 6, 7]


def test_a_text_has_a_prefix_alone_and_learns_what_it_would_without():
    row = Example(input_ids=[5, 6, 7], labels=[5, 6, 7])
    found = CAUSAL.into(row)
    assert found.input_ids == [100, 101, 5, 6, 7]
    assert found.labels == [NONE, NONE, NONE, 6, 7]


def test_a_row_to_classify_keeps_its_first_token_first_and_has_the_infix_at_its_end():
    row = Example(input_ids=[1, 5, 2, 6, 2], labels=1, token_type_ids=[0, 0, 0, 1, 1])
    found = ENCODER.into(row)
    assert found.input_ids == [1, 100, 101, 5, 2, 6, 2, 102]
    assert found.token_type_ids == [0, 0, 0, 0, 0, 1, 1, 1]
    assert found.labels == 1


def test_a_decoder_that_classifies_reads_the_infix_last():
    row = Example(input_ids=[5, 6], labels=0.5, token_type_ids=[1, 1])
    found = CAUSAL.into(row)
    assert found.input_ids == [100, 101, 5, 6, 102]
    assert found.token_type_ids == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("tokens", [CAUSAL, ENCODER])
def test_nothing_of_a_row_is_lost(tokens):
    for length in range(1, 5):
        for prompt in range(length + 1):
            order = tokens.order(length, prompt)
            assert [at for at in order if at >= 0] == list(range(length))
            assert [~at for at in order if at < 0] == ([0, 1, 2] if prompt else [0, 1])
