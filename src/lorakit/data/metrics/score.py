"""Scores of a task's outputs by its official scorer: one function for every task of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from lorakit.data.metrics.coco import coco_scores
from lorakit.data.metrics.glue import NAMES, glue_scores
from lorakit.data.metrics.meteor.tables import check_files
from lorakit.data.metrics.mteval import bleu_and_nist
from lorakit.data.metrics.rouge import rouge_scores
from lorakit.data.metrics.triples import dart_scores, webnlg_scores
from lorakit.data.metrics.wikisql import same_form, same_result
from lorakit.errors import ConfigError, DataError, MissingExtraError, did_you_mean

VERSION = 1
"""Of the scorers: a number that any change of a score raises, so that results know theirs."""

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "e2e": ("python", "perl"),
    "webnlg": ("official", "paper"),
    "dart": ("official", "paper"),
}
"""The variants of tasks that have several; the first is the default."""

_SCORERS = {
    "e2e": "e2e-metrics 1b9c4d87",
    "webnlg": "WebNLG GenerationEval 80678494 or microsoft/LoRA c4593f06",
    "dart": "Yale-LILY/dart bb644b12 or microsoft/LoRA c4593f06",
    "samsum": "rouge-score 0.1.2, stemmed",
    "wikisql": "salesforce/WikiSQL 7857cfd8",
}
_NAMES = {
    "e2e": ("bleu", "nist", "meteor", "rouge_l", "cider"),
    "webnlg": tuple(
        f"{score}{part}" for part in ("", "_seen", "_unseen") for score in ("bleu", "meteor", "ter")
    ),
    "dart": ("bleu", "meteor", "ter"),
    "samsum": ("rouge1", "rouge2", "rouge_l", "rouge_lsum"),
    "wikisql": ("logical_form", "execution"),
    **NAMES,
}
TASKS = tuple(_NAMES)


def score_names(task: str) -> tuple[str, ...]:
    """The names of a task's scores."""
    return _NAMES[_known(task)]


def scorer(task: str, variant: str | None = None) -> str:
    """What a score was made by: the official scorer that ours equals, variant and version."""
    name = _SCORERS.get(_known(task), "GLUE's formulas")
    chosen = _variant(task, variant)
    return f"{name}{f', variant {chosen}' if chosen else ''} (lorakit's scorer, version {VERSION})"


_METEOR = ("pycocoevalcap", "nltk")
_TRIPLES = ("sacrebleu", *_METEOR)
_LIBRARIES: Mapping[tuple[str, str | None], tuple[str, ...]] = {
    ("e2e", "python"): _METEOR,
    ("e2e", "perl"): _METEOR,
    ("webnlg", "official"): (*_TRIPLES, "unidecode"),
    ("webnlg", "paper"): _TRIPLES,
    ("dart", "official"): _TRIPLES,
    ("dart", "paper"): _TRIPLES,
    ("samsum", None): ("rouge_score",),
    ("cola", None): ("sklearn",),
    ("mrpc", None): ("sklearn",),
    ("qqp", None): ("sklearn",),
    ("stsb", None): ("scipy",),
}
"""The modules that the scorers of tasks import, by task and variant; others need none."""


def check_scorer(task: str, variant: str | None = None) -> None:
    """Make sure that all a task's scorer needs is installed, before hours are spent on outputs.

    Raises:
        ConfigError: the task or the variant is unknown.
        MissingExtraError: a library is not installed.
        DataError: METEOR's data is missing.
    """
    modules = _LIBRARIES.get((task, _variant(task, variant)), ())
    if any(find_spec(module) is None for module in modules):
        raise MissingExtraError(f"the scorer of {task}", "metrics")
    if "pycocoevalcap" in modules:
        check_files()


