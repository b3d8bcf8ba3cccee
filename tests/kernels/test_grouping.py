import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import ConfigError, MissingExtraError, RouteError
from lorakit.kernels import grouping as module
from lorakit.kernels.grouping import group_rows

indices_of_rows = st.lists(st.integers(-1, 5), min_size=1, max_size=20)


def listed(index, size):
    return list(range(size)) if index is None else index.tolist()


@given(indices_of_rows)
def test_every_place_of_a_group_holds_a_row_of_the_groups_adapter(index_of_row):
    found = group_rows(index_of_row)
    places = listed(found.order, found.rows)
    assert len(places) == found.groups * found.rows_per_group
    for place, row in enumerate(places):
        group = place // found.rows_per_group
        assert index_of_row[row] == listed(found.index_of_group, found.groups)[group]


@given(indices_of_rows)
def test_each_row_with_an_adapter_has_one_place_to_come_back_from(index_of_row):
    found = group_rows(index_of_row)
    places = listed(found.order, found.rows)
    adapted = listed(found.adapted, found.rows)
    assert adapted == [row for row, adapter in enumerate(index_of_row) if adapter >= 0]
    assert [places[place] for place in listed(found.back, len(places))] == adapted


@given(indices_of_rows)
def test_no_number_of_rows_per_group_is_cheaper(index_of_row):
    counts = [index_of_row.count(adapter) for adapter in set(index_of_row) - {-1}]

    def cost(size):
        return sum(-(-count // size) for count in counts) * (1 + 0.5 * size)

    found = group_rows(index_of_row)
    assert found.groups * (1 + 0.5 * found.rows_per_group) == cost(found.rows_per_group)
    for size in (1, 2, 4, 8, 16, max(counts, default=1)):
        assert cost(found.rows_per_group) <= cost(size)


@pytest.mark.parametrize("index_of_row", [[3, 0, 2, 1], [1, 1, 0, 0], [2] * 5])
def test_rows_that_are_grouped_already_stay_where_they_are(index_of_row):
    found = group_rows(index_of_row)
    assert (found.order, found.back, found.adapted) == (None, None, None)


def test_adapters_in_order_need_no_copy_of_the_weights():
    assert group_rows([0, 0, 1, 1]).index_of_group is None
    assert group_rows([1, 1, 0, 0]).index_of_group.tolist() == [1, 0]


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(RouteError, match="for 2 rows, but the batch has 3"):
        group_rows([0, 1]).per_row(torch.zeros(3, 4))


def test_the_cpu_gets_plain_torch():
    assert group_rows([0]).kernels == "plain"


def test_float64_gets_plain_torch_on_any_device(monkeypatch):
    monkeypatch.setattr(module, "_on_gpu", lambda device: True)
    assert group_rows([0], dtype=torch.float32).kernels == "triton"
    assert group_rows([0], dtype=torch.float64).kernels == "plain"
    assert group_rows([0], dtype=torch.float32, kernels="plain").kernels == "plain"


def test_a_gpu_without_triton_gets_plain_torch(monkeypatch):
    monkeypatch.setattr(module, "_on_gpu", lambda device: True)
    monkeypatch.setattr(module, "_has_triton", lambda: False)
    assert group_rows([0]).kernels == "plain"
    with pytest.raises(MissingExtraError, match=r"'triton' .*: pip install 'lorakit\[gpu\]'"):
        group_rows([0], kernels="triton")


def test_triton_by_name_is_refused_where_it_cannot_work():
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(ConfigError, match=r"no torch\.float64: use float32"):
        group_rows([0], dtype=torch.float64, kernels="triton")
    with pytest.raises(ConfigError, match=r"needs a CUDA device .* is on cpu"):
        group_rows([0], kernels="triton")


@pytest.mark.thorough
def test_plain_torch_does_not_import_triton():
    code = (
        "import sys, torch, lorakit\n"
        "from lorakit.kernels.grouping import group_rows\n"
        "from lorakit.kernels.grouped import down_project, gather\n"
        "one = torch.ones(1, 1, 1)\n"
        "down_project(one, gather(one, group_rows([0])), group_rows([0]))\n"
        "sys.exit('triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
