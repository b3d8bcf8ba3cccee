"""The models by their names in requests, on a base in memory, and what answers for each."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.card import TrainedUse
from lorakit.answering.ends import end_tokens
from lorakit.attachment.state import attachment_for, identity_of
from lorakit.bank import AdapterBank, Held
from lorakit.data.chat import with_template
from lorakit.data.template_limits import check_template
from lorakit.errors import AdapterFileError, BankError
from lorakit.layers.operation import Update
from lorakit.models.load import fresh_heads, labels_of, task_of
from lorakit.routing.slot_content import ALONE, check_slots
from lorakit.serving.heap import give_back
from lorakit.serving.names import Names
from lorakit.serving.places import Places
from lorakit.serving.refusals import RefusalError
from lorakit.serving.requests import Use
from lorakit.serving.thread_teams import without_team

ENCODING = ("classification", "multi-label", "regression")
"""The tasks of an encoder's adapters with heads."""
EMBEDDING = "embedding"
"""The task of those without, whose base has none either."""


@dataclass(frozen=True)
class Head:
    """What a classifier's head says."""

    labels: tuple[str, ...] | None
    """The names of the classes; None: they have none."""
    task: str
    """One of `ENCODING`; of regression it is one number, which is no probability."""


@dataclass(frozen=True)
class Chosen:
    """What answers a request."""

    name: str
    """The name that the answer gives as its model."""
    use: Use
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    """The base's, with the adapters' own chat template, if all of them have that one."""
    ends: frozenset[int]
    """The tokens that end an answer."""
    trained: tuple[TrainedUse, ...]
    """How the adapters were trained that say how they are asked."""
    heads: tuple[Head | None, ...] = ()
    """On an encoder, those of the adapters, or that of the base; None: one has no trained head."""
    tasks: Mapping[str, str] = field(default_factory=dict)
    """The task that each adapter was trained for, by its name, where that is known."""


class Catalog(Names[Chosen]):
    """The base and its adapters by name; adapters come and go while others answer.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        name: what requests call the base.
        folder: from which adapters may be loaded; None: from nowhere.
        resolve: load an adapter when it is first asked for, from the folder of its name.
        hub: a namespace of the hub, where such a name is looked for next; None: not there.
        allow_other_base: accept adapters that were trained on other weights.
        budget_bytes: the most memory of adapters, see `AdapterBank`.
        encodes: whether the base is an encoder, whose adapters have heads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        folder: Path | None = None,
        resolve: bool = False,
        hub: str | None = None,
        allow_other_base: bool = False,
        budget_bytes: int | None = None,
        encodes: bool = False,
    ) -> None:
        super().__init__(name, Places(folder, resolve=resolve, hub=hub))
        self._encodes = encodes
        self.tokenizer = tokenizer
        self._model = model
        self._bank = AdapterBank(
            model,
            budget_bytes=budget_bytes,
            allow_other_base=allow_other_base,
            check=self._check,
        )
        self.base_hash = _base_hash(model)
        """What stands for the base's weights in a fingerprint."""

    @property
    def bank(self) -> AdapterBank:
        """The bank that holds them."""
        return self._bank

    @property
    def resident(self) -> Collection[str]:
        """The names of those in memory."""
        return self._bank.resident

    @property
    def pinned(self) -> Collection[str]:
        """The names of those that no budget of memory evicts."""
        return self._bank.pinned

    @property
    def resident_bytes(self) -> int:
        """The memory of those in it."""
        return self._bank.resident_bytes

    def _take(self, name: str, folder: Path) -> tuple[Adapter, str, int, str]:
        record = without_team(partial(self._bank.load, name, folder))
        give_back()
        held, size = self.held(name), self._bank.size_bytes(name)
        return record, held.content_hash, size, self._base_check(record)

    def _drop(self, name: str) -> None:
        self._bank.unload(name)
        give_back()

    def _chosen(self, name: str, pairs: Sequence[tuple[str, float]]) -> Chosen:
        try:
            held = [(self.held(each), weight) for each, weight in pairs]
        except BankError as error:
            # Unloaded since its name was looked up, or no room for it in memory.
            missing = [each for each, _ in pairs if each not in self._loaded]
            raise RefusalError(str(error), 404 if missing else 503, param="model") from None
        use = Use(tuple(held))
        if use.virtual_tokens is not None and [weight for _, weight in pairs] != [1.0]:
            raise RefusalError(ALONE, param="adapters")
        uses = [TrainedUse.on(each.record.card) for each, _ in held]
        trained = tuple(each for each in uses if each.says_how)
        templates = {each.chat_template for each in trained}
        ends = [end for each in uses for end in each.end_tokens]
        return Chosen(
            name=name,
            use=use,
            fingerprint=use.fingerprint(self.base_hash),
            tokenizer=with_template(
                self.tokenizer, templates.pop() if len(templates) == 1 else None
            ),
            ends=frozenset(end_tokens(self._model, self.tokenizer, trained=ends)),
            trained=trained,
            heads=self._heads([each for each, _ in held]) if self._encodes else (),
            tasks={
                each.name: own.task
                for (each, _), own in zip(held, uses, strict=True)
                if own.task is not None
            },
        )

    def _heads(self, held: Sequence[Held]) -> tuple[Head | None, ...]:
        """The trained heads of adapters, or that of the base, which may be a classifier itself."""
        fresh = fresh_heads(self._model)
        task = task_of(self._model)
        base = None if fresh or task == EMBEDDING else Head(labels_of(self._model), task)
        layers = attachment_for(self._model).layers
        heads: list[Head | None] = []
        for each in held:
            paths = [layers[number].adapter_path for number in each.updates]
            own = all(any(f"{head}.".startswith(f"{path}.") for path in paths) for head in fresh)
            use = TrainedUse.on(each.record.card)
            trained = Head(use.labels, use.task or "classification")
            heads.append(trained if own and (fresh or use.labels) else base)
        return tuple(heads) or (base,)

    def held(self, name: str) -> Held:
        """An adapter as it is now, read again if it was evicted."""
        hold = partial(self._bank.hold, name)
        if self._bank.is_resident(name):
            return hold()
        found = without_team(hold)
        give_back()
        return found

    def _base_check(self, record: Adapter) -> str:
        base, own = record.base, identity_of(self._model)
        if base is None or own is None:
            return "unknown"
        return base.difference(own) or "same"

    def _check(self, updates: Mapping[str, Update], record: Adapter) -> None:
        """Refuse an adapter that can't be served, before any name means it.

        Raises:
            AdapterFileError: it does something else than to write text.
            DataError: its chat template could take for ever.
            RouteError: it can't be in a slot.
        """
        use = TrainedUse.on(record.card)
        own: tuple[str, ...] = ("generation",)
        if self._encodes:
            own = (EMBEDDING,) if task_of(self._model) == EMBEDDING else ENCODING
        if use.task not in (None, *own):
            raise AdapterFileError(
                f"the adapter does {use.task}, and this server's do {' or '.join(own)}"
            )
        if use.chat_template is not None:
            check_template(with_template(self.tokenizer, use.chat_template))
        check_slots(attachment_for(self._model), updates, virtual_tokens=not self._encodes)


def _base_hash(model: PreTrainedModel) -> str:
    """What stands for the base's weights in a fingerprint."""
    identity: Any = identity_of(model)
    facts = f"{identity.names_hash} {identity.samples} {identity.dtype} {model.dtype}"
    return hashlib.sha256(facts.encode()).hexdigest()
