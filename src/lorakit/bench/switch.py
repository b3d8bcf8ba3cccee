"""Switching between two adapters, unmerged and merged."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.bank import AdapterBank
from lorakit.bench.peers import peft_model, save_random_adapters
from lorakit.bench.result import OURS, Findings, Goal
from lorakit.bench.rounds import Participant, Seconds, interleaved
from lorakit.config.bench import SwitchConfig
from lorakit.models.base import base_parameters
from lorakit.models.identity import weights_hash
from lorakit.models.load import load_model


@torch.no_grad()
def measure_switch(settings: SwitchConfig) -> Findings:
    """The times of an unmerged and of a merged switch, and whether the bits are as they must be."""
    model, plain = (load_model(settings.model, dtype=settings.dtype)[0] for _ in range(2))
    original = weights_hash(model)
    with tempfile.TemporaryDirectory() as folder:
        folders = save_random_adapters(
            model,
            Path(folder),
            count=2,
            rank=settings.rank,
            dtype=settings.adapter_dtype,
        )
        bank = AdapterBank(model)
        for each in folders:
            bank.load(each.name, each)
        peer = _peer(settings, folders)
    names = [each.name for each in folders]
    unmerged = _unmerged(bank, peer, names, settings)
    bank.switch(None)
    merged = _merged(bank, peer, names, plain, settings)
    checks = _checks(bank, names, original)
    if peer is not None:
        peer.unmerge_adapter()
        changed = _changed_share(peer.unload(), plain)
        checks |= {"peft_base_restored": changed == 0, "peft_changed_share": changed}
    return Findings(
        timings={"unmerged_switch": unmerged, "merged_switch": merged},
        goals=_goals(unmerged, merged),
        checks=checks,
    )


def _peer(settings: SwitchConfig, folders: list[Path]) -> Any:
    """PEFT's model with both adapters, or None where it is left out."""
    if not settings.peer:
        return None
    base, _ = load_model(settings.model, dtype=settings.dtype)
    return peft_model(base, folders, adapter_dtype=settings.adapter_dtype)


def _alternating(names: list[str], switch: Callable[[str], object]) -> Participant:
    """A participant that switches to the first adapter, the second, the first, …"""
    order = itertools.cycle(names)
    return Participant(run=lambda: switch(next(order)))


def _unmerged(
    bank: AdapterBank, peer: Any, names: list[str], settings: SwitchConfig
) -> dict[str, Seconds]:
    participants = {OURS: _alternating(names, bank.switch)}
    if peer is not None:
        participants["peft"] = _alternating(
            names, lambda name: peer.set_adapter(name, inference_mode=True)
        )
    return interleaved(participants, repeats=settings.unmerged_repeats)


def _merged(
    bank: AdapterBank,
    peer: Any,
    names: list[str],
    plain: PreTrainedModel,
    settings: SwitchConfig,
) -> dict[str, Seconds]:
    """The times of switches while an adapter is merged; the first merge is the warm-up."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(plain.config.vocab_size, (1, settings.tokens), generator=generator)
    participants = {
        OURS: _alternating(names, bank.merge),
        "forward": Participant(run=lambda: plain(input_ids=ids)),
    }
    if peer is not None:
        participants["peft"] = _alternating(names, lambda name: _switch_merged(peer, name))
    return interleaved(participants, repeats=settings.repeats)


def _switch_merged(peer: Any, name: str) -> None:
    """Merge another adapter, as PEFT's documentation does it."""
    if peer.get_model_status().merged_adapters:
        peer.unmerge_adapter()
    peer.set_adapter(name, inference_mode=True)
    peer.merge_adapter()


def _checks(bank: AdapterBank, names: list[str], original: str) -> dict[str, Any]:
    """Whether unmerging restores the base's bits, and a switch has those of a fresh merge."""
    bank.unmerge()
    restored = weights_hash(bank.model) == original
    bank.merge(names[0])
    bank.merge(names[1])
    switched = weights_hash(bank.model)
    bank.unmerge()
    bank.merge(names[1])
    fresh = weights_hash(bank.model)
    bank.unmerge()
    return {"base_restored": restored, "switch_is_fresh_merge": switched == fresh}


def _changed_share(model: nn.Module, plain: nn.Module) -> float:
    """The share of values that differ from the plain model's, in the weights that differ at all."""
    expected: dict[str, Tensor] = dict(base_parameters(plain))
    pairs = [(tensor, expected[path]) for path, tensor in base_parameters(model)]
    changed = [(int((a != b).sum()), a.numel()) for a, b in pairs if not torch.equal(a, b)]
    return sum(c for c, _ in changed) / max(sum(n for _, n in changed), 1)


def _goals(unmerged: dict[str, Seconds], merged: dict[str, Seconds]) -> tuple[Goal, ...]:
    return (
        Goal(
            what="unmerged switch",
            got=unmerged[OURS].median * 1e6,
            limit=50.0,
            unit="us",
        ),
        Goal(
            what="merged switch against one forward pass",
            got=merged[OURS].median / merged["forward"].median,
            limit=1.0,
        ),
    )
