"""The verbs: their names and meanings, and the interface of the module that implements one."""

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
    from lorakit.config.base import Settings


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A verb of the command line, as far as it is known without importing its module."""

    meaning: str
    """What it does, in one line."""

    settings: str
    """Where the class of its settings is, such as config.train:TrainConfig.

    Flags and help are made from that class, so its module imports neither torch nor transformers,
    which take seconds.
    """


VERBS = {
    "demo": Entry(
        meaning="Train, switch, mix and merge adapters on a real model, in minutes.",
        settings="config.verbs:DemoConfig",
    ),
    "train": Entry(
        meaning="Train an adapter on your model and your data.",
        settings="config.train:TrainConfig",
    ),
    "estimate": Entry(
        meaning="Say what a run needs before it starts: memory, disk, FLOPs and time.",
        settings="config.estimate:EstimateConfig",
    ),
    "evaluate": Entry(
        meaning="Score a model, with or without an adapter, on held-out rows.",
        settings="config.answering:EvaluateConfig",
    ),
    "generate": Entry(
        meaning="Complete prompts, with or without an adapter.",
        settings="config.answering:GenerateConfig",
    ),
    "predict": Entry(
        meaning="Answer rows by classifiers and their kin, several in one batch.",
        settings="config.answering:PredictConfig",
    ),
    "score": Entry(
        meaning="Score a file of outputs by its task's official scorer.",
        settings="config.verbs:ScoreConfig",
    ),
    "chat": Entry(
        meaning="Talk to a model in the terminal, and switch between adapters.",
        settings="config.verbs:ChatConfig",
    ),
    "serve": Entry(
        meaning="Serve one base with many adapters, by OpenAI's HTTP API.",
        settings="config.serve:ServeConfig",
    ),
    "inspect": Entry(
        meaning="Say what an adapter is, and look inside its ΔW.",
        settings="config.verbs:InspectConfig",
    ),
    "compare": Entry(
        meaning="Say whether two adapters change the same, and in what they differ.",
        settings="config.verbs:CompareConfig",
    ),
    "merge": Entry(
        meaning="Write a plain model that has the adapter in its weights.",
        settings="config.verbs:MergeConfig",
    ),
    "convert": Entry(
        meaning="Write an adapter in another format, a sum, or one of a checkpoint.",
        settings="config.verbs:ConvertConfig",
    ),
    "push": Entry(
        meaning="Send an adapter to the Hugging Face hub, with a model card.",
        settings="config.verbs:PushConfig",
    ),
    "completion": Entry(
        meaning="Print the script that completes commands in bash, zsh or fish.",
        settings="config.verbs:CompletionConfig",
    ),
    "paper list": Entry(
        meaning="Show the paper's cells, and which have a result.",
        settings="paper.settings:PaperListConfig",
    ),
    "paper run": Entry(
        meaning="Train and score cells of the paper's tables, small or as published.",
        settings="paper.settings:PaperRunConfig",
    ),
    "paper figure": Entry(
        meaning="Draw a figure of the paper beside our results.",
        settings="paper.settings:PaperFigureConfig",
    ),
    "paper table": Entry(
        meaning="Show a table of the paper beside our results.",
        settings="paper.settings:PaperTableConfig",
    ),
    "paper claims": Entry(
        meaning="Write the page of what of the paper holds in our results.",
        settings="paper.settings:PaperClaimsConfig",
    ),
    "paper pages": Entry(
        meaning="Make all pages, tables and figures of our results again.",
        settings="paper.settings:PaperPagesConfig",
    ),
    "paper verify": Entry(
        meaning="Score the outputs of results again, and name what differs.",
        settings="paper.settings:PaperVerifyConfig",
    ),
    "bench estimate": Entry(
        meaning="Compare estimates of memory with what training takes.",
        settings="config.bench:EstimateBenchConfig",
    ),
    "bench latency": Entry(
        meaning="Time a forward pass with each method: Table 1 of the paper.",
        settings="config.bench:LatencyConfig",
    ),
    "bench load": Entry(
        meaning="Time the loading of adapters, beside PEFT and plain reading.",
        settings="config.bench:LoadConfig",
    ),
    "bench methods": Entry(
        meaning="Train every method of the paper on the same rows, and score each.",
        settings="config.bench:MethodsConfig",
    ),
    "bench mixed": Entry(
        meaning="Time batches of many adapters, beside PEFT and the plain model.",
        settings="config.bench:MixedConfig",
    ),
    "bench models": Entry(
        meaning="Try every use of an adapter on every family of models, tiny ones.",
        settings="config.bench:ModelsConfig",
    ),
    "bench serve": Entry(
        meaning="Time a server of many clients and adapters, beside generate.",
        settings="config.bench:ServeBenchConfig",
    ),
    "bench soak": Entry(
        meaning="Ask too much of a server, leave it, load bad adapters; count failures.",
        settings="config.bench:SoakConfig",
    ),
    "bench switch": Entry(
        meaning="Time switching between adapters, beside PEFT.",
        settings="config.bench:SwitchConfig",
    ),
    "bench sweep": Entry(
        meaning="Time training many adapters at once, beside one by one.",
        settings="config.bench:SweepConfig",
    ),
    "bench train": Entry(
        meaning="Time training, beside PEFT and full fine-tuning.",
        settings="config.bench:TrainBenchConfig",
    ),
}
"""Each verb by its name, of one word or two; its module is imported when it runs."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a verb, as text for people and as data for programs."""

    text: str
    """For people: printed on stdout when the verb ends. Empty: nothing is printed."""

    data: dict[str, Any]
    """For programs: what --json prints. Paths, tuples and NaN are made into JSON."""


@runtime_checkable
class Verb(Protocol):
    """The interface of a verb's module `lorakit.cli.NAME`.

    A module whose verbs have two words has a mapping SECOND_WORDS of these to such objects.

    While a verb runs it may print to stdout, as `generate` streams its words: with --json, main
    sends all of that to stderr. Progress and messages go to stderr themselves. A mistake of the
    user is a LorakitError. A verb that stops tidily on Ctrl-C raises a KeyboardInterrupt whose
    argument says how to go on.
    """

    def run(self, settings: Any) -> Result:
        """Do the verb's work with the settings, an instance of the class that VERBS names."""
        ...


def second_words(first: str) -> list[str]:
    """The second words of the verbs of two words with this first one."""
    return [name.partition(" ")[2] for name in VERBS if name.startswith(f"{first} ")]


def settings_of(name: str) -> "type[Settings]":
    """The class of a verb's settings."""
    module, _, attribute = VERBS[name].settings.partition(":")
    found = getattr(importlib.import_module(f"lorakit.{module}"), attribute)
    return cast("type[Settings]", found)


def load_verb(name: str) -> Verb:
    """The module of a verb, importing it now: torch and transformers take seconds."""
    first, _, second = name.partition(" ")
    module = importlib.import_module(f"lorakit.cli.{first}")
    return cast(Verb, module.SECOND_WORDS[second] if second else module)


@contextmanager
def loaded_verb(name: str) -> Iterator[Verb]:
    """The module of a verb, for as long as it runs, with imports kept out of garbage collection.

    Imports leave half a million objects that stay. Scanning them again and again, during the import
    and while the verb runs, would take a quarter of the time to a run's first step.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
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
        # What the caller froze would come back with the rest.
        if not frozen:
            gc.unfreeze()
