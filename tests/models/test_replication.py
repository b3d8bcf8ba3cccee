"""Bases that run blocks several times, with an adapter of its own for each time."""

import json

import peft
import pytest
import torch

import lorakit as lk
from lorakit.attachment.state import identity_of
from lorakit.cli.merge import run
from lorakit.config.verbs import MergeConfig
from lorakit.errors import AdapterFileError, ConfigError, ModelError, TargetError
from lorakit.models.quantized import Quantization, quantize
from lorakit.models.replication import replication_of
from lorakit.serving.fleet.version import vllm_obstacles
from references import alone, attach_random, outputs, randomise
from tiny_models import build, example_inputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ORDER = "0-1,0-1,1"
RANGES = [[0, 2], [0, 2], [1, 2]]
FAMILIES = ("llama", "gpt2", "bert", "gemma2", "falcon")


def repeated(family="llama", order=ORDER):
    model = build(family)
    lk.replicate_layers(model, order)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_in_the_order_that_is_asked(family):
    model, plain = repeated(family), build(family)
    inputs = example_inputs(plain, rows=2)
    # By hand: the plain base's own list, with the same blocks several times.
    (path, blocks), *others = [
        (p, m)
        for p, m in plain.named_modules()
        if isinstance(m, torch.nn.ModuleList) and len(m) == plain.config.num_hidden_layers
    ]
    assert not others
    plain.set_submodule(path, torch.nn.ModuleList(blocks[n] for n in (0, 1, 0, 1, 1)))
    plain.config.num_hidden_layers = 5
    if hasattr(plain.config, "layer_types"):
        plain.config.layer_types = [plain.config.layer_types[n] for n in (0, 1, 0, 1, 1)]
    how = {"use_cache": False} if family != "bert" else {}
    assert torch.equal(outputs(model, inputs | how), outputs(plain, inputs | how))
    # They share their weights.
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in build(family).parameters()
    )


@pytest.mark.parametrize(
    "family",
    ["gemma2", *(pytest.param(each, marks=pytest.mark.thorough) for each in ("llama", "gpt2"))],
)
def test_a_cache_has_an_entry_for_each(family):
    model = repeated(family)
    attach_random(model, targets="all-linear", rank=2)
    ids = example_inputs(model, rows=2)["input_ids"]
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, use_cache=False, **how), with_cache)


def test_the_base_is_told_by_what_it_was():
    model, plain = repeated(), build("llama")
    mine, wanted = identity_of(model), identity_of(plain)
    assert mine is not None
    assert wanted is not None
    assert mine.difference(wanted) is None
    other = build("llama", seed=1)
    identity = identity_of(other)
    assert identity is not None
    assert mine.difference(identity)


def test_each_time_has_its_own_adapter_which_trains_and_leaves():
    model = repeated()
    plan = lk.attach(model, lk.LoRAConfig(targets=["q", "down"], rank=2))
    assert len(plan.sites) == 10
    (config,) = plan.configs
    assert isinstance(config, lk.LoRAConfig)
    assert config.layer_replication == ORDER
    inputs = example_inputs(model, rows=2)
    before = outputs(model, inputs)
    randomise(model)
    model.train()
    model(**inputs).logits.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 20
    assert all(bool(each.any()) for each in gradients)
    lk.detach(model)
    assert torch.equal(outputs(model.eval(), inputs), before)


def test_rows_choose_and_merged_weights_come_apart_until_unmerged():
    model = repeated()
    for name in ("a", "b"):
        attach_random(model, name, seed=ord(name), targets="all-linear", rank=2)
    inputs, names = example_inputs(model, rows=3), ["a", None, "b"]
    with lk.route(model, names):
        mixed = outputs(model, inputs)
    for mine, wanted in zip(mixed, alone(model, inputs, names), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5)
    lk.switch(model, "a")
    layers = model.model.layers
    lk.merge(model)
    assert layers[0].mlp.up_proj.weight is not layers[2].mlp.up_proj.weight
    torch.testing.assert_close(outputs(model, inputs)[0], mixed[0], rtol=0, atol=1e-5)
    lk.unmerge(model)
    assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    with lk.route(model, names):
        assert torch.equal(outputs(model, inputs), mixed)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_files_both_ways_with_peft(family, tmp_path):
    targets = {"llama": ["q_proj", "down_proj"], "bert": ["query"]}[family]
    model = repeated(family)
    inputs = example_inputs(model, rows=2)
    attach_random(model, targets=targets, rank=2)
    lk.extract(model).save(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["layer_replication"] == RANGES
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(theirs, inputs), outputs(model, inputs), rtol=0, atol=1e-5)
    config = peft.LoraConfig(
        r=2, target_modules=targets, layer_replication=RANGES, init_lora_weights=False
    )
    theirs = peft.get_peft_model(build(family), config).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    adapter = lk.Adapter.load(tmp_path / "theirs")
    assert adapter.lora is not None
    assert adapter.lora.layer_replication == "0-1,0-1,1-1"
    again = repeated(family)
    lk.attach(again, adapter)
    torch.testing.assert_close(outputs(again, inputs), outputs(theirs, inputs), rtol=0, atol=1e-5)


