"""BLEU and NIST of the E2E challenge's scorer."""

import math

import pytest

from lorakit.data.metrics.mteval import bleu_and_nist


def test_bleu_of_one_sentence_is_the_formula() -> None:
    # Precisions 4/5, 3/4, 2/3 and 1/2; five words where the reference has six.
    by_hand = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 6 / 5)
    for variant in ("python", "perl"):
        bleu, _ = bleu_and_nist(["a b c d e"], [["a b c d f g"]], variant=variant)
        assert bleu == pytest.approx(by_hand)


def test_nist_weighs_words_by_their_rarity() -> None:
    # Of four reference words "a" is two: log2(4/2) = 1 bit, "b" log2(4/1) = 2; "a b" follows one of
    # the two "a": 1 bit. Two words of the output, one pair; the output is as long as half of the
    # reference, so the penalty is exp(-ln 2 / ln² 1.5 · ln² 0.5).
    _, nist = bleu_and_nist(["a b"], [["a b a c"]], variant="python")
    penalty = math.exp(-math.log(2) / math.log(1.5) ** 2 * math.log(0.5) ** 2)
    assert nist == pytest.approx(((1 + 2) / 2 + 1 / 1) * penalty)


def test_the_variants_differ_in_smoothing_and_accents() -> None:
    plain = {v: bleu_and_nist(["a b c x"], [["a b c d"]], variant=v)[0] for v in ("python", "perl")}
    assert plain["python"] == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1e-15) ** 0.25)
    assert plain["perl"] == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 0.5) ** 0.25)
    upper = {v: bleu_and_nist(["É A B C"], [["é a b c"]], variant=v)[0] for v in ("python", "perl")}
    assert upper["python"] == pytest.approx(1)
    assert upper["perl"] < 0.7


def test_an_empty_output_is_one_word_in_the_python_variant() -> None:
    outputs, references = ["", "a b c d"], [["x"], ["a b c d"]]
    perl, _ = bleu_and_nist(outputs, references, variant="perl")
    python, _ = bleu_and_nist(outputs, references, variant="python")
    assert perl == pytest.approx(math.exp(1 - 5 / 4))
    # Four of five words; the empty output takes away 1, 2 and 3 of the longer n-grams' totals.
    assert python == pytest.approx((4 / 5 * 3 / 3 * 2 / 1 * 1 / 1e-9) ** 0.25)
