"""LoRA on nn.MultiheadAttention, which reads its weights itself."""

import copy
import json

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterFileError, RouteError, TargetError
from references import attach_random, base_hash, randomise

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


class Block(nn.Module):
    """A block as open_clip has it; its input is (length, rows, d)."""

    def __init__(self, **settings):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **settings)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.mlp(self.attn(x, x, x, need_weights=False)[0])


def model_of(*, encoder=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if encoder:
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            model = nn.TransformerEncoder(layer, 2)
        else:
            model = nn.Sequential(Block(), Block(bias=False))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
SETTINGS = {"targets": "attn", "rank": 3, "alpha": 6}


def output(model):
    with torch.no_grad():
        return model(X)


def with_deltas(base, adapter):
    plain = copy.deepcopy(base)
    parameters = dict(plain.named_parameters())
    for site in adapter.sites:
        a, b = (adapter.tensors[f"{site.name}.lora_{end}"] for end in "ab")
        name = site.path if site.kind == "in_proj" else f"{site.path}.weight"
        parameters[name].data += site.scale * (b @ a)
    return plain


@pytest.mark.parametrize("encoder", [False, True])
def test_it_computes_with_the_changed_weights_and_merges(encoder):
    base = model_of(encoder=encoder)
    model = copy.deepcopy(base)
    attach_random(model, **{**SETTINGS, "targets": "self_attn" if encoder else "attn"})
    adapter = lk.extract(model)
    assert {site.kind for site in adapter.sites} == {"in_proj", "out_proj"}
    expected = output(with_deltas(base, adapter))
    assert (expected - output(base)).abs().max() > 1e-2
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.train()(X), expected, rtol=1e-4, atol=1e-5)
    model.eval()
    lk.merge(model)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    lk.unmerge(model)
    lk.detach(model)
    assert base_hash(model) == base_hash(base)


def test_a_fresh_one_answers_as_before_and_only_a_and_b_learn():
    model = model_of()
    before, expected = base_hash(model), output(model)
    plan = lk.attach(model, lk.LoRAConfig(**SETTINGS))
    torch.testing.assert_close(output(model), expected, rtol=0, atol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert plan.parameters == sum(p.numel() for p in trained) == 2 * 3 * (8 + 24 + 8 + 8)
    randomise(model)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    optimizer, losses = torch.optim.SGD(trained, lr=0.01), []
    for _ in range(4):
        loss = (model(X) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    lk.detach(model)
    assert base_hash(model) == before


def test_rows_cannot_differ_and_the_whole_batch_can_choose():
    model = model_of()
    attach_random(model, "one", **SETTINGS)
    expected = output(with_deltas(model_of(), lk.extract(model)))
    lk.attach(model, lk.LoRAConfig(targets="mlp"), name="two")
    with lk.route(model, "one"):
        torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RouteError, match="reads by itself, once for all rows"):
        lk.route(model, ["one", None, "two"]).__enter__()


@pytest.mark.parametrize("targets", [["attn"], ["attn", "mlp"], r"\d\.attn"])
def test_files_go_to_peft_and_come_from_it(targets, tmp_path):
    peft = pytest.importorskip("peft")
    base = model_of()
    config = peft.LoraConfig(target_modules=targets, r=3, lora_alpha=6, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    expected = output(theirs)
    theirs.save_pretrained(str(tmp_path / "peft"))
    ours = copy.deepcopy(base)
    lk.attach(ours, tmp_path / "peft")
    torch.testing.assert_close(output(ours), expected, rtol=1e-4, atol=1e-5)
    adapter = lk.extract(ours)
    folder = adapter.save(tmp_path / "ours")
    assert lk.Adapter.load(folder).content_hash() == adapter.content_hash()
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    torch.testing.assert_close(output(back), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("version", "factor"), [("0.21.2", 2), ("0.22.0", 1), (None, 2)])
def test_the_projection_counts_as_often_as_in_the_peft_of_the_file(version, factor, tmp_path):
    model = model_of()
    attach_random(model, **SETTINGS)
    adapter = lk.extract(model)
    folder = adapter.save(tmp_path / "a")
    (folder / "lorakit.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_version": version}))
    found = lk.Adapter.load(folder)
    for name, tensor in adapter.tensors.items():
        share = factor / 2 if name.endswith("out_proj.lora_b") else 1
        assert torch.equal(found.tensors[name], tensor * share)
    assert ("once" if factor == 1 else "twice") in "".join(found.unverified)


def test_a_part_that_peft_cannot_adapt_alone_is_in_our_own_form(tmp_path):
    base = model_of()
    model = copy.deepcopy(base)
    attach_random(model, **{**SETTINGS, "targets": "in_proj_weight"})
    folder = lk.extract(model).save(tmp_path / "a")
    assert "PEFT adapts in_proj and out_proj together" in (
        (folder / "adapter_config.json").read_text()
    )
    again = copy.deepcopy(base)
    lk.attach(again, folder)
    assert torch.equal(output(again), output(model))
    with pytest.raises(AdapterFileError, match=r"0.attn.in_proj_weight  is"):
        lk.attach(nn.Sequential(nn.Linear(8, 8)), folder)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"use_dora": True}, "use_dora is for linear layers, embeddings and convolutions"),
        ({"dropout": 0.1}, "no input can be dropped"),
        ({"lora_bias": True}, "lora_bias is for linear layers and convolutions"),
    ],
)
def test_forms_that_it_cannot_have_are_refused(settings, text):
    with pytest.raises(TargetError, match=text):
        lk.plan(model_of(), lk.LoRAConfig(targets="attn", **settings))


def test_all_linear_leaves_it_out():
    plan = lk.plan(model_of(), lk.LoRAConfig(targets="all-linear"))
    assert {site.path for site in plan.sites} == {"0.mlp", "1.mlp"}
