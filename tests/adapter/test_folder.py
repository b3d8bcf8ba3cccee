"""The adapter folder: exact round trips, equal bytes for equal adapters, every refusal's text."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from adapter.handmade import IN_OWN_FORM, MAKERS, adapter, linear, site, slices
from calls import calls_in
from lorakit.adapter.adapter import Adapter
from lorakit.config import methods
from lorakit.config.methods import LoRAConfig
from lorakit.errors import AdapterFileError, OutputError

Maker = Callable[[], Adapter]
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "lorakit.json"
every_kind = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def edit_json(path: Path, **operations: Any) -> None:
    content = json.loads(path.read_text()) | operations
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "drop"}))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(folder)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return linear().save(tmp_path / "saved")


@pytest.fixture
def foreign(saved: Path) -> Path:
    """A folder such as PEFT writes: without lorakit.json."""
    (saved / RECORD).unlink()
    return saved


@every_kind
def test_a_folder_gives_back_every_fact_and_every_bit(make: Maker, tmp_path: Path) -> None:
    original = make()
    loaded = Adapter.load(original.save(tmp_path / "a"))
    assert loaded.content_hash() == original.content_hash()
    assert loaded.sites == original.sites
    assert loaded.configs == original.configs
    assert loaded.base == original.base
    assert loaded.card == original.card
    assert loaded.copied_modules == original.copied_modules
    assert loaded.target_modules == original.target_modules
    assert loaded.unverified == ()
    assert all(torch.equal(loaded.tensors[name], t) for name, t in original.tensors.items())


@every_kind
def test_equal_adapters_give_equal_bytes(make: Maker, tmp_path: Path) -> None:
    first, second = make().save(tmp_path / "a"), make().save(tmp_path / "b")
    again = Adapter.load(first).save(tmp_path / "c")
    for name in (CONFIG, WEIGHTS, RECORD):
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert (first / name).read_bytes() == (again / name).read_bytes()


@every_kind
def test_only_what_peft_can_express_has_a_peft_type(make: Maker, tmp_path: Path) -> None:
    config = json.loads((make().save(tmp_path / "a") / CONFIG).read_text())
    assert ("peft_type" in config) == (make not in IN_OWN_FORM)
    assert ("method" in config) == (make in IN_OWN_FORM)


def test_the_files_are_as_peft_writes_them(saved: Path) -> None:
    data = (saved / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    assert set(safetensors.torch.load(data)) == {
        f"base_model.model.model.layers.{block}.q_proj.lora_{end}.weight"
        for block in (0, 1)
        for end in "AB"
    }
    config = json.loads((saved / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == "someone/tiny"
    assert config["task_type"] == "CAUSAL_LM"


def test_an_existing_folder_is_refused_and_stays_as_it_was(saved: Path) -> None:
    before = (saved / WEIGHTS).read_bytes()
    with pytest.raises(OutputError, match=r"saved exists and is not empty: .*overwrite=True"):
        slices().save(saved)
    assert (saved / WEIGHTS).read_bytes() == before


def test_overwrite_replaces_the_adapter_and_leaves_other_files(saved: Path) -> None:
    (saved / "log.jsonl").write_text("kept")
    (saved / "checkpoints").mkdir()
    slices().save(saved, overwrite=True)
    assert Adapter.load(saved).content_hash() == slices().content_hash()
    names = {CONFIG, WEIGHTS, RECORD, "README.md", "log.jsonl", "checkpoints"}
    assert {path.name for path in saved.iterdir()} == names


def test_an_empty_folder_may_be_written_to(tmp_path: Path) -> None:
    assert Adapter.load(linear().save(tmp_path)).content_hash() == linear().content_hash()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputError, match=r"a is a file; an adapter is written as a folder"):
        linear().save(tmp_path / "a")


def test_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    bad = linear()
    bad.tensors["model.layers.1.q_proj.lora_b"][2, 1] = torch.nan
    with pytest.raises(AdapterFileError, match=r"layers\.1\.q_proj\.lora_b  holds NaN .* 1 of 64"):
        bad.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_card_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the training card cannot be written as JSON"):
        replace(linear(), card={"loss": float("nan")}).save(tmp_path / "a")


def test_a_missing_folder_names_the_nearest(saved: Path) -> None:
    assert "did you mean 'saved'?" in refusal(saved.parent / "sav")
    assert "beside it are saved" in refusal(saved.parent / "xyz")
    assert "nor is there a folder" in refusal(saved / "inner" / "deep")


def test_an_empty_folder_is_no_adapter(tmp_path: Path) -> None:
    text = refusal(tmp_path)
    assert f"{CONFIG} and {WEIGHTS} missing" in text


def test_a_sub_folder_of_peft_is_pointed_at(tmp_path: Path) -> None:
    linear().save(tmp_path / "run" / "sql")
    assert f"its sub-folder has them: load {tmp_path / 'run' / 'sql'}" in refusal(tmp_path / "run")
    linear().save(tmp_path / "run" / "e2e")
    assert "its sub-folders are adapters: e2e, sql" in refusal(tmp_path / "run")


def test_a_single_file_of_a_folder_is_pointed_to_its_folder(saved: Path) -> None:
    assert f"give its folder, {saved}" in refusal(saved / WEIGHTS)


def test_a_config_beside_a_folder_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterFileError, match="leave config out"):
        Adapter.load(saved, config=LoRAConfig())


def test_every_flipped_bit_of_the_weights_is_noticed(saved: Path) -> None:
    data = (saved / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for position in range(start, len(data), 7):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        (saved / WEIGHTS).write_bytes(flipped)
        assert "is not as lorakit saved it" in refusal(saved) or "NaN" in refusal(saved)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_weights_file_is_refused(saved: Path, length: int) -> None:
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:length])
    assert f"{WEIGHTS} is not a readable safetensors file" in refusal(saved)


def test_all_problems_of_the_tensors_come_in_one_error(saved: Path) -> None:
    start = "base_model.model.model.layers"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{start}.0.q_proj.lora_A.weight"] = torch.zeros(2, 8)
        tensors[f"{start}.0.q_proj.lora_B.weight"] = torch.zeros(16, 4, dtype=torch.float16)
        tensors[f"{start}.1.q_proj.lora_B.weight"] = torch.zeros(8, 4)
        del tensors[f"{start}.1.q_proj.lora_A.weight"]
        tensors["extra"] = torch.zeros(1)

    edit_tensors(saved / WEIGHTS, spoil)
    text = refusal(saved)
    assert "(5 problems):" in text
    expected = "shape (2, 8) in the file, (4, 8) expected: was it trained with rank 2?"
    assert f"{start}.0.q_proj.lora_A.weight  {expected}" in text
    other_width = f"{start}.1.q_proj.lora_B.weight  shape (8, 4) in the file, (16, 4) expected"
    assert other_width in [line.strip() for line in text.splitlines()]
    assert "0.q_proj.lora_B.weight  is float16 in the file, float32 expected" in text
    assert f"{start}.1.q_proj.lora_A.weight  missing from the file" in text
    assert "extra  unexpected: it does not start with 'base_model.model.'" in text


def test_whole_numbers_and_infinities_are_refused(saved: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        names = sorted(tensors)
        tensors[names[0]] = torch.zeros(4, 8, dtype=torch.int32)
        tensors[names[1]][0, 0] = -torch.inf

    edit_tensors(saved / WEIGHTS, spoil)
    text = refusal(saved)
    assert "is int32; float32, bfloat16, float16 or float64 expected" in text
    assert "holds NaN or infinity in 1 of 64" in text


def test_an_edited_alpha_is_noticed_in_every_layer(saved: Path) -> None:
    edit_json(saved / CONFIG, lora_alpha=32)
    text = refusal(saved)
    assert "(2 problems)" in text
    assert (
        "gives model.layers.0.q_proj the scale 8, but it was trained with 2: was lora_alpha" in text
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"r": 8}, "gives model.layers.0.q_proj rank 8, but it was saved with 4"),
        ({"use_rslora": True}, "the scale 4, but it was trained with 2"),
        ({"alpha_pattern": {"1.q_proj": 16}}, "gives model.layers.1.q_proj the scale 4"),
        ({"target_modules": ["k_proj"]}, "target_modules is ['k_proj'], but it was saved as"),
        ({"bias": "all"}, "bias is 'all', but it was saved as 'none'"),
        ({"modules_to_save": ["x"]}, "modules_to_save is ['x'], but it was saved as None"),
        ({"layers_to_transform": [0]}, "layers_to_transform was added after"),
        ({"use_dora": True}, "use_dora is True, but it was saved otherwise"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8, "loftq_iter": 2}},
            "its LoftQ is 8 bits, 2 iterations, but it was saved with None",
        ),
    ],
)
def test_an_edited_config_is_noticed(saved: Path, change: dict[str, Any], text: str) -> None:
    edit_json(saved / CONFIG, **change)
    assert text in refusal(saved)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"r": "8"}, "r: input should be a valid integer, found '8'"),
        ({"r": 0}, "r: input should be greater than or equal to 1"),
        (
            {"trainable_token_indices": [3, -1]},
            "trainable_token_indices.1: input should be greater than or equal to 0, found '-1'",
        ),
        (
            {"target_modules": 5},
            "target_modules: input should be a valid list or input should be a valid string, found",
        ),
        ({"lora_alpha": -3}, "lora_alpha: input should be greater than 0"),
        (
            {"peft_type": "IA3"},
            "peft_type: 'IA3' is another of PEFT's methods; lorakit reads 'LORA'",
        ),
        ({"peft_type": "drop"}, "peft_type: field required"),
        ({"bias": "some"}, "bias: input should be 'none', 'all' or 'lora_only'"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: '(' is not a regular expression"),
        ({"use_qalora": True}, "use_qalora: QALoRA pools the inputs of A"),
        ({"layer_replication": [[0, 2], [2, 2]]}, "layer_replication: [2, 2] has no block"),
        ({"megatron_config": {"a": 1}}, "megatron_config: the base is a Megatron model"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base's weights"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights: 'pissa_niter_4' changes the base's weights (its start is drawn at "
            "random, by a seed that no file has); save it from PEFT with",
        ),
        (
            {"init_lora_weights": "corda"},
            "init_lora_weights: 'corda' changes the base's weights (its start depends on the texts",
        ),
        (
            {"init_lora_weights": "loftq", "loftq_config": None},
            "loftq_config: found None, and init_lora_weights 'loftq' needs its bits and iterations",
        ),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3, "loftq_iter": 1}},
            "loftq_config: loftq_bits is 4 or 8, found 3",
        ),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 0}},
            "loftq_config: loftq_iter is 1 at least, found 0",
        ),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
            "loftq_config: loftq_iter is 1 at least, found None",
        ),
        (
            {
                "init_lora_weights": "loftq",
                "loftq_config": {"loftq_bits": 4, "loftq_iter": 1, "loftq_type": "nf3"},
            },
            "loftq_config: loftq_type is unknown to lorakit, and may change the base",
        ),
        ({"use_new_thing": True}, "use_new_thing: unknown to lorakit, and it may change"),
        ({"new_config": {"a": 1}}, "new_config: unknown to lorakit, and it may change"),
    ],
)
def test_what_lorakit_cannot_do_is_refused(
    foreign: Path, change: dict[str, Any], text: str
) -> None:
    edit_json(foreign / CONFIG, **change)
    assert f"{CONFIG}  {text}" in refusal(foreign)


def test_unknown_settings_that_are_off_are_ignored_and_others_reported(foreign: Path) -> None:
    edit_json(foreign / CONFIG, use_new_thing=False, new_config=None, new_size=16)
    notes = Adapter.load(foreign).unverified
    assert notes[-1] == f"what new_size=16 in {CONFIG} means: lorakit does not know it"
    assert not any("new_config" in note or "use_new" in note for note in notes)


@pytest.mark.parametrize("name", [CONFIG, RECORD])
def test_a_file_that_is_no_json_is_refused(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b'{"r": 8, \xff')
    assert f"{name}  is not JSON" in refusal(saved)


@pytest.mark.parametrize("content", ["3", "[]", '"LORA"', "null"])
def test_json_that_is_no_object_is_refused(saved: Path, content: str) -> None:
    (saved / CONFIG).write_text(content)
    (saved / RECORD).write_text(content)
    assert RECORD in refusal(saved)
    (saved / RECORD).unlink()
    assert CONFIG in refusal(saved)


def test_a_newer_format_is_refused(saved: Path) -> None:
    edit_json(saved / RECORD, version=3)
    assert "is of format version 3; this lorakit reads 2" in refusal(saved)


def test_any_edit_of_the_record_is_noticed(saved: Path) -> None:
    for key, value in json.loads((saved / RECORD).read_text()).items():
        original = (saved / RECORD).read_text()
        changed = {"other": 1} if isinstance(value, dict) else "other"
        edit_json(saved / RECORD, **{key: changed})
        assert RECORD in refusal(saved)
        (saved / RECORD).write_text(original)


def test_an_unknown_method_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = linear().save(tmp_path / "a")
    # A copy, since what is put back into a dictionary comes last in it.
    known = {name: kind for name, kind in methods.METHODS.items() if name != "lora"}
    monkeypatch.setattr(methods, "METHODS", known)
    assert "there is no method 'lora'" in refusal(folder)


def test_values_outside_a_slices_block_are_noticed(tmp_path: Path) -> None:
    folder = slices().save(tmp_path / "a")
    key = "base_model.model.h.0.attn.c_attn.lora_B.weight"

    def leak(tensors: dict[str, Tensor]) -> None:
        tensors[key][9, 0] = 1e-6  # a row of k, which is not adapted

    edit_tensors(folder / WEIGHTS, leak)
    assert f"{key}  holds values outside the rows and columns of its slices" in refusal(folder)


def test_own_form_needs_its_record(tmp_path: Path) -> None:
    folder = IN_OWN_FORM[0]().save(tmp_path / "a")
    edit_json(folder / CONFIG, method="bitfit")
    assert f"{CONFIG}  has another method than {RECORD}" in refusal(folder)
    (folder / RECORD).unlink()
    assert f"{RECORD}  missing; an adapter in lorakit's own form needs it" in refusal(folder)


class Trap:
    """A pickled object that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(foreign: Path, how: str) -> None:
    (foreign / WEIGHTS).unlink()
    content = {"w": Trap(foreign / "sprung")}
    target = foreign / "adapter_model.bin"
    torch.save(content, target) if how == "torch.save" else target.write_bytes(
        pickle.dumps(content)
    )
    assert "adapter_model.bin cannot be read as tensors alone" in refusal(foreign)
    assert not (foreign / "sprung").exists()


