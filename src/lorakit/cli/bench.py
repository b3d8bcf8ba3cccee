"""The verbs of `lorakit bench`: lorakit beside its peers, measured in one run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorakit.bench.latency import LatencyConfig, measure_latency
from lorakit.bench.load import LoadConfig, measure_load
from lorakit.bench.methods import MethodsConfig, measure_methods
from lorakit.bench.mixed import MixedConfig, measure_mixed
from lorakit.bench.result import Findings, Measured, run_bench
from lorakit.bench.sweep import SweepConfig, measure_sweep
from lorakit.bench.switch import SwitchConfig, measure_switch
from lorakit.bench.tables import table
from lorakit.bench.train import measure_train
from lorakit.bench.train_settings import TrainBenchConfig
from lorakit.cli.verbs import Result, Verb
from lorakit.config.base import Settings


@dataclass
class Bench:
    """One benchmark as a verb."""

    name: str
    SETTINGS: type[Settings]
    measure: Callable[[Any], Findings]

    def run(self, settings: Measured) -> Result:
        """The tables of a measurement, which is written to `settings.out` too."""
        result = run_bench(self.name, settings, self.measure)
        written = f"\n\nwritten to {settings.out}" if settings.out else ""
        return Result(text=table(result) + written, data=result)


SECOND_WORDS: dict[str, Verb] = {
    "latency": Bench("latency", LatencyConfig, measure_latency),
    "load": Bench("load", LoadConfig, measure_load),
    "methods": Bench("methods", MethodsConfig, measure_methods),
    "mixed": Bench("mixed", MixedConfig, measure_mixed),
    "switch": Bench("switch", SwitchConfig, measure_switch),
    "sweep": Bench("sweep", SweepConfig, measure_sweep),
    "train": Bench("train", TrainBenchConfig, measure_train),
}
"""Each benchmark, by the second word of its verb."""
