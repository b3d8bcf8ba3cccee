"""The models by their names in requests: the base, its adapters, and weighted combinations."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from lorakit.errors import AdapterFileError, BankError, ConfigError, LorakitError, did_you_mean
from lorakit.layers.operation import Update
from lorakit.models.load import fresh_heads, labels_of, task_of
from lorakit.routing.slots import check_slots
from lorakit.serving.places import Places
from lorakit.serving.refusals import RefusalError
from lorakit.serving.requests import Use

ENCODING = ("classification", "regression")
"""The tasks of an encoder's adapters."""


@dataclass(frozen=True)
class Loaded:
    """An adapter that requests may name."""

    folder: Path
    since: int
    """When it was loaded, in seconds since 1970."""
    load_s: float
    """How long that took."""
    record: Adapter
    """Its settings, origin and training card, without tensors."""
    size_bytes: int
    """The memory of its tensors."""
    base: str
    """Whether it was trained on this base: same, unknown, or how that one differs."""


@dataclass(frozen=True)
class Head:
    """What a classifier's head says."""

    labels: tuple[str, ...] | None
    """The names of the classes; None: they have none."""
    task: str
    """classification, or regression: one number, which is no probability."""


@dataclass(frozen=True)
class Chosen:
    """What answers a request."""

    name: str
    """The name that the answer gives as its model."""
    use: Use
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    """The base's, with the adapter's own chat template, if it has one."""
    ends: frozenset[int]
    """The tokens that end an answer."""
    trained: TrainedUse | None
    """How the adapter was trained, if it is one alone."""
    heads: tuple[Head | None, ...] = ()
    """On an encoder, those of the adapters, or that of the base; None: one has no trained head."""