def test_a_base_that_runs_other_blocks_is_told():
    model = repeated()
    attach_random(model, rank=2)
    adapter = lk.extract(model)
    for other in (build("llama"), repeated(order="0-1,1,0-1")):
        with pytest.raises(AdapterFileError, match=r"layer_replication of the adapter is 0-1,0-1"):
            lk.attach(other, adapter)
    with pytest.raises(AdapterFileError, match=r"lk\.replicate_layers\(model, '0-1,0-1,1'\)"):
        lk.attach(build("llama"), adapter)
    plain = build("llama")
    attach_random(plain, rank=2)
    with pytest.raises(AdapterFileError, match="None, and the base runs 0-1,0-1,1: load it with"):
        lk.attach(repeated(), lk.extract(plain))
    with pytest.raises(TargetError, match="and the base runs each block once: load it by"):
        lk.attach(build("llama"), lk.LoRAConfig(layer_replication=ORDER))
    with pytest.raises(TargetError, match="which only an adapter of lora can say"):
        lk.attach(repeated(), lk.BitFitConfig())


@pytest.mark.parametrize(
    ("family", "order", "told"),
    [
        ("llama", "0-2", "names block 2, and there are 2, counted from 0"),
        ("llama", "1-0", "a range that ends before it starts"),
        ("t5", "0-1,0", "has two"),
    ],
)
def test_what_cannot_be_repeated_is_told(family, order, told):
    with pytest.raises(ModelError, match=told):
        lk.replicate_layers(build(family), order)


def test_blocks_are_repeated_once_and_before_adapters():
    model = repeated()
    with pytest.raises(ModelError, match="they are already, as 0-1,0-1,1"):
        lk.replicate_layers(model, ORDER)
    model = build("llama")
    attach_random(model)
    with pytest.raises(ModelError, match="adapters are attached"):
        lk.replicate_layers(model, ORDER)
    with pytest.raises(ConfigError, match="is not a list of blocks"):
        lk.LoRAConfig(layer_replication="twice")


@pytest.mark.thorough
def test_a_quantised_base_repeats_its_blocks_too():
    model = build("llama")
    quantize(model, Quantization.of("4bit", "float32"))
    lk.replicate_layers(model, ORDER)
    layers = model.model.layers
    assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    attach_random(model, targets="all-linear", rank=2)
    inputs = example_inputs(model, rows=2)
    assert torch.isfinite(outputs(model, inputs)).all()


@pytest.mark.thorough
def test_trained_merged_and_saved_it_is_a_plain_model(tiny_llama, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": "red big", "completion": word} for word in ("cat", "dog")]
    rows.write_text("\n".join(map(json.dumps, lines)))
    result = lk.train(
        lk.TrainConfig(
            model=str(tiny_llama),
            out=tmp_path / "out",
            data=lk.DataConfig(train=str(rows)),
            lora=lk.LoRAConfig(layer_replication=ORDER, targets="all-linear", rank=2),
            steps=2,
            batch_size=2,
        )
    )
    model, tokenizer = lk.Adapter.load(result.out).load_base()
    assert replication_of(model) == ORDER
    lk.attach(model, result.out)
    answer = lk.generate("red", model=model, tokenizer=tokenizer, max_new_tokens=4)
    assert lk.generate("red", adapter=result.out, max_new_tokens=4) == answer
    ids = tokenizer("red big", return_tensors="pt")
    wanted = outputs(model, ids)
    run(MergeConfig(adapter=str(result.out), out=str(tmp_path / "plain")))
    again, _ = lk.load_model(tmp_path / "plain")
    assert len(again.model.layers) == 5
    assert replication_of(again) is None
    torch.testing.assert_close(outputs(again, ids), wanted, rtol=0, atol=1e-5)


@pytest.mark.thorough
def test_what_has_one_base_for_all_does_not_take_such_adapters():
    adapters = []
    for model in (repeated(), build("llama")):
        attach_random(model, rank=2)
        adapters.append(lk.extract(model))
    with pytest.raises(lk.LorakitError, match="for bases that run other blocks"):
        lk.analysis.combine(adapters, [0.5, 0.5])
    assert any("repeats blocks (0-1,0-1,1)" in why for why in vllm_obstacles(adapters[0]))
    bank = lk.AdapterBank(build("llama"))
    with pytest.raises(AdapterFileError, match="layer_replication of the adapter is 0-1,0-1,1"):
        bank.add("a", adapters[0])
