"""The README.md of an adapter's folder: a model card, with the metadata that the hub reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lorakit.adapter.card import scores_of
from lorakit.adapter.content import AdapterContent
from lorakit.adapter.hub import is_hub_id
from lorakit.models.packaged import PACKAGES

CARD_FILE = "README.md"
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""The hub's word for what an adapter does, by PEFT's."""
MARK = "\n<!-- written by lorakit, "
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be, of those above 1."""


def model_card(adapter: AdapterContent, reasons: list[str], *, name: str) -> str:
    """The text of a card: what the adapter is, how it was made and scored, how it is loaded.

    Args:
        adapter: what it is about.
        reasons: why PEFT has no form for it; none: it has.
        name: what the adapter is called: its folder's name, or OWNER/NAME on the hub.
    """
    sections = (
        _facts(adapter),
        _scores(adapter),
        _training(adapter),
        _loading(adapter, reasons, name),
    )
    body = "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)
    data = _metadata(adapter, reasons, name.rpartition("/")[2])
    text = f"---\n{data.to_yaml()}\n---\n\n# {name.rpartition('/')[2]}\n\n{body}\n"
    return text + _mark(text)


def is_unchanged(card: bytes | None) -> bool:
    """Whether a folder has no card, or one that nobody has changed since it was written."""
    if card is None:
        return True
    text, sign, mark = card.decode(errors="replace").rpartition(MARK)
    return sign + mark == _mark(text)


def _mark(text: str) -> str:
    """The last line of a card, by which it is known again."""
    return f"{MARK}{hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def _metadata(adapter: AdapterContent, reasons: list[str], name: str) -> ModelCardData:
    base, source = _base_id(adapter), _data(adapter)
    pipeline = PIPELINES.get(str(adapter.card.get("task_type")))
    dataset = source.removeprefix("hub:") if source.startswith("hub:") else None
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=dataset or "other",
            dataset_name=dataset or source or "own rows",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in _numbers(adapter.card.get("scores")).items()
    ]
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        library_name="lorakit" if reasons else "peft",
        tags=["lorakit", *(config.method for config in adapter.configs)],
        datasets=dataset and dataset.partition("@")[0].partition(":")[0],
        pipeline_tag=pipeline,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _base_id(adapter: AdapterContent) -> str | None:
    """The base's id on the hub, where it has one."""
    name = adapter.base_name
    if name in PACKAGES:
        return PACKAGES[name].hub_id
    return name if is_hub_id(name) else None


def _data(adapter: AdapterContent) -> str:
    """What it was trained on, where that is no file: a path is nobody else's business."""
    data = adapter.card.get("data")
    source = data.get("train") if isinstance(data, Mapping) else None
    public = isinstance(source, str) and source.startswith(("hub:", "task:", "builtin:"))
    return str(source) if public else ""


def _numbers(scores: object) -> dict[str, float]:
    found = scores if isinstance(scores, Mapping) else {}
    return {str(k): v for k, v in found.items() if isinstance(v, int | float)}


def _facts(adapter: AdapterContent) -> Iterator[str]:
    base = adapter.base_name or "a base that it does not name"
    ranks = sorted({site.rank for site in adapter.sites})
    yield f"An adapter by `{adapter.method}` for `{base}`, made with lorakit."
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| trained values | {adapter.parameters:,} |"
    if ranks:
        yield f"| low-rank updates | {len(adapter.sites)} of rank {', '.join(map(str, ranks))} |"
    lora = adapter.lora
    if lora is not None and lora.targets:
        yield f"| targets | {', '.join(f'`{word}`' for word in lora.targets)} |"
    if adapter.loftq is not None:
        yield f"| its layers of the base | changed by LoftQ, {adapter.loftq} |"
    if adapter.copied_modules:
        yield f"| saved in full | {', '.join(f'`{path}`' for path in adapter.copied_modules)} |"
    yield f"| content hash | `{adapter.content_hash()[:16]}` |"


def _scores(adapter: AdapterContent) -> Iterator[str]:
    scores = scores_of(adapter.card)
    if scores:
        yield "## Scores on held-out rows"
        yield ""
        yield "| score | value |"
        yield "|---|---|"
        for name, text in scores.items():
            yield f"| {name} | {text} |"


def _training(adapter: AdapterContent) -> Iterator[str]:
    card: Mapping[str, Any] = adapter.card
    rows, settings = card.get("rows"), card.get("settings")
    if not isinstance(rows, Mapping) or not isinstance(settings, Mapping):
        return
    yield "## Training"
    yield ""
    source = f" of `{_data(adapter)}`" if _data(adapter) else ""
    yield f"{rows.get('training')} rows{source}, {card.get('step')} steps."
    yield "`lorakit.json` has all settings and versions."


def _loading(adapter: AdapterContent, reasons: list[str], name: str) -> Iterator[str]:
    base = adapter.base_name or "BASE"
    yield "## Use"
    yield ""
    yield "```python"
    yield "import lorakit as lk"
    yield ""
    yield f'adapter = lk.Adapter.load("{name}")'
    yield "model, tokenizer = adapter.load_base()"
    yield "lk.attach(model, adapter)"
    yield "```"
    if reasons:
        yield ""
        yield f"PEFT has no form for it: {reasons[0]}."
        return
    yield ""
    needs = (
        "" if adapter.loftq is None else ", with a CUDA GPU, bitsandbytes and the base in floats"
    )
    yield f"In PEFT, on the base as a transformers model{needs}:"
    yield ""
    yield "```python"
    yield "from peft import PeftModel"
    yield ""
    yield f'model = PeftModel.from_pretrained(model, "{name}")'
    yield "```"
    rank = _vllm_rank(adapter)
    if rank is not None:
        short = name.rpartition("/")[2]
        yield ""
        yield f"In vLLM: `vllm serve {base} --enable-lora --max-lora-rank {rank} "
        yield f"--lora-modules {short}={name}`."


def _vllm_rank(adapter: AdapterContent) -> int | None:
    """The rank that vLLM must allow; None: it does not serve such adapters."""
    lora = adapter.lora
    if lora is None or lora.use_dora or lora.lora_bias or lora.bias != "none":
        return None
    if lora.trainable_token_indices or lora.layer_replication or adapter.loftq is not None:
        return None
    if adapter.copied_modules or any(site.kind != "linear" for site in adapter.sites):
        return None
    ranks = {site.rank for site in adapter.sites}
    return next((each for each in VLLM_RANKS if each >= max(ranks)), None)
