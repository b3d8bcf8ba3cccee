"""The verbs of `lorakit bench`: lorakit beside its peers, measured in one run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorakit.bench.estimate import measure_estimates
from lorakit.bench.families.measure import measure_models
from lorakit.bench.latency import measure_latency
from lorakit.bench.load import measure_load
from lorakit.bench.methods import measure_methods
from lorakit.bench.mixed import measure_mixed
from lorakit.bench.result import Findings, run_bench
from lorakit.bench.serving.serve import measure_serve
from lorakit.bench.soak.soak import measure_soak
from lorakit.bench.sweep import measure_sweep
from lorakit.bench.switch import measure_switch
from lorakit.bench.tables import table
from lorakit.bench.train import measure_train
from lorakit.cli.verbs import Result, Verb
from lorakit.config.bench import Measured


@dataclass
class Bench:
    """One benchmark as a verb."""

    name: str
    measure: Callable[[Any], Findings]

    def run(self, settings: Measured) -> Result:
        """The tables of a measurement, which is written to `settings.out` too."""
        result = run_bench(self.name, settings, self.measure)
        written = f"\n\nwritten to {settings.out}" if settings.out else ""
        return Result(text=table(result) + written, data=result)


SECOND_WORDS: dict[str, Verb] = {
    "estimate": Bench("estimate", measure_estimates),
    "latency": Bench("latency", measure_latency),
    "load": Bench("load", measure_load),
    "methods": Bench("methods", measure_methods),
    "mixed": Bench("mixed", measure_mixed),
    "models": Bench("models", measure_models),
    "serve": Bench("serve", measure_serve),
    "soak": Bench("soak", measure_soak),
    "switch": Bench("switch", measure_switch),
    "sweep": Bench("sweep", measure_sweep),
    "train": Bench("train", measure_train),
}
"""Each benchmark, by the second word of its verb."""
