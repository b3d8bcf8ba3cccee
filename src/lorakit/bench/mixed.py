"""Decoding and prefill of batches whose rows use different adapters, beside the plain model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.bank import AdapterBank
from lorakit.bench.peers import peft_model, save_random_adapters
from lorakit.bench.result import OURS, Findings, Goal, Timings
from lorakit.bench.rounds import Participant, Seconds, interleaved
from lorakit.config.bench import MixedConfig
from lorakit.models.load import load_model

CHECKED_ROWS = 4
"""Rows of the batch on which the answers are compared with PEFT's, in float32."""
TOLERANCE = 1e-4
"""Largest difference of a logit from PEFT's, as a share of the largest logit."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of every participant on one batch."""

    name: str
    """decode or prefill."""
    ids: Int[Tensor, "rows tokens"]
    new_tokens: int | None = None
    """Tokens to decode; None: one forward pass, and the logits of the last position."""

    @torch.inference_mode()
    def do(self, model: Any, **more: Any) -> Tensor:
        """The decoded tokens, or the logits."""
        if self.new_tokens is None:
            logits: Tensor = model(input_ids=self.ids, logits_to_keep=1, **more).logits
            return logits
        tokens: Tensor = model.generate(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            do_sample=False,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            pad_token_id=0,
            **more,
        )
        return tokens


def measure_mixed(settings: MixedConfig) -> Findings:
    """The times of mixed batches, the plain model and PEFT, after their answers were compared."""
    checks = {}
    with tempfile.TemporaryDirectory() as temporary:
        model, plain = (load_model(settings.model, dtype=settings.dtype)[0] for _ in range(2))
        # The same weights at another place in memory make a difference of two or three percent.
        plain.load_state_dict(model.state_dict(), assign=True)
        folders = save_random_adapters(
            model,
            Path(temporary),
            count=max(settings.adapters, *settings.distinct, 1),
            rank=settings.rank,
            dtype=settings.adapter_dtype,
        )
        if settings.peer:
            checks["largest_difference_from_peft"] = _difference(settings, folders)
        bank = AdapterBank(model)
        for each in folders:
            bank.load(each.name, each)
        peer = _peer(settings, folders[: settings.adapters])
    names = [each.name for each in folders]
    timings = _beside_peers(settings, bank, plain, peer, names)
    # Its adapters would take memory and caches from what follows.
    del peer
    many = _many(settings, bank, plain, names)
    return Findings(
        timings={**timings, **many}, goals=_goals(timings, many, settings), checks=checks
    )


def _peer(settings: MixedConfig, folders: list[Path]) -> Any:
    """PEFT's model with the adapters of some folders, or None where it is not measured."""
    if not settings.peer:
        return None
    base, _ = load_model(settings.model, dtype=settings.dtype)
    return peft_model(base, folders, adapter_dtype=settings.adapter_dtype)


def _difference(settings: MixedConfig, folders: list[Path]) -> float:
    """The largest difference between our logits and PEFT's, as a share of the largest logit.

    It must be rounding alone; otherwise the two would not do the same work.
    """
    folders = folders[:CHECKED_ROWS]
    model, base = (load_model(settings.model, dtype="float32")[0] for _ in range(2))
    bank = AdapterBank(model)
    for each in folders:
        bank.load(each.name, each)
    peer = peft_model(base, folders, adapter_dtype="float32")
    work = Work(name="prefill", ids=_ids(model, CHECKED_ROWS, settings.prompt_tokens))
    names = _names([each.name for each in folders], CHECKED_ROWS)
    with bank.route(names):
        ours = work.do(model)
    expected = work.do(peer, adapter_names=names)
    difference = float((ours - expected).abs().max() / expected.abs().max())
    assert difference < TOLERANCE, f"our answers are {difference:.1e} from PEFT's"
    return difference


def _ids(model: PreTrainedModel, rows: int, tokens: int) -> Int[Tensor, "rows tokens"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (rows, tokens), generator=generator)


def _names(names: Sequence[str], rows: int) -> list[str]:
    """The adapter of each row, in rotation."""
    return [names[row % len(names)] for row in range(rows)]


