import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lorakit.data.metrics.basic import accuracy, bleu, exact_match, matthews, pearson
from lorakit.data.metrics.classes import spearman
from lorakit.errors import DataError, MissingExtraError


def test_exact_match_is_the_share_that_equals_any_reference() -> None:
    outputs = ["a b", " c\n", "d", "E"]
    references = [["x", "a b"], ["c "], ["d d"], ["e"]]
    assert exact_match(outputs, references) == 0.5


def test_accuracy_is_the_share_that_is_right() -> None:
    assert accuracy([1, 0, 1, 1], [1, 1, 1, 0]) == 0.5
    assert accuracy(["a"], ["a"]) == 1.0


def test_pearson_agrees_with_numpy_and_a_hand_computed_value() -> None:
    # Deviations (-1, 0, 1) and (-1, 1, 0): 1 / sqrt(2 · 2).
    assert pearson([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]) == pytest.approx(0.5)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 100))
    assert pearson(list(x), list(y)) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert pearson([0.1, 0.2, 0.3], [-1.0, -2.0, -3.0]) == pytest.approx(-1)


def test_matthews_agrees_with_scikit_learn_and_a_hand_computed_value() -> None:
    # One true positive, two true negatives, one false positive: 2 / sqrt(2 · 1 · 3 · 2).
    assert matthews([1, 0, 0, 1], [1, 0, 0, 0]) == pytest.approx(2 / math.sqrt(12))
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for classes in (2, 3):
        x, y = rng.integers(classes, size=(2, 100)).tolist()
        assert matthews(x, y) == pytest.approx(sklearn.matthews_corrcoef(y, x))
    assert matthews([1, 1, 1], [0, 1, 1]) == 0


@pytest.mark.parametrize("correlation", [pearson, spearman])
@pytest.mark.parametrize("constant", [[0.1, 0.1, 0.1], [1.0, 1.0, 1.0], [2.0]])
def test_a_constant_side_has_no_correlation(
    constant: list[float], correlation: Callable[..., float]
) -> None:
    other = [1.0, 2.0, 3.0][: len(constant)]
    assert math.isnan(correlation(constant, other))
    assert math.isnan(correlation(other, constant))


def test_bleu_of_one_sentence_is_the_formula() -> None:
    # Of "a b c d e" against "a b c d f g": precisions 4/5, 3/4, 2/3, 1/2, brevity exp(1 - 6/5).
    by_hand = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 6 / 5)
    assert bleu(["a b c d e"], [["a b c d f g"]]) == pytest.approx(by_hand)


def test_bleu_takes_the_best_of_ragged_references_in_any_case() -> None:
    outputs = ["The cat sat on the mat", "a dog ran off again"]
    assert bleu(outputs, [["x", "y z", "the CAT sat on the mat"], ["A dog ran off again"]]) == (
        pytest.approx(100)
    )
    assert bleu(outputs, [["x"], ["A dog ran off again"]]) < 70


@pytest.mark.parametrize(
    ("metric", "output", "expected"),
    [
        (exact_match, "a", ["a"]),
        (accuracy, "a", "a"),
        (pearson, 1.0, 1.0),
        (bleu, "a", ["a"]),
    ],
)
def test_nothing_has_no_score(metric: Callable[..., float], output: Any, expected: Any) -> None:
    with pytest.raises(DataError, match="found 0 outputs and 0 expectations"):
        metric([], [])
    with pytest.raises(DataError, match="found 1 outputs and 2 expectations"):
        metric([output], [expected, expected])


def test_bleu_without_a_reference_is_refused() -> None:
    with pytest.raises(DataError, match="1 of 2 outputs have none"):
        bleu(["a", "b"], [["a"], []])


def test_bleu_without_sacrebleu_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingExtraError, match=r"BLEU needs .*'lorakit\[metrics\]'"):
        bleu(["a"], [["a"]])
