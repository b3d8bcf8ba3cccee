"""The verbs that look into ΔW: inspect, compare, and convert with combine and from_checkpoint."""

import json

import pytest
import torch

import lorakit as lk
from lorakit.analysis import combine, compress
from lorakit.cli.main import main
from references import attach_random


@pytest.fixture(scope="module")
def folders(tiny_llama, tmp_path_factory):
    """Adapters of one base: two of LoRA, one of DoRA, one of virtual tokens."""
    made = tmp_path_factory.mktemp("analysed")
    model, _ = lk.load_model(str(tiny_llama))
    for seed, name in enumerate(["one", "two"]):
        attach_random(model, seed=seed, rank=4, targets="q,v,down")
        lk.extract(model).save(made / name)
        lk.detach(model)
    attach_random(model, rank=2, use_dora=True)
    lk.extract(model).save(made / "dora")
    lk.detach(model)
    lk.attach(model, lk.PrefixConfig(prefix=1, infix=1))
    lk.extract(model).save(made / "prefix")
    return made


def test_inspect_shows_the_spectrum_by_role(folders, run, capsys):
    assert main(["inspect", str(folders / "one")]) == 0
    text = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(text) if line.startswith("ΔW (median, most)"))
    assert text[start].split("  ")[-1] == "‖ΔW‖"
    assert [line.split()[0] for line in text[start + 1 : start + 4]] == [
        "q_proj",
        "v_proj",
        "down_proj",
    ]
    _, facts = run("inspect", folders / "one")
    found = facts["spectrum"]["model.layers.0.self_attn.q_proj"]
    assert found["rank"] == len(found["singular_values"]) == 4
    assert 1 <= found["effective_rank"] <= 4
    assert (facts["amplification"], facts["advice"], facts["not_shown"]) == ({}, None, [])


def test_inspect_with_the_base_shows_what_is_amplified(folders, tiny_llama, run, capsys):
    assert main(["inspect", str(folders / "one"), "--model", str(tiny_llama)]) == 0
    text = capsys.readouterr().out
    assert "‖ΔW‖/‖W‖" in text
    assert "in ΔW's directions" in text
    _, facts = run("inspect", folders / "dora", "--model", tiny_llama)
    found = facts["amplification"]["model.layers.0.self_attn.q_proj"]
    assert found["in_delta"] <= found["in_weight"] <= found["weight_norm"]
    assert found["svd"] == "exact"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dora", "not shown: lora: DoRA's ΔW = m/‖W + scale·B·A‖·(W + scale·B·A) − W needs"),
        ("prefix", "not shown: prefix-embedding: virtual tokens are inputs of the blocks"),
    ],
)
def test_inspect_says_what_it_cannot_show(name, reason, folders, run, capsys):
    assert main(["inspect", str(folders / name)]) == 0
    assert reason in capsys.readouterr().out
    code, result = run("inspect", folders / name, "--advise")
    assert code == 2
    assert "compressing needs ΔW = scale·B·A" in result["error"]["message"]


@pytest.mark.thorough
def test_advice_is_scored_and_written(folders, prompt_rows, tmp_path, run, capsys):
    words = ["inspect", folders / "one", "--advise", "--energy", 0.8, "--metrics", "loss"]
    words += ["--data.validation", prompt_rows, "--data.validation-rows", 8]
    out = tmp_path / "small"
    code, facts = run(*words, "--out", out)
    assert code == 0
    advice, small = facts["advice"], lk.Adapter.load(out)
    assert advice["ranks"] == {site.name: site.rank for site in small.sites}
    assert advice["parameters"] == [facts["parameters"], small.parameters]
    assert advice["parameters"][0] > advice["parameters"][1]
    assert small.card["compressed"]["scores"] == advice["scores"]
    for which, folder in (("before", folders / "one"), ("after", out)):
        data = lk.DataConfig(validation=str(prompt_rows), validation_rows=8)
        scores = lk.evaluate(adapter=folder, data=data, metrics=["loss"])
        assert advice["scores"][which]["loss"] == pytest.approx(scores["loss"], rel=1e-5)
    wanted = compress(folders / "one", energy=0.8)
    assert [site.rank for site in small.sites] == [site.rank for site in wanted.sites]
    assert main([str(word) for word in [*words[:5], "--data.validation", prompt_rows]]) == 0
    text = capsys.readouterr().out
    assert "80% of the energy of each ΔW needs these ranks" in text
    assert "score" in text
    code, result = run(*words, "--out", out)
    assert (code, "exists" in result["error"]["message"]) == (2, True)


