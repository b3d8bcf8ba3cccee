"""LoRA-FA: A stays as it started, and what a layer reads is not kept for the backward pass."""

import pytest
import torch

import lorakit as lk
from lorakit.attachment.attach import adapter_parameters
from lorakit.kernels.choice import use
from references import randomise
from tiny_models import build, example_inputs

TARGETS = {"llama": ("all-linear",), "gpt2": ("q", "v", "mlp"), "bert": ("q", "v")}


def attached(family, **config):
    model = build(family).double()
    torch.manual_seed(0)
    plan = lk.attach(model, lk.LoRAConfig(targets=TARGETS[family], rank=3, **config))
    randomise(model)
    return model.train(), plan


def gradients(model):
    torch.manual_seed(0)
    model(**example_inputs(model)).logits.square().sum().backward()
    return {name: p.grad for name, p in adapter_parameters(model, "default")}


def kept_inputs(model):
    """The number of saved layer inputs, and the bytes of all saved activations."""
    inputs, kept = [], {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    hooks = [
        layer.register_forward_pre_hook(lambda layer, x: inputs.append(x[0].untyped_storage()))
        for path, layer in model.named_modules()
        if path.endswith(("up_proj", "down_proj"))
    ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(**example_inputs(model)).logits
    for hook in hooks:
        hook.remove()
    logits.sum().backward()
    return len({x.data_ptr() for x in inputs} & kept.keys()), sum(kept.values())


@pytest.mark.parametrize("family", TARGETS)
def test_b_has_the_gradient_it_has_in_lora_and_a_has_none(family):
    expected = gradients(attached(family)[0])
    found = gradients(attached(family, freeze_a=True)[0])
    for name, gradient in found.items():
        if name.endswith("lora_a"):
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_input_of_an_adapted_layer_is_kept(kernels, dropout):
    settings = {"targets": ("up", "down"), "dropout": dropout}
    found = {}
    for freeze_a in (False, True):
        model = build("llama")
        lk.attach(model, lk.LoRAConfig(rank=2, freeze_a=freeze_a, **settings))
        with use(kernels):
            found[freeze_a] = kept_inputs(model.train())
    # With dropout plain torch keeps copies of them.
    assert found[False][0] == 4 or (dropout and kernels == "plain")
    assert found[True][0] == 0
    assert found[True][1] < 0.9 * found[False][1]


def test_the_count_is_that_of_b_also_after_saving(tmp_path):
    model, plan = attached("gpt2", freeze_a=True)
    adapter = lk.extract(model)
    of_b = sum(t.numel() for n, t in adapter.tensors.items() if n.endswith("lora_b"))
    assert plan.parameters == adapter.parameters == of_b
    loaded = lk.Adapter.load(adapter.save(tmp_path / "a"))
    lk.detach(model)
    assert lk.attach(model, loaded, trainable=True).parameters == of_b
    trained = {n for n, p in adapter_parameters(model, "default") if p.requires_grad}
    assert trained == {n for n in adapter.tensors if n.endswith("lora_b")}
