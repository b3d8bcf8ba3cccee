"""Section 7's figures and table: run on small adapters, kept, and shown beside the paper."""

import json

import pytest
import torch

import lorakit as lk
from lorakit.cli.main import main
from lorakit.paper import section7
from lorakit.paper.pages import page_of_study
from lorakit.paper.section7 import found_of
from lorakit.paper.section7_pages import study_page
from lorakit.paper.study import studies
from tiny_models import build


@pytest.fixture
def adapters(monkeypatch):
    """Adapters of a tiny Llama in the place of those of Table 6; the settings of those it made."""
    made = []

    def trained(config, *, progress):
        made.append(config)
        model = build("llama")
        lk.attach(model, lk.LoRAConfig(rank=config.lora.rank, targets=config.lora.targets))
        generator = torch.Generator().manual_seed(config.seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        adapter = lk.extract(model)
        card = {"step": 300, "scores": {"accuracy": 0.5}}
        found = lk.Adapter(**{**vars(adapter), "card": card})
        for folder in (config.out, config.out / "last"):
            found.save(folder)

    monkeypatch.setattr(section7, "train", trained)
    monkeypatch.setattr(section7, "check", lambda settings, jobs: _Data())
    monkeypatch.setattr(
        lk.Adapter, "load_base", lambda self, *_, **__: (build("llama"), None), raising=True
    )
    return made


@pytest.fixture
def run(capsys):
    """A function that runs a command line and gives back its exit code and JSON."""

    def command(*words):
        code = main([*map(str, words), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return command


class _Data:
    def hashes(self, job):
        return {"train": "0" * 64, "score": "1" * 64}


@pytest.mark.thorough
def test_a_figure_is_of_two_runs_which_are_trained_once(adapters, run, tmp_path):
    words = ["--tasks", "sst2", "--results", tmp_path / "results", "--work", tmp_path / "work"]
    code, found = run("paper", "run", "figure3", *words)
    assert code == 0
    assert found["files"] == [str(tmp_path / "results" / "figure3.small" / "sst2.json")]
    assert [config.lora.rank for config in adapters] == [8, 64]
    assert run("paper", "run", "figure4", *words)[0] == 0
    assert [(config.lora.rank, config.seed) for config in adapters[2:]] == [(64, 1)]
    (entry,) = found_of("figure3", tmp_path / "results")
    phi = torch.tensor(entry["modules"]["q_proj"]["middle"])
    kept = sorted((tmp_path / "work" / "section7").iterdir())
    eight, sixty_four = (lk.Adapter.load(each) for each in (kept[2], kept[0]))
    assert {s.rank for s in eight.sites} == {8}
    expected = lk.analysis.subspace_similarity(eight, sixty_four)
    torch.testing.assert_close(
        phi, expected["model.layers.1.self_attn.q_proj"].float(), atol=1e-4, rtol=0
    )


@pytest.mark.thorough
def test_a_figure_is_listed_and_drawn_beside_what_the_paper_reports(adapters, run, tmp_path):
    place = ["--results", tmp_path / "results"]
    words = ["--tasks", "sst2", "--work", tmp_path / "work"]
    assert run("paper", "run", "figure4", *place, *words)[0] == 0
    assert run("paper", "figure", 4, *place, "--out", tmp_path / "out")[0] == 0
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["figure4.small.md", "figure4.small.png", "figure4.small.svg"]
    page = (tmp_path / "out" / "figure4.small.md").read_text()
    assert "| minilm, sst2, q_proj, layer 1 |" in page
    assert studies()["figure4"].paper in page


def test_table_7_has_the_papers_rows_below_ours_of_two_tasks(adapters, run, tmp_path):
    place = ["--results", tmp_path / "results"]
    words = ["--work", tmp_path / "work"]
    assert run("paper", "run", "table7", *place, *words)[0] == 0
    assert [config.lora.rank for config in adapters] == [4, 64, 8, 64]
    assert [config.model for config in adapters] == ["minilm", "minilm", "smollm2", "smollm2"]
    assert adapters[2].data.validation == "task:e2e:validation"
    assert (adapters[2].steps, adapters[2].lora.targets) == (60, ("q", "v"))
    assert run("paper", "table", "table7", *place)[0] == 0
    page = study_page("table7", found_of("table7", tmp_path / "results"))
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 4 + 4 + 2
    assert rows[0].startswith("| smollm2, e2e, q_proj of layer 1, r = 8 |")
    assert rows[-2] == (
        "| GPT-3, W_q of layer 48, r = 4 | 0.32 | 21.67 | 0.02 | 61.95 | 6.91 | 21.5 |"
    )


def test_mistakes_are_told_and_nothing_is_trained(adapters, run, tmp_path):
    code, told = run("paper", "figure", 3, "--results", tmp_path)
    assert code == 2
    assert "`lorakit paper run figure3` makes it" in told["error"]["message"]
    code, told = run("paper", "run", "figure3", "table6")
    assert code == 2
    assert "figure3 and table6 are run one by one" in told["error"]["message"]
    code, told = run("paper", "run", "table7", "--scale", "full")
    assert code == 2
    assert "small twins alone" in told["error"]["message"]
    (tmp_path / "figure4.small").mkdir()
    (tmp_path / "figure4.small" / "sst2.json").write_text(json.dumps({"format": 1}))
    code, told = run("paper", "figure", 4, "--results", tmp_path)
    assert code == 2
    assert "is no result of `lorakit paper run figure4`" in told["error"]["message"]
    assert not adapters


@pytest.mark.thorough
def test_what_is_current_is_left_and_what_is_of_other_settings_is_stale(adapters, run, tmp_path):
    place = ["--results", tmp_path / "results"]
    words = ["paper", "run", "figure3", *place, "--tasks", "sst2", "--work", tmp_path / "work"]
    assert run("paper", "list", "figure3", *place)[1]["section7"][0]["state"] == "not run"
    assert run(*words)[1]["section7"][0]["state"] == "done"
    assert run(*words)[1]["files"] == []
    file = tmp_path / "results" / "figure3.small" / "sst2.json"
    entry = json.loads(file.read_text())
    entry["runs"]["r = 64"]["hash"] = "of other settings"
    file.write_text(json.dumps(entry))
    state = run("paper", "list", "figure?", "--tasks", "sst2", *place)[1]["section7"][0]
    assert (state["state"], state["why"]) == ("stale", "settings of r = 64")
    assert run("paper", "list", "--tasks", "cola", *place)[1]["section7"] == []
    found = found_of("figure3", tmp_path / "results")
    assert "sst2: stale (settings of r = 64)." in page_of_study("figure3", tmp_path / "results")
    assert found[0]["runs"]["r = 8"]["steps"] == 300
    assert run(*words)[1]["files"] == [str(file)]
    assert len(adapters) == 2
