"""lk.train and lk.sweep on a loaded model: it is left as it was found, and the adapter is there."""

import pytest
import torch

import lorakit as lk
from lorakit.attachment.state import active_name, adapter_names
from lorakit.errors import ConfigError, ModelError
from references import attach_random, base_hash, outputs

SHORT = {
    "lora": lk.LoRAConfig(rank=2, targets="all-linear"),
    "steps": 4,
    "warmup_steps": 1,
    "check_after": 3,
}


def settings(out, rows, **more):
    data = lk.DataConfig(train=str(rows), train_rows=16)
    return lk.TrainConfig(**{"out": out, "data": data, **SHORT, **more})


@pytest.mark.thorough
def test_a_run_gives_its_adapter_by_name_and_on_a_loaded_model_alike(
    tiny_llama, prompt_rows, tmp_path
):
    by_name = lk.train(
        settings(tmp_path / "a", prompt_rows, model=str(tiny_llama), dtype="float32")
    )
    model, tokenizer = lk.load_model(tiny_llama)
    for out in ("b", "c"):
        config = settings(tmp_path / out, prompt_rows)
        result = lk.train(config, model=model, tokenizer=tokenizer)
        assert result.adapter.content_hash() == by_name.adapter.content_hash()
        assert result.adapter.card == by_name.adapter.card
        assert result.adapter.base.name == str(tiny_llama)
    assert by_name.adapter is by_name.adapter
    assert not hasattr(model, "_lorakit")
    lk.attach(model, result.adapter)


@pytest.mark.parametrize(("capability", "dtype"), [("AVX512", "bfloat16"), ("AVX2", "float32")])
def test_the_precision_suits_the_processor(
    capability, dtype, tiny_llama, prompt_rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    result = lk.train(settings(tmp_path / "a", prompt_rows, model=str(tiny_llama)))
    assert result.adapter.base.dtype == dtype


@pytest.mark.thorough
def test_a_model_with_adapters_is_left_with_them(tiny_llama, prompt_rows, tmp_path):
    model, tokenizer = lk.load_model(tiny_llama)
    base = base_hash(model)
    attach_random(model, "default")
    attach_random(model, "other", seed=1)
    model.train()
    model.model.layers[0].eval()
    lk.switch(model, "default")
    before = outputs(model, {"input_ids": torch.tensor([[4, 5, 6]])})
    result = lk.train(settings(tmp_path / "a", prompt_rows), model=model, tokenizer=tokenizer)
    config = settings(tmp_path / "b", prompt_rows, sweep={"lora.rank": [1, 2]})
    swept = lk.sweep(config, model=model, tokenizer=tokenizer)
    assert [trial.adapter.lora.rank for trial in swept.trials] == [1, 2]
    assert result.adapter.lora.rank == 2
    assert (adapter_names(model), active_name(model)) == (("default", "other"), "default")
    assert (model.training, model.model.layers[0].training) == (True, False)
    assert torch.equal(outputs(model, {"input_ids": torch.tensor([[4, 5, 6]])}), before)
    lk.detach(model)
    assert base_hash(model) == base


def test_a_fresh_head_is_given_back_and_its_trained_copy_is_the_adapters(
    tiny_bert, label_rows, tmp_path
):
    torch.manual_seed(5)
    model, tokenizer = lk.load_model(tiny_bert, task="classification", labels=("no", "yes"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = lk.train(settings(tmp_path / "a", label_rows), model=model, tokenizer=tokenizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert result.adapter.copied_modules == ("classifier",)
    again, _ = result.adapter.load_base()
    lk.attach(again, result.adapter)
    ids = {"input_ids": torch.tensor([[4, 5, 6]])}
    with lk.attached(model, result.adapter):
        assert torch.equal(outputs(again, ids), outputs(model, ids))
    wrong = lk.DataConfig(train=str(label_rows), labels=("yes", "no"))
    with pytest.raises(ConfigError, match="classes yes, no, and the loaded model's are no, yes"):
        lk.train(settings(tmp_path / "b", label_rows, data=wrong), model=model, tokenizer=tokenizer)


def test_what_does_not_go_with_a_loaded_model_is_refused(
    tiny_llama, label_rows, prompt_rows, tmp_path
):
    model, tokenizer = lk.load_model(tiny_llama)
    loaded = {"model": model, "tokenizer": tokenizer}
    config = settings(tmp_path / "a", prompt_rows)
    with pytest.raises(ModelError, match="needs its tokenizer"):
        lk.train(config, model=model)
    with pytest.raises(ConfigError, match="the rows are for classification, and the loaded model"):
        lk.train(settings(tmp_path / "a", label_rows), **loaded)
    with pytest.raises(ConfigError, match="dtype is that of a base which is loaded by name"):
        lk.train(settings(tmp_path / "a", prompt_rows, dtype="float16"), **loaded)
    with pytest.raises(ConfigError, match=r"call lk\.sweep\(config\)"):
        lk.train(settings(tmp_path / "a", prompt_rows, sweep={"seed": [0, 1]}), **loaded)
    with pytest.raises(ConfigError, match="dry_run is for the command line"):
        lk.train(settings(tmp_path / "a", prompt_rows, dry_run=True), **loaded)
    # As transformers marks a base that it loads with a quantization_config.
    model.is_quantized = True
    with pytest.raises(ConfigError, match="was quantised as transformers loaded it"):
        lk.train(config, **loaded)
    assert not (tmp_path / "a").exists()
    assert not hasattr(model, "_lorakit")
