"""The verb evaluate: scores of a model, with or without an adapter, on held-out rows."""

from itertools import groupby

from lorakit.answering.evaluate import evaluation
from lorakit.cli.verbs import Result
from lorakit.config.answering import EvaluateConfig


def run(settings: EvaluateConfig) -> Result:
    """Score the rows and print each score."""
    found = evaluation(settings, settings.adapter, settings.model, progress=True)
    lines = []
    for scorer, group in groupby(found.scores.items(), key=lambda one: found.scorers.get(one[0])):
        if scorer is not None:
            lines.append(f"{scorer}:")
        lines += [f"{name:12} {value:.4f}" for name, value in group]
    return Result(
        text="\n".join([f"{found.rows} rows of {found.source}", *found.notes, *lines]),
        data={
            "rows": found.rows,
            "source": found.source,
            "task": found.task,
            "notes": found.notes,
            "scorers": found.scorers,
            **found.scores,
        },
    )
