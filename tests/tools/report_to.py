"""A short run that reports to a tracker, and what is then in the tracker's own record, as JSON.

python tests/tools/report_to.py TRACKER MODEL ROWS; the working folder takes the record
"""

import json
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lorakit as lk

Record = tuple[dict[str, Any], dict[str, list[float]]]
"""The settings of a run, and its figures by name."""


def run(tracker: str, model: str, rows: str) -> None:
    """Train three steps, scored after two and three."""
    data = {"train": rows, "validation": rows, "validation_rows": 4}
    how = {"steps": 3, "eval_every": 2, "batch_size": 2, "dtype": "float32"}
    lora = {"rank": 2}
    lk.train(
        lk.TrainConfig(model=model, out="mine", data=data, lora=lora, report_to=tracker, **how)
    )


def records_of_wandb(file: Path) -> Iterator[Any]:
    """The records of an offline run: a log of LevelDB's form, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield WandbRecord.FromString(parts)
            parts = b""


def wandb_record() -> Record:
    """What wandb has in its folder."""
    (file,) = Path("wandb").glob("offline-run-*/*.wandb")
    settings: dict[str, Any] = {}
    figures: dict[str, list[float]] = {}
    for record in records_of_wandb(file):
        for item in [*record.config.update, *record.run.config.update]:
            settings["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in record.history.item:
            name = "/".join(item.nested_key) or item.key
            figures.setdefault(name, []).append(json.loads(item.value_json))
    return settings, figures


def mlflow_record() -> Record:
    """What MLflow has in its data base."""
    from mlflow import MlflowClient

    client = MlflowClient()
    (found,) = client.search_runs(["0"])
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    names = found.data.metrics
    values = {n: [m.value for m in client.get_metric_history(found.info.run_id, n)] for n in names}
    return dict(found.data.params), values


def trackio_record() -> Record:
    """What Trackio has in its data base."""
    (file,) = [each for each in Path("trackio").glob("*.db") if each.stem != "traces"]
    with sqlite3.connect(file) as base:
        ((settings,),) = base.execute("SELECT config FROM configs").fetchall()
        logged = base.execute("SELECT metrics FROM metrics ORDER BY id").fetchall()
    figures: dict[str, list[float]] = {}
    for (entry,) in logged:
        for name, value in json.loads(entry).items():
            figures.setdefault(name, []).append(value)
    return json.loads(settings), figures


READERS = {"wandb": wandb_record, "mlflow": mlflow_record, "trackio": trackio_record}

if __name__ == "__main__":
    tracker, model, rows = sys.argv[1:]
    run(tracker, model, rows)
    settings, figures = READERS[tracker]()
    print(json.dumps({"settings": settings, "figures": figures}))
