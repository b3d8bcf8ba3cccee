"""The official scorers' own values, of the cases that lie beside the repository."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from covering import sampled
from lorakit.data.metrics import java
from lorakit.data.metrics.coco import coco_scores
from lorakit.data.metrics.meteor.score import Statistics, meteor
from lorakit.data.metrics.mteval import bleu_and_nist
from lorakit.data.metrics.ptb import coco_tokens
from lorakit.data.metrics.score import score
from lorakit.data.metrics.wikisql import same_form

SHARED = Path(__file__).parents[3].parent / "shared"
CASES = SHARED / "metric_cases"
pytestmark = pytest.mark.skipif(
    not CASES.is_dir(), reason="needs the official scorers' values beside the repository"
)
E2E = ("edge_cases", "full_first_reference", "full_template", "short_outputs", "single_reference")


def case(name: str) -> Any:
    return json.loads((CASES / f"{name}.json").read_text())


def rows(name: str) -> list[Any]:
    lines = (SHARED / "data" / name / "test.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def e2e_references(found: Any) -> list[list[str]]:
    return found.get("references") or [row["references"] for row in rows("e2e_nlg")]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.thorough if n != "edge_cases" else ()) for n in E2E]
)
@pytest.mark.parametrize("variant", ["python", "perl"])
def test_bleu_and_nist_of_e2e(name: str, variant: Any) -> None:
    found = case(f"e2e/{name}")
    bleu, nist = bleu_and_nist(found["hypotheses"], e2e_references(found), variant=variant)
    assert bleu == pytest.approx(found["expected"][f"BLEU_{variant}"], abs=5e-5)
    assert nist == pytest.approx(found["expected"][f"NIST_{variant}"], abs=5e-5)


WHOLE = ("full_first_reference", "full_template", "short_outputs")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.thorough] if n in WHOLE else []) for n in E2E]
)
def test_meteor_rouge_and_cider_of_e2e(name: str) -> None:
    found = case(f"e2e/{name}")
    scores = coco_scores(found["hypotheses"], e2e_references(found))
    for ours, theirs in (("meteor", "METEOR"), ("rouge_l", "ROUGE_L"), ("cider", "CIDEr")):
        assert scores[ours] == pytest.approx(found["expected"][theirs], abs=5e-5)


@pytest.mark.thorough
def test_the_java_programs_agree() -> None:
    found = case("e2e/edge_cases")
    outputs, references = found["hypotheses"], found["references"]
    assert java.coco_tokens(outputs) == coco_tokens(outputs)
    by_java = coco_scores(outputs, references, use_java=True)
    assert by_java == pytest.approx(coco_scores(outputs, references), abs=1e-9)


def test_tokens_of_the_coco_metrics() -> None:
    cases = case("ptb_tokens/sample")["cases"]
    assert coco_tokens([one["text"] for one in cases]) == [one["coco_tokens"] for one in cases]


@pytest.mark.thorough
@pytest.mark.parametrize("variant", ["official", "paper"])
def test_webnlg(variant: str) -> None:
    found, test_rows = case("webnlg/full_template"), rows("web_nlg")
    references = [row["references"] for row in test_rows]
    seen = [row["seen_category"] for row in test_rows]
    scores = score("webnlg", found["hypotheses"], references, variant=variant, seen=seen)
    expected = found["expected"]["lora" if variant == "paper" else "official"]
    for part, end in (("all", ""), ("seen", "_seen"), ("unseen", "_unseen")):
        assert scores[f"bleu{end}"] == pytest.approx(expected[part]["bleu"]["BLEU"], abs=0.005)
        assert scores[f"meteor{end}"] == pytest.approx(expected[part]["METEOR"], abs=5e-5)
        if "ter" in expected[part]:
            assert scores[f"ter{end}"] == pytest.approx(expected[part]["ter"]["TER"], abs=3e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("variant", ["official", "paper"])
def test_dart(variant: str) -> None:
    found = case("dart/bart_large_example")
    references = [row["references"] for row in rows("dart")]
    scores = score("dart", found["hypotheses"], references, variant=variant)
    expected = found["expected"]["lora" if variant == "paper" else "official"]["all"]
    assert scores["bleu"] == pytest.approx(expected["bleu"]["BLEU"], abs=0.005)
    assert scores["meteor"] == pytest.approx(expected["METEOR"], abs=5e-5)
    if variant == "official":
        assert scores["ter"] == pytest.approx(expected["ter"]["TER"], abs=5e-5)


@pytest.mark.parametrize(
    ("name", "data"), [("webnlg/full_template", "web_nlg"), ("dart/bart_large_example", "dart")]
)
def test_the_papers_ter(name: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lorakit.data.metrics.triples.statistics_of", lambda lines, _: [Statistics()] * len(lines)
    )
    found = case(name)
    references = [row["references"] for row in rows(data)[:150]]
    task = "webnlg" if data == "web_nlg" else "dart"
    scores = score(task, found["hypotheses"][:150], references, variant="paper")
    expected = found["expected"]["lora"]["TER_pyter_first_150"]
    assert scores["ter"] == pytest.approx(expected, abs=5e-5)


@sampled("name", ["lead3", "noised_reference"], share=2)
def test_samsum(name: str) -> None:
    found = case(f"samsum/{name}")
    scores = score("samsum", found["hypotheses"], [[row["summary"]] for row in rows("samsum")])
    expected = found["expected"]["stem=True,newline_split=False"]
    for theirs, ours in (("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rougeL", "rouge_l")):
        assert scores[ours] == pytest.approx(expected[theirs]["fmeasure"], abs=5e-5)


def test_wikisql() -> None:
    found = case("wikisql/test_300")
    tables = {table["id"]: table for table in found["tables"]}
    examples = found["examples"]
    outputs, golds = ([one[key] for one in examples] for key in ("prediction", "gold"))
    scores = score("wikisql", outputs, golds, tables=[tables[one["table_id"]] for one in examples])
    expected = found["expected"]
    assert scores["logical_form"] == pytest.approx(expected["unordered"]["lf_accuracy"])
    assert scores["execution"] == pytest.approx(expected["unordered"]["ex_accuracy"])
    ordered = [same_form(*pair, ordered=True) for pair in zip(outputs, golds, strict=True)]
    assert sum(ordered) / len(ordered) == pytest.approx(expected["ordered"]["lf_accuracy"])


def test_glue() -> None:
    names = {"matthews_correlation": "matthews", "spearmanr": "spearman"}
    for one in case("glue/cases")["cases"]:
        scores = score(one["task"], one["predictions"], one["references"])
        for theirs, value in one["expected"].items():
            expected = pytest.approx(math.nan if value is None else value, nan_ok=True)
            assert scores[names.get(theirs, theirs)] == expected


@pytest.mark.thorough
def test_meteor_of_segments() -> None:
    found = case("dart/bart_large_example")
    # As the official files are: lower-cased, and cut at all that is no letter, digit or underscore.
    known = [
        [" ".join(re.split(r"(\W)", text.lower())) for text in row["references"][:3]]
        for row in rows("dart")[:10]
    ]
    _, segments = meteor(found["hypotheses"][:10], known)
    assert segments == pytest.approx(found["expected"]["official"]["meteor_segments_first10"])
