"""The verb predict: what classifiers and their kin say of rows, several of them in one batch."""

import json
import sys

from lorakit.adapter.atomic_write import write_new_file
from lorakit.adapter.output_place import check_new
from lorakit.answering.predict import predictions
from lorakit.cli.verbs import Result
from lorakit.config.answering import PredictConfig


def run(settings: PredictConfig) -> Result:
    """Answer the rows; print a JSON line for each answer, or write them to a file."""
    if settings.outputs is not None:
        check_new(settings.outputs)
    found = predictions(settings, progress=True, note=_note)
    records = [each.record for each in found]
    data = {"answers": records}
    lines = [json.dumps(each, ensure_ascii=False, default=str) for each in records]
    if settings.outputs is None:
        return Result(text="\n".join(lines), data=data)
    write_new_file(settings.outputs, "".join(f"{line}\n" for line in lines).encode())
    return Result(text=f"{len(lines):,} answers in {settings.outputs}", data=data)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