def test_a_harmless_pickle_is_read(foreign: Path) -> None:
    tensors = safetensors.torch.load((foreign / WEIGHTS).read_bytes())
    (foreign / WEIGHTS).unlink()
    torch.save(tensors, foreign / "adapter_model.bin")
    assert Adapter.load(foreign).tensors.keys() == linear().tensors.keys()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": {"b": torch.ones(2)}}, {}])
def test_a_pickle_of_another_shape_is_refused(foreign: Path, content: Any) -> None:
    (foreign / WEIGHTS).unlink()
    torch.save(content, foreign / "adapter_model.bin")
    assert "is not a flat dictionary of names and tensors" in refusal(foreign)


def test_a_record_that_contradicts_itself_is_refused(saved: Path) -> None:
    from lorakit.adapter.record import checksum

    content = json.loads((saved / RECORD).read_text())
    content["sites"][0]["path"] = "elsewhere"
    (saved / RECORD).write_text(json.dumps(content | {"checksum": checksum(content)}))
    assert f"{RECORD} contradicts itself" in refusal(saved)


def test_a_scale_beyond_all_numbers_is_refused(saved: Path) -> None:
    from lorakit.adapter.record import checksum

    content = json.loads((saved / RECORD).read_text())
    content["sites"][0]["scale"] = 1e308
    (saved / RECORD).write_text(json.dumps(content | {"checksum": checksum(content)}))
    assert f"{RECORD} contradicts itself" in refusal(saved)


def test_loading_a_folder_enters_its_reader_three_times(saved: Path) -> None:
    Adapter.load(saved)
    calls = calls_in(lambda: Adapter.load(saved))
    entered = [call.function for call in calls if call.file == "adapter/folder.py"]
    assert entered == ["load_path", "_read_folder", "content_from"]


def test_a_folder_of_many_gives_names_in_the_models_order(tmp_path: Path) -> None:
    many = adapter(*(site(f"layers.{block}.q_proj") for block in range(11)))
    folder = many.save(tmp_path / "a")
    (folder / RECORD).unlink()
    assert Adapter.load(folder).sites == many.sites


def test_the_documentation_names_every_key(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "adapter-format.md").read_text(encoding="utf-8")
    for make in MAKERS:
        folder = make().save(tmp_path / make.__name__)
        record = json.loads((folder / RECORD).read_text())
        keys = {*record, *json.loads((folder / CONFIG).read_text())}
        keys.update(key for each in (*record["sites"], *record["configs"]) for key in each)
        assert [key for key in sorted(keys) if f"`{key}`" not in text] == []
