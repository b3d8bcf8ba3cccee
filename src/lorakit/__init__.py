"""lorakit: low-rank adapters on a frozen pre-trained model, from training to use.

import lorakit as lk

model, tokenizer = lk.load_model("smollm2")
lk.attach(model, lk.LoRAConfig(rank=8, alpha=16, targets=("q", "v")))
"""

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.site import Site
from lorakit.attachment.attach import attach, detach, extract, plan
from lorakit.attachment.open_model import Opened, open_model
from lorakit.attachment.state import active_name, adapter_names
from lorakit.bank import AdapterBank
from lorakit.config.methods import (
    BitFitConfig,
    BottleneckConfig,
    FullConfig,
    LoRAConfig,
    PrefixConfig,
)
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.errors import LorakitError
from lorakit.merging.merge import MergeReport, merge, unmerge
from lorakit.models.load import load_model
from lorakit.routing.route import route, switch

__all__ = [
    "Adapter",
    "AdapterBank",
    "BitFitConfig",
    "BottleneckConfig",
    "DataConfig",
    "FullConfig",
    "LoRAConfig",
    "LorakitError",
    "MergeReport",
    "Opened",
    "PrefixConfig",
    "Site",
    "TrainConfig",
    "active_name",
    "adapter_names",
    "attach",
    "detach",
    "extract",
    "load_model",
    "merge",
    "open_model",
    "plan",
    "route",
    "switch",
    "unmerge",
]
__version__ = "0.1.0"
