"""A verb: settings in, a result out that people and programs can read."""

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from lorakit.config.base import Settings

VERBS = {
    "demo": "Train, switch, mix and merge adapters on a real model, in minutes.",
    "train": "Train an adapter on your model and your data.",
    "evaluate": "Score a model, with or without an adapter, on held-out rows.",
    "generate": "Complete prompts, with or without an adapter.",
    "merge": "Write a plain model that has the adapter in its weights.",
    "convert": "Read an adapter of one format and write it in another.",
    "bench latency": "Time a forward pass with each method: Table 1 of the paper.",
    "bench load": "Time the loading of adapters, beside PEFT and plain reading.",
    "bench methods": "Train every method of the paper on the same rows, and score each.",
    "bench mixed": "Time batches of many adapters, beside PEFT and the plain model.",
    "bench switch": "Time switching between adapters, beside PEFT.",
    "bench sweep": "Time training many adapters at once, beside one by one.",
    "bench train": "Time training, beside PEFT and full fine-tuning.",
}
"""Each verb's name, of one word or two, and meaning: listing them here imports none of them."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a verb found or made."""

    text: str
    """For people: printed on stdout when the verb ends. Empty: nothing is printed."""

    data: dict[str, Any]
    """For programs: what --json prints. Paths, tuples and NaN are made into JSON."""


@runtime_checkable
class Verb(Protocol):
    """What the module `lorakit.cli.NAME` of a verb must have.

    A module whose verbs have two words has a mapping SECOND_WORDS of these to such objects.

    While a verb runs it may print to stdout, as `generate` streams its words: with --json, main
    sends all of that to stderr. Progress and messages go to stderr themselves. A mistake of the
    user is a LorakitError. A verb that stops tidily on Ctrl-C raises a KeyboardInterrupt whose
    argument says how to go on.
    """

    SETTINGS: type[Settings]
    """The verb's settings, from which its flags and its help are made."""

    def run(self, settings: Any) -> Result:
        """Do the work that the settings, an instance of SETTINGS, ask for."""
        ...


def second_words(first: str) -> list[str]:
    """Return what can follow the first word of verbs that have two."""
    return [name.partition(" ")[2] for name in VERBS if name.startswith(f"{first} ")]


def load_verb(name: str) -> Verb:
    """The module of a verb, importing it now: torch and transformers take seconds."""
    first, _, second = name.partition(" ")
    module = importlib.import_module(f"lorakit.cli.{first}")
    return cast(Verb, module.SECOND_WORDS[second] if second else module)


@contextmanager
def loaded_verb(name: str) -> Iterator[Verb]:
    """Yield the module of a verb, for as long as it is used, and spare Python a search for garbage.

    Imports leave half a million objects, which stay. To look through them over and over, while they
    come and while the verb runs, would take a quarter of the time to a run's first step.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        verb = load_verb(name)
        gc.freeze()
    finally:
        if enabled:
            gc.enable()
    try:
        yield verb
    finally:
        gc.unfreeze()
