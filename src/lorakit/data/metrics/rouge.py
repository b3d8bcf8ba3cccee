"""ROUGE of summaries, by rouge-score, the reference implementation in Python."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.errors import MissingExtraError

NAMES = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l", "rougeLsum": "rouge_lsum"}


def rouge_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, stemmer: bool = True
) -> dict[str, float]:
    """`rouge1`, `rouge2`, `rouge_l` and `rouge_lsum`: the mean F1 of all outputs, from 0 to 1.

    Of several references the one with the best F1 counts, for each score by itself. `rouge_lsum`
    takes the sentences from line breaks, the others do not see them.

    Raises:
        MissingExtraError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtraError("ROUGE", "metrics") from None
    scorer = RougeScorer(list(NAMES), use_stemmer=stemmer)
    best = [
        scorer.score_multi(list(known), output)
        for output, known in zip(outputs, references, strict=True)
    ]
    return {
        ours: sum(scores[name].fmeasure for scores in best) / len(best)
        for name, ours in NAMES.items()
    }
