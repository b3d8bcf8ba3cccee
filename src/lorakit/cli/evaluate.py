"""The verb evaluate: scores of a model, with or without an adapter, on held-out rows."""

from lorakit.answering.evaluate import evaluation
from lorakit.cli.verbs import Result
from lorakit.config.answering import EvaluateConfig


def run(settings: EvaluateConfig) -> Result:
    """Score the rows and print each score."""
    found = evaluation(settings, settings.adapter, settings.model, progress=True)
    lines = [f"{name:12} {value:.4f}" for name, value in found.scores.items()]
    return Result(
        text="\n".join([f"{found.rows} rows of {found.source}", *lines]),
        data={"rows": found.rows, "source": found.source, "task": found.task, **found.scores},
    )
