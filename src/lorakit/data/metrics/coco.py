"""ROUGE-L, CIDEr and METEOR as E2E's scorer computes them: on the COCO metrics' tokens."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.data.metrics import java
from lorakit.data.metrics.meteor.score import meteor
from lorakit.data.metrics.ptb import coco_tokens
from lorakit.errors import MissingExtraError


def coco_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, use_java: bool = False
) -> dict[str, float]:
    """`meteor` and `rouge_l` (0 to 1), and `cider` (0 to 10), of a whole file.

    CIDEr's weights of words come from the references of this file: scores of parts of a file cannot
    be averaged.

    Args:
        outputs: one text each.
        references: of each output, one or more.
        use_java: let CoreNLP and METEOR's own program do their parts, as a check of ours.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
        DataError: there is no Java, where `use_java` asks for it.
    """
    try:
        from pycocoevalcap.cider.cider_scorer import CiderScorer
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        raise MissingExtraError("ROUGE-L and CIDEr", "metrics") from None
    cut = java.coco_tokens if use_java else coco_tokens
    # Outputs and references are cut in two runs, as by the scorer.
    lines = [" ".join(tokens) for tokens in cut(outputs)]
    flat = iter([" ".join(tokens) for tokens in cut([text for k in references for text in k])])
    known = [[next(flat) for _ in texts] for texts in references]
    rouge = [Rouge().calc_score([line], texts) for line, texts in zip(lines, known, strict=True)]
    cider = CiderScorer()
    for line, texts in zip(lines, known, strict=True):
        cider += (line, texts)
    score = (java.meteor if use_java else meteor)(lines, known)[0]
    return {
        "meteor": score,
        "rouge_l": sum(rouge) / len(rouge),
        "cider": float(cider.compute_score()[0]),
    }
