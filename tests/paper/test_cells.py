"""The paper's cells: each is read, can be run, and trains as many values as it says."""

from pathlib import Path

import pytest

from covering import sampled
from lorakit.config.answering import EvaluateConfig
from lorakit.errors import ConfigError
from lorakit.paper.cell import FOLDER, SHARED, Part, cells, chosen, merged, tables
from lorakit.paper.job import config_of, jobs_of
from lorakit.paper.settings import CellChoice
from lorakit.paper.shapes import SHAPES, trained_parameters

KNOWN = {
    "table2.ft roberta-base",
    "table2.ft roberta-large",
    "table2.ft deberta-xxlarge",
    "table3.ft gpt2-medium",
    "table4.ft gpt3",
    "table4.bitfit gpt3",
    "table13.ft gpt2-medium",
    "table14.ft gpt2-medium",
    "table3.lora gpt2-medium",
    "table3.lora gpt2-large",
    "table3.adapter-h gpt2-medium",
    "table13.lora gpt2-medium",
    "table14.lora gpt2-medium",
    *(f"table5.{which} gpt3" for which in ("q", "k", "v", "o", "qk", "qv", "qkvo")),
    "table15.lora-pre-embed-8 gpt3",
    "table15.lora-pre-layer gpt3",
}
"""Rows whose printed count is another than ours; of Table 5 18M is rounded down."""
COUNTED = [
    f"{cell.id} {number}"
    for cell in cells().values()
    for number, row in enumerate(cell.published)
    if row.counted is not None
]


def test_every_file_is_a_row_of_its_table():
    for name, table in tables().items():
        files = {file.stem for file in (FOLDER / name).glob("*.yaml")}
        assert sorted([*table.rows, SHARED]) == sorted(files), name


def test_every_cell_has_a_table_and_values_of_its_columns_alone():
    for cell in cells().values():
        columns = {*tables()[cell.table].columns, "average"}
        for row in cell.published:
            assert set(row.values) <= columns, cell.id
            assert row.runs or row.note, cell.id
            assert row.model in SHAPES, cell.id


def test_our_count_is_the_printed_one_or_the_difference_is_known():
    differs = set()
    for cell in cells().values():
        for row in cell.published:
            printed, millions, _ = row.printed.replace(",", "").partition("M")
            if not millions or row.counted is None:
                continue
            digits = len(printed.partition(".")[2])
            if abs(row.counted / 1e6 - float(printed)) > 0.6 * 10**-digits:
                differs.add(f"{cell.id} {row.model}")
    assert differs == KNOWN


@sampled("which", COUNTED, share=5)
def test_a_published_row_trains_as_many_values_as_it_says(which):
    name, _, number = which.partition(" ")
    cell = cells()[name]
    row = cell.published[int(number)]
    assert trained_parameters(row.model, config_of(row, cell)) == row.counted


@pytest.mark.parametrize("scale", [pytest.param("small", marks=pytest.mark.thorough), "full"])
def test_every_run_of_a_cell_has_settings_that_can_be_used(scale):
    for cell in cells().values():
        known = cell.small if scale == "small" else any(row.runs for row in cell.published)
        if not known:
            continue
        models = [None] if scale == "small" else [r.model for r in cell.published if r.runs]
        for model in models:
            jobs = jobs_of(CellChoice(cells=cell.id, scale=scale, model=model))
            assert jobs, cell.id
            for job in jobs:
                config = job.config(data=Path("data"), out=Path("out"))
                # Of several methods, each has the rate of its own.
                assert config.learning_rate or len(config.method) > 1, job.name
                for search in (job.scoring.answers, *job.scoring.also.values()):
                    EvaluateConfig(**search)


def test_the_repository_s_settings_differ_where_they_say_so():
    def job(variant):
        which = {"model": "roberta-base", "tasks": "cola", "seeds": (0,), "variant": variant}
        (found,) = jobs_of(CellChoice(cells="table2.lora", scale="full", **which))
        return found.config(data=None, out=Path("out"))

    paper, repository = job("paper"), job("repository")
    assert (paper.lora.alpha, repository.lora.alpha) == (8, 16)
    assert (paper.batch_size, repository.batch_size) == (32, 64)
    # 6 % of 80 epochs of 268 batches.
    assert (paper.warmup_steps, repository.warmup_steps) == (1286, 643)


def test_a_later_level_overrides_setting_by_setting():
    below = Part(train={"lora": {"rank": 8, "alpha": 8}, "steps": 1}, warmup_ratio=0.1)
    found = merged([below, Part(train={"lora": {"rank": 4}})])
    assert found.train == {"lora": {"rank": 4, "alpha": 8}, "steps": 1}
    assert found.warmup_ratio == 0.1


def test_cells_are_chosen_by_id_table_or_pattern():
    assert [cell.id for cell in chosen(["table2.lora"])] == ["table2.lora"]
    assert {cell.table for cell in chosen(["table2"])} == {"table2"}
    assert "table2.lora" in {cell.id for cell in chosen(["*.lora"])}
    assert len(chosen([])) == len(cells())
    words = ("table2.lora,table2.ft", "table3")
    assert CellChoice(cells=words).cells == ("table2.lora", "table2.ft", "table3")


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"cells": "table2.lore, table99"}, ["'table2.lore'; did you mean 'table2.lora'", "99"]),
        ({"cells": "table2.lora", "tasks": "cola,coal"}, ["there is no task 'coal'"]),
        ({"cells": "table2.lora", "tasks": "e2e"}, ["none of these cells has a run"]),
        ({"cells": "table2.lora", "model": "roberta-base"}, ["model and variant are of --scale"]),
        (
            {"cells": "table2.lora", "scale": "full", "model": "gpt2"},
            ["no published model 'gpt2'; it has roberta-base, roberta-large, deberta-xxlarge"],
        ),
        ({"cells": "table2.ft", "scale": "full"}, ["gives no settings for it"]),
    ],
)
def test_what_cannot_be_run_is_told_before_anything_is_read(settings, messages):
    with pytest.raises(ConfigError) as error:
        jobs_of(CellChoice(**settings))
    assert all(message in str(error.value) for message in messages)