class Catalog:
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
        self.name = name
        self._encodes = encodes
        self.since = int(time.time())
        self.tokenizer = tokenizer
        self.places = Places(folder, resolve=resolve, hub=hub)
        self._model = model
        self._bank = AdapterBank(
            model,
            budget_bytes=budget_bytes,
            allow_other_base=allow_other_base,
            check=self._check,
        )
        self._loaded: dict[str, Loaded] = {}
        self._unloaded: set[str] = set()
        """Names that are not looked for: who unloads an adapter wants it gone."""
        self._loading = threading.RLock()
        self._base = _base_hash(model)

    @property
    def adapters(self) -> Mapping[str, Loaded]:
        """Those that requests may name."""
        return dict(self._loaded)

    @property
    def bank(self) -> AdapterBank:
        """The bank that holds them."""
        return self._bank

    def load_all(self) -> None:
        """Load the adapter that the folder is, or those right in it; none if names are resolved.

        Raises:
            ConfigError: some cannot be used; with the reason of each.
        """
        folder = self.places.folder
        if folder is None:
            return
        if not folder.is_dir():
            raise ConfigError(f"adapters: there is no folder {folder}")
        problems = []
        for place in [] if self.places.resolve else self.places.found():
            try:
                self.load(place.name, str(place))
            except LorakitError as error:
                problems.append(f"{place.name}: {error}")
        if problems:
            raise ConfigError.listing("these adapters can't be served", problems)

    def load(self, name: str, path: str, *, in_place: bool = False) -> None:
        """Load an adapter under a name, and have it answer from then on.

        Requests that were accepted before end on the weights that they began with.

        Args:
            name: what requests call it.
            path: its folder, within the allowed one or relative to it.
            in_place: take the place of an adapter of that name.

        Raises:
            RefusalError: the name is taken, or the path outside of the allowed folder.
            LorakitError: the adapter can't be used; nothing changes.
        """
        with self._loading:
            if name == self.name or not name:
                raise RefusalError(
                    f"an adapter can't be called {name!r}, which means the base",
                    param="lora_name",
                    kind="InvalidUserInput",
                )
            if name in self._loaded and not in_place:
                raise RefusalError(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the "
                    "adapter in place, set 'load_inplace' to True.",
                    param="lora_name",
                    kind="InvalidUserInput",
                )
            self._load(name, self.places.allowed(path))

    def _load(self, name: str, folder: Path) -> None:
        began = time.monotonic()
        record = self._bank.load(name, folder)
        took, size = time.monotonic() - began, self._bank.size_bytes(name)
        base = self._base_check(record)
        self._loaded[name] = Loaded(folder, int(time.time()), took, record, size, base)
        self._unloaded.discard(name)

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that were accepted with it are answered by it.

        Raises:
            RefusalError: there is none of that name.
        """
        with self._loading:
            if name not in self._loaded:
                raise RefusalError(
                    f"The lora adapter '{name}' cannot be found{did_you_mean(name, self._loaded)}",
                    404,
                    param="lora_name",
                )
            del self._loaded[name]
            self._unloaded.add(name)
            self._bank.unload(name)

    def choose(
        self,
        model: str | None,
        adapter_id: str | None = None,
        adapters: Sequence[tuple[str, float]] | None = None,
        *,
        check: Callable[[Sequence[str]], None] = lambda names: None,
    ) -> Chosen:
        """What a request names, as it is now.

        Args:
            model: the base, an adapter, or BASE:ADAPTER; None or "": the base.
            adapter_id: an adapter, in the words of LoRAX.
            adapters: several with weights, which are summed.
            check: is called with the adapters' names before any is looked for and loaded; raises
                where they may not be asked.

        Raises:
            RefusalError: a name is not known, or they contradict each other.
            LorakitError: an adapter was evicted, and its folder is not what it was.
        """
        named = self._adapter_of(model)
        if adapter_id:
            if named not in (None, adapter_id):
                raise RefusalError(
                    f"model names {named!r} and adapter_id {adapter_id!r}: give one",
                    param="adapter_id",
                )
            named = self._known(adapter_id, "adapter_id")
        if adapters is None:
            pairs = [] if named is None else [(named, 1.0)]
        elif named is not None:
            raise RefusalError(
                f"the request names the adapter {named!r}, and adapters too: give one",
                param="adapters",
            )
        else:
            pairs = [(self._known(name, "adapters"), weight) for name, weight in adapters]
        check([name for name, _ in pairs])
        for name, _ in pairs:
            self._resolve(name)
        return self._chosen(named or model or self.name, pairs)

    def _resolve(self, name: str) -> None:
        """Load an adapter that is asked for the first time."""
        if name not in self._loaded:
            with self._loading:
                if name not in self._loaded:
                    self._load(name, self.places.resolved(name))

    def _adapter_of(self, model: str | None) -> str | None:
        """The adapter that a model's name means; None: the base."""
        if not model or model == self.name:
            return None
        if model not in self._loaded and model.startswith(f"{self.name}:"):
            return self._known(model.removeprefix(f"{self.name}:"), "model")
        return self._known(model, "model")

    def _known(self, name: str, param: str) -> str:
        may_come = name not in self._unloaded and self.places.may_resolve(name)
        if name not in self._loaded and not may_come:
            known = [self.name, *self._loaded]
            hint = did_you_mean(name, known) or f". There are: {', '.join(known[:8])}"
            raise RefusalError(f"The model `{name}` does not exist{hint}", 404, param=param)
        return name

    def _chosen(self, name: str, pairs: Sequence[tuple[str, float]]) -> Chosen:
        try:
            held = [(self._bank.hold(each), weight) for each, weight in pairs]
        except BankError as error:
            # Unloaded since its name was looked up, or no room for it in memory.
            missing = [each for each, _ in pairs if each not in self._loaded]
            raise RefusalError(str(error), 404 if missing else 503, param="model") from None
        use = Use(tuple(held))
        trained = [TrainedUse.on(each.record.card) for each, _ in held]
        templates = {each.chat_template for each in trained}
        ends = [end for each in trained for end in each.end_tokens]
        return Chosen(
            name=name,
            use=use,
            fingerprint=use.fingerprint(self._base),
            tokenizer=with_template(
                self.tokenizer, templates.pop() if len(templates) == 1 else None
            ),
            ends=frozenset(end_tokens(self._model, self.tokenizer, trained=ends)),
            trained=trained[0] if len(trained) == 1 else None,
            heads=self._heads([each for each, _ in held]) if self._encodes else (),
        )

    def _heads(self, held: Sequence[Held]) -> tuple[Head | None, ...]:
        """The trained heads of adapters, or that of the base, which may be a classifier itself."""
        fresh = fresh_heads(self._model)
        base = None if fresh else Head(labels_of(self._model), task_of(self._model))
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
        """An adapter as it is now."""
        return self._bank.hold(name)

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
        if use.task not in (None, *(ENCODING if self._encodes else ("generation",))):
            own = "encodes texts" if self._encodes else "writes text"
            raise AdapterFileError(f"the adapter does {use.task}, and the server {own}")
        if use.chat_template is not None:
            check_template(with_template(self.tokenizer, use.chat_template))
        check_slots(attachment_for(self._model), updates)


def _base_hash(model: PreTrainedModel) -> str:
    """What stands for the base's weights in a fingerprint."""
    identity: Any = identity_of(model)
    facts = f"{identity.names_hash} {identity.samples} {identity.dtype} {model.dtype}"
    return hashlib.sha256(facts.encode()).hexdigest()
