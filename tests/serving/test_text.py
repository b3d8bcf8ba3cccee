"""Texts that grow: every piece is certain, and stop texts end them wherever they are cut."""

import pytest

from lorakit.serving.text import GrowingText


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", errors="replace")


class Pieces:
    """A tokenizer with pieces of text, and a space before all but the first; None: special."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(self.pieces[token] for token in ids if self.pieces[token])


def fed(text, ids):
    given = []
    for token in ids:
        given.append(text.add(token))
        if text.stopped is not None:
            break
    return [*given, text.end()]


@pytest.mark.parametrize("whole", ["plain", "grün und 你好 🙂!", "a\ufffdb"])
def test_pieces_together_are_the_text(whole):
    given = fed(GrowingText(Bytes()), whole.encode())
    assert "".join(given) == whole


def test_no_piece_has_half_a_character():
    given = fed(GrowingText(Bytes()), "é🙂".encode())
    assert given == ["", "é", "", "", "", "🙂", ""]


def test_what_never_becomes_a_character_comes_at_the_end():
    assert fed(GrowingText(Bytes()), "é".encode()[:1]) == ["", "\ufffd"]


def test_a_token_has_the_space_that_it_has_in_the_whole():
    assert fed(GrowingText(Pieces("the", "sea")), [0, 1, 1]) == ["the", " sea", " sea", ""]
    special = fed(GrowingText(Pieces("the", None)), [1, 0, 1, 1, 0, 0])
    assert special == ["", "the", "", "", " the", " the", ""]


@pytest.mark.parametrize(
    ("stops", "include", "expected"),
    [
        (["END"], False, "one EN two "),
        (["END"], True, "one EN two END"),
        (["x", "two"], False, "one EN "),
        (["never"], False, "one EN two END more"),
        (["e EN", "one"], False, ""),
    ],
)
def test_a_stop_text_ends_the_answer_across_tokens(stops, include, expected):
    text = GrowingText(Bytes(), stops, include_stop=include)
    given = fed(text, b"one EN two END more")
    assert "".join(given) == expected
    assert (text.stopped is None) == (stops == ["never"])


def test_what_may_begin_a_stop_text_is_kept_back():
    text = GrowingText(Bytes(), ["abc"])
    assert [text.add(token) for token in b"xabab"] == ["x", "", "", "ab", ""]
    assert text.end() == "ab"
