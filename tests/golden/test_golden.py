"""Files that an earlier lorakit wrote load, resume, and give the same logits and bytes."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import lorakit as lk
from covering import sampled
from golden import bases
from lorakit.cli.main import main
from lorakit.config.marks import settings_where

HERE = Path(__file__).parent
LOGITS = safetensors.torch.load_file(HERE / "logits.safetensors")
ADAPTERS = sorted(name.removesuffix(".attached") for name in LOGITS if name.endswith(".attached"))
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "lorakit.json")
RUNS = sorted(folder.name for folder in (HERE / "runs").iterdir() if folder.is_dir())
FOREIGN = {"llama-peft": "llama-peft", "gpt2-loralib": "gpt2-loralib.pt"}
"""Other tools' files, by the name of the same adapter in `adapters`."""


def build(name):
    """The base of an adapter or a run, which its name begins with."""
    return bases.build(name.partition("-")[0])


def assert_same_logits(found, name):
    torch.testing.assert_close(found, LOGITS[name], rtol=1e-5, atol=1e-5)


def assert_same_tensors(found, expected, **tolerance):
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(
            found.tensors[name], tensor, **tolerance, msg=f"{name}: ".__add__
        )


def record(folder):
    """The content of lorakit.json without its versions and checksum."""
    read = json.loads((folder / "lorakit.json").read_text(encoding="utf-8"))
    del read["version"], read["checksum"]
    read["card"].pop("versions", None)
    return {**read, "card": completed(read["card"])}


def completed(card):
    """A card, completed with the defaults of settings that are newer than it."""
    if "data" not in card:
        return card
    defaults = lk.TrainConfig(out="run").model_dump(mode="json")
    on_card = settings_where(lk.TrainConfig, lambda mark: mark.on_card)
    return {
        **card,
        "data": {**defaults["data"], **card["data"]},
        "settings": {**{name: defaults[name] for name in on_card}, **card["settings"]},
    }


def test_nothing_is_missing():
    assert {folder.name for folder in (HERE / "adapters").iterdir()} == set(ADAPTERS)
    assert len(ADAPTERS) == 24
    assert sum(name.endswith(".merged") for name in LOGITS) == 15
    assert RUNS == ["bert-adapter-l", "llama-lora", "llama-lora+prefix-layer", "llama-sweep"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_bases_are_what_they_were(family):
    assert_same_logits(bases.logits(bases.build(family)), f"{family}.base")


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_the_same_logits(name):
    model = build(name)
    lk.attach(model, lk.Adapter.load(HERE / "adapters" / name))
    for recorded in (False, True):
        assert_same_logits(bases.logits(model, recorded=recorded), f"{name}.attached")
    if f"{name}.merged" in LOGITS:
        lk.merge(model)
        assert_same_logits(bases.logits(model), f"{name}.merged")
        lk.unmerge(model)
    else:
        with pytest.raises(lk.LorakitError, match="cannot be merged"):
            lk.merge(model)
    lk.detach(model)
    assert_same_logits(bases.logits(model), f"{name.partition('-')[0]}.base")


@sampled("name", ADAPTERS)
def test_an_adapter_is_written_again_as_the_same_files(name, tmp_path):
    before, after = HERE / "adapters" / name, tmp_path / "again"
    model, adapter = build(name), lk.Adapter.load(before)
    lk.attach(model, adapter)
    extracted = lk.extract(model)
    assert extracted.content_hash() == adapter.content_hash() == record(before)["content_hash"]
    extracted.save(after)
    assert record(after) == record(before)
    for file in ADAPTER_FILES[:2]:
        assert (after / file).read_bytes() == (before / file).read_bytes(), file


@pytest.mark.parametrize("name", FOREIGN)
def test_another_tool_s_file_is_read_as_the_same_adapter(name):
    path = HERE / "foreign" / FOREIGN[name]
    settings = path.with_suffix(".json")
    config = lk.LoRAConfig(**json.loads(settings.read_text())) if path.is_file() else None
    found, expected = (
        lk.Adapter.load(path, config=config),
        lk.Adapter.load(HERE / "adapters" / name),
    )
    assert_same_tensors(found, expected, rtol=0, atol=0)
    assert found.content_hash() == expected.content_hash()
    model = build(name)
    lk.attach(model, found)
    assert_same_logits(bases.logits(model), f"{name}.attached")
    extracted = lk.extract(model)  # with what only the model can say of its layers
    assert (extracted.sites, extracted.configs) == (expected.sites, expected.configs)


def repeats_bits():
    """Whether this processor rounds as that of the files' writer: so training repeats."""
    return (HERE / "runs" / "arithmetic.txt").read_text().strip() == bases.arithmetic()


@pytest.fixture
def run(request, tmp_path, monkeypatch):
    """Give a copy of a run's folder, with its base and its rows, as the working directory."""
    shutil.copytree(HERE / "runs" / request.param, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    bases.save(request.param.partition("-")[0], Path("base"))
    bases.write_rows(Path("."))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the writer had: sums of several threads round otherwise
    yield
    torch.set_num_threads(threads)


@sampled("run", RUNS, share=4, indirect=True)
def test_an_interrupted_run_resumes_to_the_same_end(run):
    assert main(["train", "settings.yaml", "--resume"]) == 0
    compare_all_ends(Path("out"), exact=repeats_bits())


@pytest.mark.thorough
@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_a_run_from_the_start_comes_to_the_same_end(run):
    if not repeats_bits():
        pytest.skip("the start of PiSSA has other signs where the processor rounds otherwise")
    assert main(["train", "settings.yaml", "--out", "anew"]) == 0
    compare_all_ends(Path("anew"), exact=True)


def compare_all_ends(out, *, exact):
    """Compare each adapter that a run, or a sweep, has made with the expected one."""
    expected = sorted(file.parent for file in Path("expected").glob("**/lorakit.json"))
    assert expected
    for folder in expected:
        compare_ends(out / folder.relative_to("expected"), folder, exact=exact)


NEW_ON_CARD = "end_tokens"
"""What cards say since the golden runs were made: what ended the target turns."""


def compare_ends(found, expected, *, exact):
    """Compare the adapter at the end of a run with the expected one."""
    if exact:
        recorded = record(found)
        recorded["card"].pop(NEW_ON_CARD, None)
        assert recorded == record(expected)
        for file in ADAPTER_FILES[:2]:
            assert (found / file).read_bytes() == (expected / file).read_bytes(), file
    ours, theirs = lk.Adapter.load(found), lk.Adapter.load(expected)
    assert_same_tensors(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours.sites, ours.configs, ours.base) == (theirs.sites, theirs.configs, theirs.base)
    card, wanted = completed(ours.card), completed(theirs.card)
    card.pop(NEW_ON_CARD, None)
    assert card.pop("scores") == pytest.approx(wanted.pop("scores"), rel=1e-3)
    assert card | {"versions": {}} == wanted | {"versions": {}}


@pytest.mark.parametrize("name", RUNS)
def test_the_end_of_a_run_is_far_from_its_checkpoint(name):
    run = HERE / "runs" / name
    for checkpoint in (run / "out").glob("**/checkpoint-*"):
        member = checkpoint.parents[1].relative_to(run / "out")
        end = lk.Adapter.load(run / "expected" / member / "last").tensors
        halfway = lk.Adapter.load(checkpoint).tensors
        assert max((end[n] - tensor).abs().max() for n, tensor in halfway.items()) > 5e-3, member
