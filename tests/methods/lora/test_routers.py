"""LoRA on the routers of Mixtral's kin, which multiply with a weight of their own."""

import copy
import json

import pytest
import torch

import lorakit as lk
from covering import sampled
from lorakit.errors import AdapterFileError, RouteError, TargetError
from lorakit.models.routers import is_own_kind, routers
from mixtures import MIXTURES, mixture
from references import alone, attach_random, base_hash, outputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

OWN = tuple(family for family in MIXTURES if family != "llama4_text")
"""Families whose router is of a kind of its own; Llama 4's is a Linear."""
IDS = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS}


def exact(family):
    """A mixture in float64, which torch's grouped matmul does not know."""
    model = mixture(family).double()
    model.set_experts_implementation("eager")
    return model


def with_deltas(base, adapter, factor=1.0):
    plain = copy.deepcopy(base)
    for site in adapter.sites:
        a, b = (adapter.tensors[f"{site.name}.lora_{end}"].double() for end in "ab")
        weight = plain.get_submodule(site.path).weight
        weight.data += (factor * site.scale * (b @ a)).to(weight.dtype)
    return plain


def words(model):
    # Qwen2-MoE calls another layer gate, by its role.
    return sorted({".".join(path.split(".")[-2:]) for path in routers(model)})


@sampled("family", OWN)
def test_it_computes_with_the_changed_weight_merges_and_leaves_no_trace(family):
    base = exact(family)
    model = copy.deepcopy(base)
    attach_random(model, targets=words(model), rank=3, alpha=5, std=1.0)
    adapter = lk.extract(model)
    assert {site.kind for site in adapter.sites} == {"router"}
    expected = outputs(with_deltas(base, adapter), INPUTS)
    assert (expected - outputs(base, INPUTS)).abs().max() > 1e-2
    torch.testing.assert_close(outputs(model, INPUTS), expected, rtol=0, atol=1e-10)
    assert lk.merge(model).warning is None
    torch.testing.assert_close(outputs(model, INPUTS), expected, rtol=0, atol=1e-10)
    lk.unmerge(model)
    lk.detach(model)
    assert base_hash(model) == base_hash(base)


@sampled("family", OWN)
def test_rows_choose_and_weigh_adapters(family):
    model = exact(family)
    one = [*words(model), "o_proj"]
    attach_random(model, "one", targets=one, rank=2, std=1.0)
    attach_random(model, "two", targets=words(model), rank=3, seed=1, std=1.0)
    attach_random(model, "three", targets="o_proj", seed=2)
    inputs = {"input_ids": IDS.repeat(2, 1)}
    names = ["one", None, "two", {"one": 0.5, "two": 2.0}, "three", "one"]
    expected = torch.stack(alone(model, inputs, names))
    with lk.route(model, names):
        torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=1e-5)
    with lk.route(model, ["one"] * 6):
        torch.testing.assert_close(outputs(model, inputs)[0], expected[0], rtol=0, atol=1e-5)
    summed = with_deltas(exact(family), lk.extract(model, "two"), 0.5)
    with lk.route(model, {"two": 0.5}):
        found = outputs(model, inputs)
    torch.testing.assert_close(found, outputs(summed, inputs), rtol=0, atol=1e-10)
    text = "one row of 6 tokens"
    with lk.route(model, ["one", "two"], lengths=[2, 4]), pytest.raises(RouteError, match=text):
        model(input_ids=IDS[:1])


def test_rows_train_together_as_they_do_alone():
    model = exact("qwen3_moe")
    for seed, name in enumerate(["one", "two"]):
        attach_random(model, name, targets="gate", rank=2, seed=seed)
    rows = {"input_ids": IDS[:2], "labels": IDS[:2]}
    parameters = dict(lk.attachment.attach.adapter_parameters(model, "one"))
    for parameter in parameters.values():
        parameter.requires_grad_()
    with lk.route(model, ["one", "two"]):
        model(**rows).logits[0].square().sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    with lk.route(model, "one"):
        model(input_ids=IDS[:1]).logits.square().sum().backward()
    for name, parameter in parameters.items():
        assert together[name].abs().max() > 0
        torch.testing.assert_close(together[name], parameter.grad, rtol=0, atol=1e-10)