def test_advice_settings_without_advice_are_refused(folders, run):
    code, result = run("inspect", folders / "one", "--energy", 0.5, "--out", "x")
    assert code == 2
    assert "out and energy: of advice on ranks; give advise too" in result["error"]["message"]


def test_compare_shows_parts_and_has_every_site(folders, run, capsys):
    assert main(["compare", str(folders / "one"), str(folders / "two")]) == 0
    text = capsys.readouterr().out
    assert "6 sites in both, 0 in the first alone, 0 in the second alone" in text
    assert "by chance" in text
    _, facts = run("compare", folders / "one", folders / "one")
    assert facts["cosine"] == pytest.approx(1)
    site = facts["sites"]["model.layers.1.mlp.down_proj"]
    assert site["similarity_a"][3][3] == pytest.approx(1)
    assert len(site["angles_b"]) == 4
    code, result = run("compare", folders / "one", folders / "prefix")
    assert code == 2
    assert "adapter 2  prefix-embedding: virtual tokens" in result["error"]["message"]


def test_convert_combines_adapters(folders, tmp_path, run, capsys):
    words = ["convert", folders / "one", tmp_path / "sum", "--combine", folders / "two"]
    code, facts = run(*words, "--weights", "-1,0.5")
    assert code == 0
    assert facts["combined"]["weights"] == [-1, 0.5]
    made = lk.Adapter.load(tmp_path / "sum")
    wanted = combine([folders / "one", folders / "two"], [-1.0, 0.5])
    assert made.content_hash() == wanted.content_hash()
    words[2] = tmp_path / "cut"
    assert main([*map(str, words), "--rank", "2", "--to", "peft"]) == 0
    assert "relative error 0." in capsys.readouterr().out
    assert not (tmp_path / "cut" / "lorakit.json").exists()
    words[2] = tmp_path / "ties"
    code, facts = run(*words, "--method", "ties", "--density", 0.2)
    assert (code, facts["combined"]["svd"]) == (0, "exact")
    code, facts = run("convert", folders / "one", tmp_path / "minus", "--weights", "-1")
    assert (code, facts["combined"]["relative_error"] < 1e-6) == (0, True)


def test_convert_makes_an_adapter_from_a_checkpoint(tiny_llama, tmp_path, run, capsys):
    model, tokenizer = lk.load_model(str(tiny_llama))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] += 0.5
        model.model.norm.weight += 0.01
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    words = ["convert", "--from-checkpoint", tmp_path / "tuned", "--model", tiny_llama]
    code, facts = run(*words, "--rank", 1, "--out", tmp_path / "made")
    assert code == 0
    told = facts["from_checkpoint"]
    assert told["energy_lost"] < 1e-6
    assert told["left_out"] == ["model.norm.weight"]
    base = json.loads((tmp_path / "made" / "lorakit.json").read_text())["base"]
    assert base["name"] == str(tiny_llama)
    words[-2:] = ["--energy", "0.9"]
    code, result = run(*words, "--out", tmp_path / "other")
    assert code == 2
    assert "needs the base that was fine-tuned: give model" in result["error"]["message"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rank", "2"], "rank: of combine or from_checkpoint, which is not given"),
        (["--from-checkpoint", "--model", "x"], "from_checkpoint needs rank or energy"),
        (["--to", "gguf"], "out b: a file that ends in .gguf goes with `to gguf`"),
        (["--density", "0.2", "--seed", "3"], "density, seed: of combine or from_checkpoint"),
        (
            ["--from-checkpoint", "--combine", "b", "--model", "x", "--rank", "1"],
            "two ways to make an adapter",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words, reason, run):
    code, result = run("convert", "a", "b", *words)
    assert code == 2
    assert reason in result["error"]["message"]
