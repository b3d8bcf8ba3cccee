"""What lorakit promises of every method, on decoders and encoders; one line adds a method."""

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import lorakit as lk
from covering import covering
from lorakit.attachment.attach import adapter_parameters
from lorakit.config.methods import METHODS as NAMED
from lorakit.config.methods import MethodConfig
from lorakit.errors import MergeError, RouteError, TargetError
from lorakit.training.run import train
from references import base_hash, checkpoint_blocks, outputs, randomise
from tiny_models import build, example_inputs

DECODERS = ("llama", "gpt2", "opt")
FAMILIES = (*DECODERS, "bert", "roberta", "deberta-v2")
SMOLLM2_LIKE: dict[str, Any] = {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Method:
    """One or several methods in one adapter, and what is promised of it."""

    configs: Sequence[MethodConfig]
    parameters: Callable[..., int]
    """Trained values outside of a fresh classifier: the paper's formula, from its config."""
    identity: bool = True
    """Whether a fresh one changes nothing."""
    mergeable: bool = True
    uncached: bool = True
    """Whether it can generate without a cache."""
    rows: bool = True
    """Whether rows of a DeBERTa can choose it: positions are computed once for all rows."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Families that it does not go with, and a part of the error."""


def hidden(c):
    """Width, inner width of the MLP and blocks of a model."""
    width = getattr(c, "n_embd", None) or c.hidden_size
    inner = 4 * width if c.model_type == "gpt2" else getattr(c, "ffn_dim", None)
    return width, inner or c.intermediate_size, getattr(c, "n_layer", None) or c.num_hidden_layers


def kv_width(c):
    """The width of keys and values together over the heads."""
    if c.model_type != "llama":
        return hidden(c)[0]
    return c.hidden_size // c.num_attention_heads * c.num_key_value_heads


def block(c):
    """The values in one block: attention, MLP and two norms."""
    d, f, _ = hidden(c)
    if c.model_type == "llama":
        return 2 * d * d + 2 * d * kv_width(c) + 3 * d * f + 2 * d
    relative = 2 * (d * d + d) if c.model_type == "deberta-v2" else 0
    return 4 * (d * d + d) + 2 * d * f + f + d + 4 * d + relative


def everything(c):
    """All values but those of a fresh classifier; a tied embedding counts once."""
    d, _, layers = hidden(c)
    around = {
        "llama": lambda: c.vocab_size * d + d,
        "gpt2": lambda: (c.vocab_size + c.n_positions) * d + 2 * d,
        "opt": lambda: (
            c.vocab_size * c.word_embed_proj_dim
            + (c.max_position_embeddings + 2) * d
            + 2 * d * c.word_embed_proj_dim
            + 2 * d
        ),
        "bert": lambda: tokens(c) + 2 * d + d * d + d,
        "roberta": lambda: tokens(c) + 2 * d,
        "deberta-v2": lambda: tokens(c) + 2 * d + 2 * c.max_relative_positions * d,
    }
    return layers * block(c) + around[c.model_type]()


def tokens(c):
    """The values in an encoder's embeddings."""
    return (c.vocab_size + c.max_position_embeddings + c.type_vocab_size) * c.hidden_size


def biases(c):
    """All biases but those of a fresh classifier: of products and of LayerNorms."""
    d, f, layers = hidden(c)
    relative = 2 * d if c.model_type == "deberta-v2" else 0
    pooler = d if c.model_type == "bert" else 0
    return layers * (4 * d + f + d + 2 * d + relative) + d + pooler


def added_biases(c):
    """The number of biases, and one more for each linear layer of Llama's blocks."""
    d, f, layers = hidden(c)
    return layers * (3 * d + 2 * kv_width(c) + 2 * f) if c.model_type == "llama" else biases(c)


def low_rank(c, rank=2):
    """2·L·d·r for q and v; Llama's v has fewer rows."""
    d, _, layers = hidden(c)
    return layers * rank * (2 * d + d + kv_width(c))


def with_lengths(c):
    """What LoRA trains, and DoRA's magnitude of each row of q and v."""
    d, _, layers = hidden(c)
    return low_rank(c) + layers * (d + kv_width(c))


def classifier(c):
    """The values in a fresh classifier, with the layers made for it."""
    if c.model_type in DECODERS:
        return 0
    d, own = c.hidden_size, c.hidden_size * c.num_labels + c.num_labels
    return own if c.model_type == "bert" else own + d * d + d


def tokens_of(c, count):
    """d·(l_p + l_i); OPT's embedding can be narrower than its blocks."""
    return getattr(c, "word_embed_proj_dim", hidden(c)[0]) * count


def tokens_of_every_layer(c, count):
    """L·d·(l_p + l_i): the embedding, and every block but the last."""
    d, _, layers = hidden(c)
    return tokens_of(c, count) + (layers - 1) * d * count


def bottlenecks(c, size, *, each=1, left_out=0, norms=0):
    """L·(2·d·r + r + d) + 2·L_LN·d."""
    d, _, layers = hidden(c)
    return (layers - left_out) * (each * (2 * d * size + size + d) + norms * 2 * d)


NO_BIAS = {"llama": "bitfit.add_missing"}
LORA = lk.LoRAConfig(rank=2)
METHODS: dict[str, Method] = {
    "lora": Method([LORA], low_rank),
    "full": Method([lk.FullConfig()], everything, rows=False),
    "top-k": Method([lk.FullConfig(only_top=True, top=1)], block, rows=False),
    "bitfit": Method([lk.BitFitConfig()], biases, rows=False, refused=NO_BIAS),
    "bitfit-added": Method(
        [lk.BitFitConfig(add_missing=True)], added_biases, rows=False, mergeable=False
    ),
    "lora+bitfit": Method(
        [LORA, lk.BitFitConfig()], lambda c: low_rank(c) + biases(c), rows=False, refused=NO_BIAS
    ),
    "dora": Method([lk.LoRAConfig(rank=2, use_dora=True)], with_lengths),
    "orthogonal": Method([lk.LoRAConfig(rank=2, init="orthogonal")], low_rank),
    "prefix-embedding": Method(
        [lk.PrefixConfig(prefix=3, infix=0)],
        lambda c: tokens_of(c, 3),
        identity=False,
        mergeable=False,
    ),
    "prefix-layer": Method(
        [lk.PrefixConfig(prefix=2, infix=1, every_layer=True)],
        lambda c: tokens_of_every_layer(c, 3),
        identity=False,
        mergeable=False,
        uncached=False,
    ),
    "lora+prefix-embedding": Method(
        [LORA, lk.PrefixConfig(prefix=1, infix=2, init="random")],
        lambda c: low_rank(c) + tokens_of(c, 3),
        identity=False,
        mergeable=False,
        uncached=False,
    ),
    "lora+prefix-layer": Method(
        [LORA, lk.PrefixConfig(prefix=2, infix=0, every_layer=True)],
        lambda c: low_rank(c) + tokens_of_every_layer(c, 2),
        identity=False,
        mergeable=False,
    ),
    "adapter-h": Method(
        [lk.BottleneckConfig(variant="h", size=4)],
        lambda c: bottlenecks(c, 4, each=2),
        mergeable=False,
    ),
    "adapter-l": Method(
        [lk.BottleneckConfig(variant="l", size=4)],
        lambda c: bottlenecks(c, 4, norms=1),
        mergeable=False,
    ),
    "adapter-p": Method(
        [lk.BottleneckConfig(variant="p", size=4)], lambda c: bottlenecks(c, 4), mergeable=False
    ),
    "adapter-d": Method(
        [lk.BottleneckConfig(variant="d", size=4, dropped=1)],
        lambda c: bottlenecks(c, 4, left_out=1),
        mergeable=False,
    ),
    "lora+adapter-h": Method(
        [lk.LoRAConfig(rank=2, targets=("o",)), lk.BottleneckConfig(variant="h", size=4)],
        lambda c: hidden(c)[2] * 2 * 2 * hidden(c)[0] + bottlenecks(c, 4, each=2),
        mergeable=False,
    ),
}
"""Every method: its settings, its formula, and where it promises less."""

PAIRS = [(name, family) for name in METHODS for family in FAMILIES]
FITTING = [(name, family) for name, family in PAIRS if family not in METHODS[name].refused]


def fresh(family):
    return build(family, **(SMOLLM2_LIKE if family == "llama" else {}))


def attach_random(model, method, name="default", *, seed=0):
    lk.attach(model, method.configs, name=name)
    randomise(model, name, seed=seed)


def is_mergeable(method, family):
    # Where all layers have biases, nothing is added.
    added = [c for c in method.configs if isinstance(c, lk.BitFitConfig) and c.add_missing]
    return method.mergeable or (bool(added) and family != "llama")


@pytest.fixture
def method(request):
    return METHODS[request.param]


@pytest.fixture
def model(request):
    return fresh(request.param)


def branches(name, family):
    """What a test can depend on, beside the names of the method and of the family."""
    method = METHODS[name]
    rows = method.rows if family == "deberta-v2" else None
    return method.identity, is_mergeable(method, family), method.uncached, rows


fitting = covering(("method", "model"), FITTING, also=branches, indirect=True)
decoders = covering(
    ("method", "model"),
    [pair for pair in FITTING if pair[1] in DECODERS],
    also=branches,
    indirect=True,
)


@pytest.mark.parametrize(("name", "family"), [pair for pair in PAIRS if pair not in FITTING])
def test_a_model_that_lacks_what_the_method_needs_is_told(name, family):
    model = fresh(family)
    with pytest.raises(TargetError, match=METHODS[name].refused[family]):
        lk.attach(model, METHODS[name].configs)
    assert not hasattr(model, "_lorakit")


@fitting
def test_a_fresh_adapter_changes_nothing(method, model):
    if not method.identity:
        return
    inputs = example_inputs(model)
    before = outputs(model, inputs)
    lk.attach(model, method.configs)
    assert torch.equal(outputs(model, inputs), before)


@fitting
def test_the_number_of_trained_values_is_the_formulas(method, model):
    plan = lk.attach(model, method.configs)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.parameters == trained == lk.extract(model).parameters
    assert trained == method.parameters(model.config) + classifier(model.config)


@fitting
def test_only_the_adapter_trains_and_all_of_it(method, model):
    lk.attach(model, method.configs)
    randomise(model)
    model(**example_inputs(model)).logits.square().sum().backward()
    own = dict(adapter_parameters(model, "default"))
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own.values()}
    assert [name for name, p in own.items() if p.grad is None or not p.grad.any()] == []