def score(
    task: str,
    outputs: Sequence[Any],
    references: Sequence[Any],
    *,
    variant: str | None = None,
    tables: Sequence[Mapping[str, Any]] | None = None,
    seen: Sequence[bool] | None = None,
    use_java: bool = False,
) -> dict[str, float]:
    """The scores of a task's outputs, equal to those of its official scorer.

    Args:
        task: e2e, webnlg, dart, samsum, wikisql, or a task of GLUE (cola, sst2, mrpc, qqp, stsb,
            mnli, qnli, rte).
        outputs: one each: a text; for wikisql a query as a dictionary of `sel`, `agg` and `conds`,
            or None; for GLUE a class's number or name, or a score.
        references: of each output a list of texts; for wikisql the right query; for GLUE the right
            class or score.
        variant: of e2e `python` (as the paper's code scores; the default) or `perl`; of webnlg and
            dart `official` (the default) or `paper`.
        tables: for wikisql the table of each query, a dictionary of `types` and `rows`; without
            them there is no `execution`.
        seen: for webnlg whether the category of each output's triples occurs in training; with it
            there are scores of the two parts too.
        use_java: let the official Java programs do their part of e2e, as a check of ours.

    Returns:
        For e2e `bleu` (0 to 1), `nist`, `meteor`, `rouge_l` and `cider`; for webnlg and dart `bleu`
        (0 to 100), `meteor` and `ter` (shares), with `seen` also `bleu_seen`, `bleu_unseen` and so
        on; for samsum `rouge1`, `rouge2`, `rouge_l` and
        `rouge_lsum`; for wikisql `logical_form` and, with tables, `execution`; for GLUE `accuracy`,
        `f1`, `matthews`, `pearson` and `spearman` as each task has them (shares).

    Raises:
        ConfigError: the task or the variant is unknown.
        DataError: there are no outputs, not as many references, or an output without one; a file
            of METEOR is missing.
        MissingExtraError: a library of the extra `metrics` is not installed.

    Examples:
        >>> lk.score("sst2", [1, 0, 1, 1], [1, 0, 0, 1])
        {'accuracy': 0.75}
    """
    chosen: Any = _variant(task, variant)
    _check(task, outputs, references)
    check_scorer(task, variant)
    if task == "e2e":
        bleu, nist = bleu_and_nist(outputs, references, variant=chosen)
        return {"bleu": bleu, "nist": nist, **coco_scores(outputs, references, use_java=use_java)}
    if task == "webnlg":
        _check_each("webnlg", outputs, "marks of seen categories", seen)
        return webnlg_scores(outputs, references, variant=chosen, seen=seen)
    if task == "dart":
        return dart_scores(outputs, references, variant=chosen)
    if task == "samsum":
        return rouge_scores(outputs, references)
    if task == "wikisql":
        return _wikisql(outputs, references, tables)
    return glue_scores(task, outputs, references)


def _wikisql(
    outputs: Sequence[Any], references: Sequence[Any], tables: Sequence[Mapping[str, Any]] | None
) -> dict[str, float]:
    pairs = list(zip(outputs, references, strict=True))
    scores = {"logical_form": sum(same_form(*pair) for pair in pairs) / len(pairs)}
    if tables is not None:
        _check_each("wikisql", outputs, "tables", tables)
        right = [same_result(*pair, table) for pair, table in zip(pairs, tables, strict=True)]
        scores["execution"] = sum(right) / len(right)
    return scores


def _check_each(task: str, outputs: Sequence[Any], what: str, given: Sequence[Any] | None) -> None:
    """Make sure that there is one of what is given for each output.

    Raises:
        DataError: there is another number.
    """
    if given is not None and len(given) != len(outputs):
        raise DataError(f"{task}: {len(outputs)} outputs and {len(given)} {what}.")


def _known(task: str) -> str:
    if task not in _NAMES:
        hint = did_you_mean(task, TASKS) or f"; there are {', '.join(TASKS)}"
        raise ConfigError(f"no scorer knows the task {task!r}{hint}")
    return task


def _variant(task: str, variant: str | None) -> str | None:
    variants = VARIANTS.get(_known(task), ())
    if variant is not None and variant not in variants:
        known = f"has {' and '.join(variants)}" if variants else "has no variants"
        raise ConfigError(f"the scorer of {task} {known}, not {variant!r}")
    return variant or (variants[0] if variants else None)


def _check(task: str, outputs: Sequence[Any], references: Sequence[Any]) -> None:
    if not outputs or len(outputs) != len(references):
        raise DataError(
            f"A score needs outputs and as many references; found {len(outputs)} outputs and"
            f" {len(references)} references."
        )
    if task == "wikisql" or task in NAMES:
        return
    problems = [
        f"output {index + 1}: {problem}"
        for index, (output, known) in enumerate(zip(outputs, references, strict=True))
        if (problem := _text_problem(output, known))
    ]
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise DataError.listing(f"{task}: texts are missing", [*problems[:10], *more])


def _text_problem(output: Any, known: Any) -> str | None:
    if not isinstance(output, str):
        return f"{output!r} is no text"
    if isinstance(known, str) or not isinstance(known, Sequence):
        return f"its references are {type(known).__name__}, not a list of texts"
    if not known:
        return "no reference"
    return None if all(isinstance(text, str) for text in known) else "a reference that is no text"
