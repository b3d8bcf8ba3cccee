"""A tiny model with adapters behind an engine, and what answers alone."""

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer

import lorakit as lk
from lorakit.bank import AdapterBank
from lorakit.serving.engine import Engine
from lorakit.serving.requests import Delta, Request, Use
from lorakit.serving.sampling import Sampling
from lorakit.serving.worker import Limits
from references import attach_random
from tiny_models import build

KINDS: dict[str, dict[str, Any]] = {
    "small": {"rank": 2, "targets": ("q", "v")},
    "wide": {"rank": 7, "targets": ("all-linear",), "use_rslora": True},
    "dora": {"rank": 3, "targets": ("q", "down"), "use_dora": True},
}
TIMEOUT_S = 60


def adapters(family: str = "llama", std: float = 0.3) -> dict[str, lk.Adapter]:
    """Adapters of several kinds with random weights."""
    made = {}
    for seed, (name, config) in enumerate(KINDS.items()):
        model = build(family)
        attach_random(model, name, seed=seed, std=std, **config)
        made[name] = lk.extract(model, name)
    return made


def banked(family: str = "llama", **overrides: Any) -> AdapterBank:
    """A bank with these adapters."""
    bank = AdapterBank(build(family, **overrides))
    for name, adapter in adapters(family).items():
        bank.add(name, adapter)
    return bank


@dataclass(eq=False)
class Asked:
    """A request, and what came of it."""

    request: Request
    inbox: "queue.Queue[Delta]"
    deltas: list[Delta] = field(default_factory=list)

    def wait(self) -> Delta:
        """The last delta, once the answer is over."""
        while not (self.deltas and self.deltas[-1].finish):
            self.next()
        return self.deltas[-1]

    def next(self) -> Delta:
        """The next delta."""
        self.deltas.append(self.inbox.get(timeout=TIMEOUT_S))
        return self.deltas[-1]

    @property
    def ids(self) -> list[int]:
        return [token.id for delta in self.deltas for token in delta.tokens]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


def use_of(bank: AdapterBank, choice: Any) -> Use:
    """What a choice means now."""
    named = {choice: 1.0} if isinstance(choice, str) else dict(choice or {})
    return Use(tuple((bank.hold(name), weight) for name, weight in named.items()))


def asked(
    bank: AdapterBank, tokenizer: Any, choice: Any, prompt: Sequence[int], **how: Any
) -> Asked:
    """A request of a choice."""
    inbox: queue.Queue[Delta] = queue.Queue()
    sampling = Sampling(**how.pop("sampling", {}))
    how = {"max_tokens": 8} | how
    request = Request(
        prompt=prompt,
        use=use_of(bank, choice),
        tokenizer=tokenizer,
        deliver=inbox.put,
        sampling=sampling,
        **how,
    )
    return Asked(request, inbox)


def greedy_alone(bank: AdapterBank, choice: Any, prompt: Sequence[int], count: int) -> list[int]:
    """What the model writes with plain `generate`, one row under its route."""
    ids = torch.tensor([list(prompt)])
    with bank.route(choice):
        written = bank.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return written[0, len(prompt) :].tolist()


def engine_of(bank: AdapterBank, **limits: Any) -> Engine:
    """An engine that runs."""
    engine = Engine(bank.model, Limits(**({"slots": 4} | limits)))
    engine.start()
    return engine


def word_tokenizer(folder: Any) -> Any:
    """The tokenizer of a tiny model's folder."""
    return AutoTokenizer.from_pretrained(folder)
