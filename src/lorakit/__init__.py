"""lorakit: low-rank adapters on a frozen pre-trained model, from training to use.

import lorakit as lk

model, tokenizer = lk.load_model("smollm2")
lk.attach(model, lk.LoRAConfig(rank=8, alpha=16, targets=("q", "v")))

A name is imported when it is first used: `import lorakit` alone does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit import analysis as analysis
    from lorakit import errors as errors
    from lorakit.adapter.adapter import Adapter as Adapter
    from lorakit.answering.evaluate import evaluate as evaluate
    from lorakit.answering.generate import generate as generate
    from lorakit.answering.predict import predict as predict
    from lorakit.attachment.attach import attach as attach
    from lorakit.attachment.attach import detach as detach
    from lorakit.attachment.attach import extract as extract
    from lorakit.attachment.attach import plan as plan
    from lorakit.attachment.attached import attached as attached
    from lorakit.attachment.plan import Plan as Plan
    from lorakit.bank import AdapterBank as AdapterBank
    from lorakit.config.methods import BitFitConfig as BitFitConfig
    from lorakit.config.methods import BottleneckConfig as BottleneckConfig
    from lorakit.config.methods import FullConfig as FullConfig
    from lorakit.config.methods import LoRAConfig as LoRAConfig
    from lorakit.config.methods import PrefixConfig as PrefixConfig
    from lorakit.config.train import DataConfig as DataConfig
    from lorakit.config.train import TrainConfig as TrainConfig
    from lorakit.data.metrics.score import score as score
    from lorakit.errors import LorakitError as LorakitError
    from lorakit.estimating.estimate import estimate as estimate
    from lorakit.merging.merge import merge as merge
    from lorakit.merging.merge import unmerge as unmerge
    from lorakit.merging.merged import merged as merged
    from lorakit.merging.report import MergeReport as MergeReport
    from lorakit.models.load import load_model as load_model
    from lorakit.models.replication import replicate_layers as replicate_layers
    from lorakit.routing.route import route as route
    from lorakit.routing.route import switch as switch
    from lorakit.serving.serve import serve as serve
    from lorakit.training.run import train as train
    from lorakit.training.save_adapter import SaveAdapter as SaveAdapter
    from lorakit.training.sweep.sweep import sweep as sweep

__version__ = "0.1.0"

_HOMES = {
    "adapter.adapter": ("Adapter",),
    "analysis": ("analysis",),
    "answering.evaluate": ("evaluate",),
    "answering.generate": ("generate",),
    "answering.predict": ("predict",),
    "attachment.attach": ("attach", "detach", "extract", "plan"),
    "attachment.attached": ("attached",),
    "attachment.plan": ("Plan",),
    "bank": ("AdapterBank",),
    "config.methods": (
        "BitFitConfig",
        "BottleneckConfig",
        "FullConfig",
        "LoRAConfig",
        "PrefixConfig",
    ),
    "config.train": ("DataConfig", "TrainConfig"),
    "data.metrics.score": ("score",),
    "errors": ("LorakitError", "errors"),
    "estimating.estimate": ("estimate",),
    "merging.merge": ("merge", "unmerge"),
    "merging.merged": ("merged",),
    "merging.report": ("MergeReport",),
    "models.load": ("load_model",),
    "models.replication": ("replicate_layers",),
    "routing.route": ("route", "switch"),
    "serving.serve": ("serve",),
    "training.run": ("train",),
    "training.save_adapter": ("SaveAdapter",),
    "training.sweep.sweep": ("sweep",),
}
"""The module of each public name; the imports above tell type checkers the same."""

_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """A public name, imported now; it is then an attribute of the module as any other."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(_HOME_OF[name])
    is_module = home.__name__ == f"{__name__}.{name}"
    globals()[name] = found = home if is_module else getattr(home, name)
    return found


def __dir__() -> list[str]:
    """All names, those too that were not used yet."""
    return sorted({*globals(), *__all__})
