"""The paper's cells: each is read, can be run, and trains as many values as it says."""

from pathlib import Path

import pytest

from lorakit.config.paper import Chosen
from lorakit.errors import ConfigError
from lorakit.paper.cell import Part, cells, chosen, merged, tables
from lorakit.paper.job import config_of, jobs_of
from lorakit.paper.shapes import trained_parameters

PUBLISHED = [
    pytest.param(cell, row, id=f"{cell.id}-{row.model}")
    for cell in cells().values()
    for row in cell.published
]


def test_every_cell_has_a_table_and_values_of_its_columns_alone():
    for cell in cells().values():
        columns = {*tables()[cell.table].columns, "average"}
        for row in cell.published:
            assert set(row.values) <= columns, cell.id
            assert row.runs or row.note, cell.id


@pytest.mark.parametrize(
    ("cell", "row"), [case for case in PUBLISHED if case.values[1].counted is not None]
)
def test_a_published_row_trains_as_many_values_as_it_says(cell, row):
    assert trained_parameters(row.model, config_of(row, cell)) == row.counted


@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_run_of_a_cell_has_settings_that_can_be_used(scale):
    for cell in cells().values():
        known = cell.small if scale == "small" else any(row.runs for row in cell.published)
        if not known:
            continue
        models = [None] if scale == "small" else [r.model for r in cell.published if r.runs]
        for model in models:
            jobs = jobs_of(Chosen(cells=cell.id, scale=scale, model=model))
            assert jobs, cell.id
            for job in jobs:
                assert job.config(data=Path("data"), out=Path("out")).learning_rate, job.name


def test_the_repository_s_settings_differ_where_they_say_so():
    def job(variant):
        which = {"model": "roberta-base", "tasks": "cola", "seeds": (0,), "variant": variant}
        (found,) = jobs_of(Chosen(cells="table2.lora", scale="full", **which))
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
        jobs_of(Chosen(**settings))
    assert all(message in str(error.value) for message in messages)
