"""LoRA on experts whose weights are parameters of three dimensions, one matrix for each expert."""

import copy

import pytest
import torch

import lorakit as lk
from covering import sampled
from lorakit.errors import RouteError, TargetError
from mixtures import MIXTURES, mixture
from references import alone, attach_random, base_hash, outputs, randomise

# PEFT asks transformers in words that it is giving up.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # It looks for patterns among modules alone, and uses them for parameters all the same.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]

PER_TOKEN = tuple(family for family in MIXTURES if family != "llama4_text")
"""Families whose experts get all tokens in their order."""
INPUTS = {"input_ids": torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(0))}


def with_deltas(base, adapter, factor=1.0):
    """A copy of a base with factor·scale·B·A in its weights, one expert after the other."""
    plain = copy.deepcopy(base)
    parameters = dict(plain.named_parameters())
    for site in adapter.sites:
        a, b = (adapter.tensors[f"{site.name}.lora_{end}"] for end in "ab")
        if not site.is_of_experts:
            parameters[f"{site.path}.weight"].data += factor * site.scale * (b @ a)
            continue
        for expert, matrix in enumerate(parameters[site.path].data):
            turned = matrix.T if site.kind == "experts-transposed" else matrix
            rows = [
                r for start, stop in site.rows or ((0, len(turned)),) for r in range(start, stop)
            ]
            turned[rows] += factor * site.scale * (b[expert] @ a[expert])
    return plain


@pytest.mark.parametrize("targets", ["experts", "gate_up_proj", "experts.down, o_proj"])
@sampled("family", PER_TOKEN)
def test_experts_compute_with_the_changed_weights(family, targets):
    base = mixture(family)
    model = copy.deepcopy(base)
    words = tuple(targets.split(", "))
    attach_random(model, targets=words, rank=3, alpha=5)
    reference = with_deltas(base, lk.extract(model))
    expected = outputs(reference, INPUTS)
    assert (expected - outputs(base, INPUTS)).abs().max() > 1e-2
    torch.testing.assert_close(outputs(model, INPUTS), expected, rtol=1e-4, atol=1e-5)


@sampled("family", MIXTURES)
def test_a_merge_has_the_same_answers_and_gives_back_every_bit(family):
    model = mixture(family)
    before = base_hash(model)
    attach_random(model, targets=["gate_up_proj", "experts.down"], rank=3)
    expected = outputs(model, INPUTS)
    report = lk.merge(model)
    assert report.warning is None
    torch.testing.assert_close(outputs(model, INPUTS), expected, rtol=1e-4, atol=1e-5)
    lk.unmerge(model)
    lk.detach(model)
    assert base_hash(model) == before


def test_a_fresh_start_answers_as_before_and_trains_a_and_b_of_each_expert():
    base = mixture("qwen3_moe")
    model = copy.deepcopy(base)
    plan = lk.attach(model, lk.LoRAConfig(rank=2, targets="experts"))
    assert torch.equal(outputs(model, INPUTS), outputs(base, INPUTS))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert plan.parameters == sum(p.numel() for p in trained)
    assert {len(p) for p in trained} == {4}
    randomise(model)
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_gradients_are_those_of_the_changed_weights():
    base = mixture("gpt_oss")
    model = copy.deepcopy(base)
    attach_random(model, targets="experts", rank=2)
    adapter = lk.extract(model)
    model.requires_grad_(False)
    trained = [p for n, p in model.named_parameters() if n.endswith(("lora_a", "lora_b"))]
    for parameter in trained:
        parameter.requires_grad_()
    model(**INPUTS).logits.square().mean().backward()
    reference = with_deltas(base, adapter)
    reference(**INPUTS).logits.square().mean().backward()
    parameters = dict(reference.named_parameters())
    expected = []
    for site in adapter.sites:
        a, b = (adapter.tensors[f"{site.name}.lora_{end}"] for end in "ab")
        slope = parameters[site.path].grad.mT
        rows = [
            row for start, stop in site.rows or ((0, slope.shape[1]),) for row in range(start, stop)
        ]
        expected += [site.scale * b.mT @ slope[:, rows], site.scale * slope[:, rows] @ a.mT]
    assert len(trained) == len(expected) == 12
    for found, other in zip(trained, expected, strict=True):
        torch.testing.assert_close(found.grad, other, rtol=1e-3, atol=1e-6)