def _work(
    settings: MixedConfig, model: PreTrainedModel, rows: int, prefill_tokens: int
) -> tuple[Work, Work]:
    """The decoding and the prefill of so many rows."""
    prompts = _ids(model, rows, settings.prompt_tokens)
    return (
        Work(name="decode", ids=prompts, new_tokens=settings.new_tokens),
        Work(name="prefill", ids=_ids(model, rows, prefill_tokens)),
    )


def _ours(bank: AdapterBank, work: Work, names: Any) -> Participant:
    """The work under a route, which is made in each round."""

    def run() -> None:
        with bank.route(names) if names is not None else nullcontext():
            work.do(bank.model)

    return Participant(run=run)


def _beside_peers(
    settings: MixedConfig,
    bank: AdapterBank,
    plain: PreTrainedModel,
    peer: Any,
    names: list[str],
) -> dict[str, dict[str, Seconds]]:
    """The times of many adapters, of one for all rows, and of none, beside plain model and PEFT."""
    found: dict[str, dict[str, Seconds]] = {}
    chosen = _names(names[: settings.adapters], settings.rows)
    for work in _work(settings, plain, settings.rows, settings.prefill_tokens):
        participants = {
            "plain": Participant(run=_bound(work, plain)),
            "mixed": _ours(bank, work, chosen),
            "one": _ours(bank, work, names[0]),
        }
        # What has run before makes a difference of more than a route that is none.
        without = {"plain": participants["plain"], "none": _ours(bank, work, None)}
        if peer is not None:
            participants["peft"] = Participant(run=_bound(work, peer, adapter_names=chosen))
            without["peft_disabled"] = _disabled(peer, work)
        how: dict[str, Any] = {"repeats": settings.repeats, "there_and_back": True}
        routed, free = interleaved(participants, **how), interleaved(without, **how)
        for what, seconds, ours, peft in (
            (work.name, routed, "mixed", "peft"),
            (f"{work.name}_one_adapter", routed, "one", None),
            (f"{work.name}_no_route", free, "none", "peft_disabled"),
        ):
            found[what] = {OURS: seconds[ours], "plain": seconds["plain"]}
            if peft in seconds:
                found[what]["peft"] = seconds[peft]
    return found


def _bound(work: Work, model: Any, **more: Any) -> Callable[[], Tensor]:
    return lambda: work.do(model, **more)


def _disabled(peer: Any, work: Work) -> Participant:
    """The work of PEFT's model with its adapters disabled."""

    def run() -> None:
        with peer.disable_adapter():
            work.do(peer)

    return Participant(run=run)


def _many(
    settings: MixedConfig, bank: AdapterBank, plain: PreTrainedModel, names: list[str]
) -> dict[str, dict[str, Seconds]]:
    """The times of one batch with each number of distinct adapters."""
    found: dict[str, dict[str, Seconds]] = {}
    rows = settings.many_rows
    for work in _work(settings, plain, rows, settings.many_prefill_tokens):
        participants = {"plain": Participant(run=_bound(work, plain))} | {
            str(count): _ours(bank, work, _names(names[:count], rows))
            for count in settings.distinct
        }
        seconds = interleaved(participants, repeats=settings.repeats)
        for count in settings.distinct:
            what = f"{work.name}_{rows}_rows_{count}_adapters"
            found[what] = {OURS: seconds[str(count)], "plain": seconds["plain"]}
    return found


def _goals(timings: Timings, many: Timings, settings: MixedConfig) -> tuple[Goal, ...]:
    def slowdown(what: str) -> float:
        return timings[what][OURS].median / timings[what]["plain"].median

    def spread(work: str) -> float:
        ours = [each[OURS].median for what, each in many.items() if what.startswith(work)]
        return max(ours) / min(ours)

    return (
        Goal(what="decode, mixed against plain", got=slowdown("decode"), limit=1.25),
        Goal(what="prefill, mixed against plain", got=slowdown("prefill"), limit=1.15),
        Goal(what="decode, no route against plain", got=slowdown("decode_no_route"), limit=1.02),
        Goal(what="prefill, no route against plain", got=slowdown("prefill_no_route"), limit=1.02),
        Goal(what="decode, most against fewest adapters", got=spread("decode"), limit=1.1),
        Goal(what="prefill, most against fewest adapters", got=spread("prefill"), limit=1.1),
    )
