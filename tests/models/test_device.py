"""The device that a word means, and a base that is moved there."""

import pytest
import torch

from lorakit.errors import ConfigError, ModelError
from lorakit.models import device
from lorakit.models.device import device_for, move
from lorakit.models.load import load_model
from tiny_models import build


def test_a_word_means_a_gpu_where_torch_sees_one(monkeypatch):
    for seen, meant in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(device, "gpu_is_seen", lambda seen=seen: seen)
        assert device_for("auto") == torch.device(meant)
        assert device_for("cpu") == torch.device("cpu")
    assert device_for("cuda") == torch.device("cuda")


def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(device, "gpu_is_seen", lambda: False)
    with pytest.raises(ConfigError, match="sees no GPU here: give auto or cpu, or install"):
        load_model("no/such/model", device="cuda")
    with pytest.raises(ConfigError, match="device 'gpu' is none of auto, cpu, cuda"):
        load_model("no/such/model", device="gpu")


def test_a_base_is_left_on_the_cpu_unless_a_device_is_given(tiny_llama, monkeypatch):
    monkeypatch.setattr(device, "gpu_is_seen", lambda: True)
    for word in (None, "cpu"):
        assert load_model(tiny_llama, device=word)[0].device == torch.device("cpu")
    asked = []
    monkeypatch.setattr("lorakit.models.load.move", lambda model, where: asked.append(where))
    load_model(tiny_llama, device="auto")
    assert asked == [torch.device("cuda")]


def test_a_gpu_without_room_is_an_error_that_says_what_to_do(monkeypatch):
    model = build("llama")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "to", full)
    with pytest.raises(ModelError, match=r"takes 0\.0 GB, and the GPU has no room for it"):
        move(model, torch.device("cuda"))