@fitting
def test_save_and_load_gives_the_same_outputs_bit_for_bit(method, model, tmp_path):
    inputs = example_inputs(model)
    attach_random(model, method)
    adapted = outputs(model, inputs)
    lk.extract(model).save(tmp_path / "saved")
    lk.detach(model)
    plan = lk.attach(model, lk.Adapter.load(tmp_path / "saved"))
    assert torch.equal(outputs(model, inputs), adapted)
    assert plan.parameters == lk.extract(model).parameters


@fitting
def test_merged_equals_unmerged_or_is_refused(method, model):
    inputs = example_inputs(model)
    base = base_hash(model)
    attach_random(model, method)
    unmerged = outputs(model, inputs)
    if not is_mergeable(method, model.config.model_type):
        with pytest.raises(MergeError, match="cannot be merged"):
            lk.merge(model)
        return
    lk.merge(model)
    torch.testing.assert_close(outputs(model, inputs), unmerged, rtol=1e-4, atol=1e-4)
    lk.unmerge(model)
    assert base_hash(model) == base
    assert torch.equal(outputs(model, inputs), unmerged)


@fitting
def test_detach_gives_the_base_back_bit_for_bit(method, model):
    inputs = example_inputs(model)
    names, hashed, before = list(model.state_dict()), base_hash(model), outputs(model, inputs)
    shown = [(type(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    attach_random(model, method)
    outputs(model, inputs)
    lk.detach(model)
    assert list(model.state_dict()) == names
    assert base_hash(model) == hashed
    now = [(type(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    assert now == shown
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert torch.equal(outputs(model, inputs), before)


@fitting
def test_rows_are_independent_and_choose(method, model):
    inputs = example_inputs(model)
    base = outputs(model, inputs)
    attach_random(model, method)
    adapted = outputs(model, inputs)
    alone = outputs(model, {name: x[:1] for name, x in inputs.items()})
    torch.testing.assert_close(adapted[:1], alone, rtol=1e-4, atol=1e-4)
    if model.config.model_type == "deberta-v2" and not method.rows:
        with pytest.raises(RouteError, match="input all rows share"):
            lk.route(model, ["default", None]).__enter__()
        return
    with lk.route(model, ["default", None]):
        mixed = outputs(model, inputs)
    torch.testing.assert_close(mixed[0], adapted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], base[1], rtol=1e-4, atol=1e-4)


@fitting
def test_adapters_live_side_by_side_and_in_copies(method, model):
    inputs = example_inputs(model)
    base = outputs(model, inputs)
    attach_random(model, method, "first")
    first = outputs(model, inputs)
    attach_random(model, method, "second", seed=1)
    second = outputs(model, inputs)
    assert not torch.equal(first, second)
    twin = copy.deepcopy(model)
    for name, expected in {"first": first, None: base, "second": second}.items():
        lk.switch(twin, name)
        assert torch.equal(outputs(twin, inputs), expected)
    randomise(twin, "second", seed=2)
    assert torch.equal(outputs(model, inputs), second)


def gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(0)
    model(**inputs).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@fitting
def test_gradients_are_the_same_under_gradient_checkpointing(method, model):
    attach_random(model, method)
    inputs = example_inputs(model)
    model.train()
    expected = gradients(model, inputs)
    for reentrant in (False, True):
        settings = {"use_reentrant": reentrant}
        checkpoint_blocks(model, settings)
        model.disable_input_require_grads()
        found = gradients(model, inputs)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3)


@decoders
def test_generation_with_a_cache_is_that_without(method, model):
    attach_random(model, method)
    inputs = example_inputs(model)
    inputs["attention_mask"][0, :2] = 0
    if not method.uncached:
        with pytest.raises(RouteError, match="use_cache"):
            model.generate(**inputs, do_sample=False, max_new_tokens=4, use_cache=False)
        return
    tokens = [
        model.generate(**inputs, do_sample=False, max_new_tokens=4, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*tokens)


def settings_of(configs):
    """The settings of a run that trains these methods."""
    sections = {"lora": "lora", "full": "full", "top-k": "full", "bitfit": "bitfit"}
    values = {"method": [config.method for config in configs]}
    for config in configs:
        family = "prefix" if config.method.startswith("prefix-") else "bottleneck"
        implied = set(NAMED[config.method][1])
        values[sections.get(config.method, family)] = config.model_dump(exclude=implied)
    return values


# tests/golden has some of them in `make test`, training/test_lora_forms.py another.
@pytest.mark.thorough
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_in_the_same_bytes(
    name, tiny_llama, prompt_rows, tiny_bert, label_rows, tmp_path
):
    method = METHODS[name]
    decodes = "llama" not in method.refused
    config = lk.TrainConfig(
        model=str(tiny_llama if decodes else tiny_bert),
        data=lk.DataConfig(train=str(prompt_rows if decodes else label_rows)),
        out=tmp_path / "run",
        dtype="float32",
        steps=4,
        save_every=2,
        warmup_steps=1,
        **settings_of(method.configs),
    )
    train(config)
    whole = lk.Adapter.load(config.out)
    shutil.rmtree(config.out / "checkpoints" / "checkpoint-4")
    halfway = lk.Adapter.load(config.out / "checkpoints" / "checkpoint-2")
    assert halfway.content_hash() != whole.content_hash()
    train(config.model_copy(update={"resume": True}))
    assert lk.Adapter.load(config.out).content_hash() == whole.content_hash()
