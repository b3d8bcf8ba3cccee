"""Loading one adapter: into an empty bank, and into one that has hundreds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lorakit.adapter.tensor_files import WEIGHTS_FILE
from lorakit.bank import AdapterBank
from lorakit.bench.peers import peft_loading, peft_model, save_random_adapters
from lorakit.bench.result import OURS, Findings, Goal
from lorakit.bench.rounds import Participant, interleaved
from lorakit.config.bench import LoadConfig
from lorakit.models.load import load_model

NAME = "measured"
"""The name of the adapter that is loaded and removed."""


def measure_load(settings: LoadConfig) -> Findings:
    """The times of the first and the last load, and of reading the same file into tensors."""
    with tempfile.TemporaryDirectory() as temporary:
        model, _ = load_model(settings.model, dtype=settings.dtype)
        (folder,) = save_random_adapters(
            model, Path(temporary), count=1, rank=settings.rank, dtype=settings.adapter_dtype
        )
        read = Participant(run=lambda: read_tensors(folder / WEIGHTS_FILE))
        participants = {"read": read, "ours_first": _ours(settings, folder, resident=1)}
        participants["ours_last"] = _ours(settings, folder, resident=settings.resident)
        if settings.peer:
            participants["peft_first"] = _peft_first(settings, folder)
            participants["peft_last"] = _peft_last(settings, folder)
        seconds = interleaved(participants, repeats=settings.repeats)
        size = (folder / WEIGHTS_FILE).stat().st_size
    timings = {
        f"load_{which}": {
            who: seconds[key]
            for who, key in ((OURS, f"ours_{which}"), ("read", "read"), ("peft", f"peft_{which}"))
            if key in seconds
        }
        for which in ("first", "last")
    }
    first, last = (timings[f"load_{which}"][OURS].median for which in ("first", "last"))
    goals = (
        Goal(what="first load against reading", got=first / seconds["read"].median, limit=2.0),
        Goal(what="last load against reading", got=last / seconds["read"].median, limit=2.0),
        Goal(what="last load against the first", got=last / first, limit=1.2),
    )
    return Findings(timings=timings, goals=goals, checks={"file_bytes": size})


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Copies of a file's tensors, so that each byte is read."""
    return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}


def _ours(settings: LoadConfig, folder: Path, *, resident: int) -> Participant:
    """A load after which so many adapters are resident, and its removal."""
    bank = AdapterBank(load_model(settings.model, dtype=settings.dtype)[0])
    for number in range(resident - 1):
        bank.load(f"resident-{number}", folder)
    return Participant(run=lambda: bank.load(NAME, folder), after=lambda: bank.unload(NAME))


def _peft_first(settings: LoadConfig, folder: Path) -> Participant:
    base, _ = load_model(settings.model, dtype=settings.dtype)
    made: list[Any] = []

    def unload() -> None:
        made.pop().unload()

    return Participant(
        run=lambda: made.append(peft_model(base, [folder], adapter_dtype=settings.adapter_dtype)),
        after=unload,
    )


def _peft_last(settings: LoadConfig, folder: Path) -> Participant:
    base, _ = load_model(settings.model, dtype=settings.dtype)
    how = peft_loading(settings.adapter_dtype)
    peer = peft_model(base, [folder], adapter_dtype=settings.adapter_dtype)
    for number in range(settings.peer_resident - 2):
        peer.load_adapter(folder, adapter_name=f"resident-{number}", **how)
    return Participant(
        run=lambda: peer.load_adapter(folder, adapter_name=NAME, **how),
        after=lambda: peer.delete_adapter(NAME),
    )
