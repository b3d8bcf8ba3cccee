"""What a model does to its head's answer is found where it is known, and only where it is true."""

import pytest
import torch

from lorakit.kernels.logit_transform import IDENTITY, LogitTransform
from lorakit.models.logits import logit_transform
from shaped_models import SHAPED, with_shaped_logits
from tiny_models import build

CHANGES = {
    "gemma2": LogitTransform(cap=0.1),
    "gemma3_text": LogitTransform(cap=0.3),
    "cohere": LogitTransform(scale=0.3),
    "granite": LogitTransform(scale=1 / 7.0),
}


def found(model):
    return logit_transform(model, model.get_output_embeddings(), rows=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", SHAPED)
def test_what_the_config_says_is_found_in_every_precision(family, dtype):
    assert found(with_shaped_logits(family).to(dtype)) == CHANGES[family]


@pytest.mark.parametrize("cap", [5.0, 30.0, 500.0])
def test_usual_caps_are_told_from_their_neighbours(cap):
    model = with_shaped_logits("gemma2", final_logit_softcapping=cap).bfloat16()
    assert found(model) == LogitTransform(cap=cap)
    wrong = with_shaped_logits("gemma2", final_logit_softcapping=cap).bfloat16()
    lying(wrong, final_logit_softcapping=cap * 1.03)
    assert found(wrong) is None


def lying(model, **says):
    """Let a model's config say something else than what its forward pass does."""
    truth = model.config

    class Says:
        def __getattr__(self, name):
            return getattr(truth, name)

        def get_text_config(self):
            return type("Text", (), says)()

    def forward(*args, **kwargs):
        claimed, model.config = model.config, truth
        try:
            return type(model).forward(model, *args, **kwargs)
        finally:
            model.config = claimed

    model.config = Says()
    model.forward = forward


def test_one_name_means_a_factor_or_a_divisor_as_the_trial_shows():
    model = with_shaped_logits("granite", logits_scaling=4.0)
    lying(model, logits_scaling=0.25)
    assert found(model) == LogitTransform(scale=0.25)


def test_a_factor_and_a_cap_together_are_found():
    model = build("gemma2", final_logit_softcapping=2.0)
    forward = model.forward

    def halved(*args, **kwargs):
        hook = model.lm_head.register_forward_hook(lambda _, args, output: output * 0.5)
        try:
            return forward(*args, **kwargs)
        finally:
            hook.remove()

    model.forward = halved
    model.config.logit_scale = 0.5
    assert found(model) == LogitTransform(scale=0.5, cap=2.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "t5"])
def test_an_answer_that_is_left_as_it_is_needs_no_words(family):
    assert found(build(family)) == IDENTITY


def test_a_field_that_the_model_does_not_use_is_not_believed():
    assert found(build("llama", logit_scale=0.5)) == IDENTITY


def test_a_change_that_the_config_does_not_name_is_not_guessed():
    model = with_shaped_logits("cohere")
    model.logit_scale = 0.31
    assert found(model) is None


def test_a_change_of_another_shape_is_not_believed():
    model = build("llama", final_logit_softcapping=2.0)
    forward = model.forward

    def clamped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.clamp(-2, 2)
        return output

    model.forward = clamped
    assert found(model) is None


def test_a_head_that_is_called_twice_is_not_believed():
    model = build("llama")
    forward = model.forward

    def twice(*args, **kwargs):
        forward(*args, **kwargs)
        return forward(*args, **kwargs)

    model.forward = twice
    assert found(model) is None


def test_the_trial_leaves_modes_and_random_numbers_alone():
    model = build("gpt2", attn_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    assert logit_transform(model, model.lm_head, rows=2) == IDENTITY
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