def test_a_fresh_one_learns_and_only_that():
    model = mixture("mixtral")
    before, expected = base_hash(model), outputs(model, INPUTS)
    plan = lk.attach(model, lk.LoRAConfig(targets="gate", rank=2))
    assert torch.equal(outputs(model, INPUTS), expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert plan.parameters == sum(p.numel() for p in trained) == 2 * 2 * (32 + 4)
    optimizer, losses = torch.optim.SGD(trained, lr=1.0), []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    lk.detach(model)
    assert base_hash(model) == before


@sampled("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_what_peft_makes_of_all_linear_is_read_and_written(family, tmp_path):
    peft = pytest.importorskip("peft")
    base = exact(family)
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules="all-linear", init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    expected = outputs(theirs, INPUTS)
    theirs.save_pretrained(str(tmp_path / "peft"))
    assert "gate.weight" in theirs.peft_config["default"].target_parameters
    ours = copy.deepcopy(base)
    lk.attach(ours, tmp_path / "peft")
    torch.testing.assert_close(outputs(ours, INPUTS), expected, rtol=0, atol=1e-10)
    assert sum(site.kind == "router" for site in lk.extract(ours).sites) == len(routers(base))
    # What is saved from the model, and what is copied without one.
    for name, adapter in (
        ("attached", lk.extract(ours)),
        ("copied", lk.Adapter.load(tmp_path / "peft")),
    ):
        folder = adapter.save(tmp_path / name)
        assert lk.Adapter.load(folder).content_hash() == adapter.content_hash()
        back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
        torch.testing.assert_close(outputs(back, INPUTS), expected, rtol=0, atol=1e-10)


def test_a_rank_of_the_routers_own_goes_to_peft_and_comes_back(tmp_path):
    peft = pytest.importorskip("peft")
    base = exact("gpt_oss")
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["router.weight"],
        rank_pattern={r".*\.router\.weight": 4},
        alpha_pattern={r".*\.router\.weight": 3},
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    expected = outputs(theirs, INPUTS)
    theirs.save_pretrained(str(tmp_path / "peft"))
    ours = copy.deepcopy(base)
    lk.attach(ours, tmp_path / "peft")
    assert {site.rank for site in lk.extract(ours).sites if site.kind == "router"} == {4}
    torch.testing.assert_close(outputs(ours, INPUTS), expected, rtol=0, atol=1e-10)
    folder = lk.extract(ours).save(tmp_path / "ours")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["target_parameters"] == [f"model.layers.{n}.mlp.router.weight" for n in (0, 1)]
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    torch.testing.assert_close(outputs(back, INPUTS), expected, rtol=0, atol=1e-10)


def test_a_layer_whose_weight_peft_names_as_a_parameter_is_a_layer(tmp_path):
    peft = pytest.importorskip("peft")
    base = exact("qwen3_moe")
    config = peft.LoraConfig(r=2, target_parameters=["q_proj.weight"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    expected = outputs(theirs, INPUTS)
    theirs.save_pretrained(str(tmp_path / "peft"))
    ours = copy.deepcopy(base)
    lk.attach(ours, tmp_path / "peft")
    assert {site.kind for site in lk.extract(ours).sites} == {"linear"}
    torch.testing.assert_close(outputs(ours, INPUTS), expected, rtol=0, atol=1e-10)
    folder = lk.Adapter.load(tmp_path / "peft").save(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    torch.testing.assert_close(outputs(back, INPUTS), expected, rtol=0, atol=1e-10)


def test_all_linear_leaves_routers_out_and_says_so():
    model = mixture("mixtral")
    plan = lk.plan(model, lk.LoRAConfig(targets="all-linear"))
    assert not any(site.path.endswith("gate") for site in plan.sites)
    told = [line for line in str(plan).splitlines() if "leaves a router out" in line]
    assert told == [
        "all-linear leaves a router out, which its name adapts: model.layers.*.mlp.gate (2 times)"
    ]
    both = lk.plan(model, lk.LoRAConfig(targets=["all-linear", "gate"]))
    assert "leaves" not in str(both)
    assert len(both.sites) == len(plan.sites) + 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"use_dora": True}, "use_dora is for linear layers, embeddings and convolutions"),
        ({"init": "pissa"}, "init pissa is for linear layers alone"),
        ({"init": "eva"}, "init eva is for linear layers alone"),
        ({"lora_bias": True}, "lora_bias is for linear layers and convolutions"),
        ({"dropout": 0.1}, "no input can be dropped"),
    ],
)
def test_forms_that_it_cannot_have_are_refused(settings, text):
    with pytest.raises(TargetError, match=text):
        lk.plan(mixture("mixtral"), lk.LoRAConfig(targets="gate", **settings))


def test_a_file_for_another_number_of_experts_is_refused(tmp_path):
    model = mixture("mixtral")
    attach_random(model, targets="gate", rank=2)
    folder = lk.extract(model).save(tmp_path / "a")
    other = mixture("qwen3_moe")
    router = other.model.layers[0].mlp.gate
    router.weight = torch.nn.Parameter(torch.zeros(5, 32))
    with pytest.raises(AdapterFileError, match=r"gate\.lora_b  shape \(4, 2\) in the adapter"):
        lk.attach(other, folder, allow_other_base=True)


def test_a_copy_of_a_router_is_of_rows_too_and_cannot_be_weighed():
    model = mixture("mixtral")
    for seed, name in enumerate(["one", "two"]):
        config = {"targets": "q", "modules_to_save": ["gate"]}
        attach_random(model, name, seed=seed, **config)
    expected = torch.stack(alone(model, INPUTS, ["one", None, "two"]))
    with lk.route(model, ["one", None, "two"]):
        torch.testing.assert_close(outputs(model, INPUTS), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RouteError, match="can't mix or weaken full copies of a router"):
        lk.route(model, ["one", {"two": 0.5}, None]).__enter__()


def test_a_router_is_told_by_its_class_and_weight():
    model = mixture("gpt_oss")
    assert is_own_kind(model.model.layers[0].mlp.router)
    assert not is_own_kind(model.model.layers[0].mlp.experts)
    assert not is_own_kind(mixture("llama4_text").model.layers[1].feed_forward.router)