@sampled("family", PER_TOKEN)
def test_rows_have_adapters_of_their_own(family):
    model = mixture(family)
    attach_random(model, "one", targets=["experts", "o_proj"], rank=3)
    attach_random(model, "two", targets=["gate_up_proj"], rank=2, seed=1)
    names = ["one", None, {"one": 0.5, "two": 2.0}]
    expected = alone(model, INPUTS, names)
    with lk.route(model, names):
        found = outputs(model, INPUTS)
    for row, other in zip(found, expected, strict=True):
        torch.testing.assert_close(row, other, rtol=1e-4, atol=1e-5)


def test_a_combination_sums_the_weights_and_not_the_outputs():
    base = mixture("mixtral")
    model = copy.deepcopy(base)
    attach_random(model, "one", targets="experts", rank=2)
    expected = outputs(with_deltas(base, lk.extract(model), 0.5), INPUTS)
    with lk.route(model, {"one": 0.5}):
        torch.testing.assert_close(outputs(model, INPUTS), expected, rtol=1e-4, atol=1e-5)


def test_rows_cannot_differ_where_tokens_come_by_expert():
    model = mixture("llama4_text")
    attach_random(model, "one", targets=["gate_up_proj"], rank=2)
    with pytest.raises(RouteError, match="given tokens by expert"), lk.route(model, ["one", None]):
        pass


@sampled("family", MIXTURES)
def test_a_saved_adapter_answers_the_same_in_lorakit_and_in_peft(family, tmp_path):
    peft = pytest.importorskip("peft")
    base = mixture(family)
    model = copy.deepcopy(base)
    targets = ["gate_up_proj", "experts.down", "o_proj"]
    attach_random(model, targets=targets, rank=4, alpha=6, rank_pattern={"experts.down": 2})
    expected = outputs(model, INPUTS)
    lk.extract(model).save(tmp_path / "adapter")
    again = copy.deepcopy(base)
    lk.attach(again, tmp_path / "adapter")
    assert torch.equal(outputs(again, INPUTS), expected)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(outputs(theirs, INPUTS), expected, rtol=1e-4, atol=1e-5)


def test_slices_of_a_fused_matrix_are_saved_as_peft_has_them(tmp_path):
    peft = pytest.importorskip("peft")
    base = mixture("gpt_oss")
    model = copy.deepcopy(base)
    attach_random(model, targets=["experts.gate", "experts.up"], rank=2)
    expected = outputs(model, INPUTS)
    lk.extract(model).save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(outputs(theirs, INPUTS), expected, rtol=1e-4, atol=1e-5)
    loaded = lk.Adapter.load(tmp_path / "adapter")
    assert loaded.content_hash() == lk.extract(model).content_hash()


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["experts.down_proj"]])
@sampled("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_an_adapter_that_peft_saved_answers_the_same(family, parameters, tmp_path):
    peft = pytest.importorskip("peft")
    base = mixture(family)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["o_proj"], target_parameters=parameters
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    expected = outputs(theirs, INPUTS)
    theirs.save_pretrained(str(tmp_path / "peft"))
    model = copy.deepcopy(base)
    lk.attach(model, tmp_path / "peft")
    torch.testing.assert_close(outputs(model, INPUTS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "use_dora is for linear layers, embeddings and convolutions"),
        ({"init": "pissa"}, "init pissa is for linear layers alone"),
        ({"dropout": 0.1}, "no input can be dropped"),
    ],
)
def test_forms_that_experts_cannot_have_are_refused(settings, told):
    with pytest.raises(TargetError, match=told):
        lk.plan(mixture("mixtral"), lk.LoRAConfig(targets="experts", **settings))


def test_all_linear_leaves_experts_and_routers_out():
    plan = lk.plan(mixture("mixtral"), lk.LoRAConfig(targets="all-linear"))
    assert {site.path.rpartition(".")[2] for site in plan.sites} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


@sampled("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_words_select_attention_and_experts(family):
    plan = lk.plan(mixture(family), lk.LoRAConfig(targets=["q", "v", "experts"], rank=2))
    per_block = {site.name.split(".", 3)[3] for site in plan.sites}
    assert per_block == {
        "self_attn.q_proj",
        "self_attn.v_proj",
        "mlp.experts.gate_up_proj[experts.gate]",
        "mlp.experts.gate_up_proj[experts.up]",
        "mlp.experts.down_proj",
    }
    assert "experts.down  4 × 32×" in str(plan)
