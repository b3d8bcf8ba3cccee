"""lk.SaveAdapter: a Trainer that others wrote saves and resumes the adapter alone."""

from contextlib import nullcontext

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lorakit as lk
from references import attach_random, base_hash

IDS = [[5, 6, 7, 8], [9, 10, 11, 12], [5, 7, 9, 11], [6, 8, 10, 12]]
ROWS = [{"input_ids": ids, "labels": ids} for ids in IDS]


def trainer_of(tiny_llama, out, *, callback=True, routed=False, **config):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    attach_random(model, rank=2, **config)
    how = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True}
    settings = TrainingArguments(
        str(out), per_device_train_batch_size=2, report_to=[], disable_tqdm=True, **how
    )
    with lk.route(model, None) if routed else nullcontext():
        return Trainer(
            model, settings, train_dataset=ROWS, callbacks=[lk.SaveAdapter()] if callback else []
        )


def tensors_of(folder):
    return lk.Adapter.load(folder).tensors


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("routed", [False, True])
def test_a_trainer_saves_the_adapter_in_place_of_the_model(routed, tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path / "out", routed=routed)
    trainer.save_model(str(tmp_path / "saved"))
    assert same(tensors_of(tmp_path / "saved"), lk.extract(trainer.model).tensors)
    loaded = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    assert sum(t.numel() for t in loaded.values()) == lk.Adapter.load(tmp_path / "saved").parameters
    lk.detach(trainer.model)
    trainer.model.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert base_hash(again) == base_hash(trainer.model)


def test_a_trainer_loads_what_it_saved_and_nothing_of_another_adapter(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, tmp_path / "out")
    saved = tmp_path / "saved"
    trainer.save_model(str(saved))
    trained, weights = lk.extract(trainer.model).tensors, base_hash(trainer.model)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    trainer._load_from_checkpoint(str(saved))
    assert same(lk.extract(trainer.model).tensors, trained)
    assert base_hash(trainer.model) == weights
    found = trainer.model.load_state_dict(trainer.model.state_dict())
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    with pytest.raises(RuntimeError, match="Missing key"):
        trainer.model.load_state_dict({"lm_head.weight": trainer.model.lm_head.weight.detach()})
    other = trainer_of(tiny_llama, tmp_path / "other", targets=("q", "k", "v"))
    with pytest.raises(lk.errors.TrainingError) as error:
        other._load_from_checkpoint(str(saved))
    assert "the checkpoint is of another adapter (4 problems):" in str(error.value)
    assert "k_proj" in str(error.value)
    assert "is not in the checkpoint" in str(error.value)


def test_a_model_without_an_adapter_is_refused_at_once(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    settings = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(lk.errors.AttachError, match="attach one first"):
        Trainer(model, settings, callbacks=[lk.SaveAdapter()])


@pytest.mark.thorough
@pytest.mark.parametrize("late", [False, True])
def test_a_resumed_training_gives_the_bytes_of_one_that_went_on(tiny_llama, tmp_path, late):
    whole = trainer_of(tiny_llama, tmp_path / "whole", callback=not late)
    if late:
        whole.add_callback(lk.SaveAdapter())
    whole.train()
    resumed = trainer_of(tiny_llama, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "resumed"))
    assert same(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "whole" / "checkpoint-4"))
    assert not same(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "whole" / "checkpoint-2"))
    assert not list((tmp_path / "whole").glob("**/config.json"))
