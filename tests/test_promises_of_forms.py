"""What lorakit promises of the forms and models beside the usual ones; one line adds one."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from covering import sampled
from lorakit.attachment.attach import adapter_parameters
from lorakit.config.methods import MethodConfig
from lorakit.errors import MergeError, RouteError
from lorakit.models.loftq import LoftQ
from mixtures import mixture
from references import base_hash, outputs, randomise
from tiny_models import bart, build, example_inputs
from token_experts import inputs as token_inputs
from token_experts import made as token_experts

# Torch's own encoder layer says so of odd heads.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")

TOKENS = [5, 3, 17]


@dataclass(frozen=True)
class Form:
    """A form of LoRA, or a kind of model, and what is promised of it."""

    base: Callable[[], Any]
    configs: Sequence[MethodConfig]
    inputs: Callable[[Any], dict[str, Tensor]] = field(default=lambda model: example_inputs(model))
    identity: bool = True
    """Whether a fresh one changes nothing; PiSSA's by rounding alone."""
    close: bool = False
    """Whether that is so but for rounding."""
    unmergeable: str | None = None
    """Why it cannot be merged: a part of the error."""
    rows: str | None = None
    """Why rows cannot differ: a part of the RouteError."""
    fewer: bool = False
    """Whether a forward pass need not reach all: tokens choose their experts."""
    adapter: Callable[[], lk.Adapter] | None = None
    """What is attached in place of a fresh one, where that is to come with its own base."""

    def attach(self, model: Any, name: str = "default") -> lk.Plan:
        """Attach it, to be trained."""
        if self.adapter is None:
            return lk.attach(model, self.configs, name=name)
        return lk.attach(model, self.adapter(), name=name, trainable=True)


class Attention(nn.Module):
    """nn.MultiheadAttention between layers, as in SigLIP's head, with rows first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.score = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        return SimpleNamespace(logits=self.score(self.attn(x, x, x, need_weights=False)[0]))


class Convolutions(nn.Module):
    """A convolution of groups behind a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.first = nn.Conv1d(8, 12, 3, padding=1)
        self.grouped = nn.Conv1d(12, 8, 3, padding=2, dilation=2, groups=4)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.first(self.embed(input_ids).mT).tanh()
        return SimpleNamespace(logits=self.grouped(x).mT)


def seeded(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def repeated() -> Any:
    model = build("llama")
    lk.replicate_layers(model, "0-1,0-1")
    return model


def of_loftq() -> lk.Adapter:
    """A fresh adapter for a base that LoftQ changes."""
    model = build("llama", hidden_size=64, intermediate_size=128)
    lk.attach(model, lora(targets=("q", "down")))
    return replace(lk.extract(model), loftq=LoftQ(bits=4, iterations=1))


def loftq_base() -> Any:
    model = build("llama", hidden_size=64, intermediate_size=128)
    of_loftq().prepare_base(model)
    return model


def ids(model: Any) -> dict[str, Tensor]:
    """Two rows of ids, some of them those of `TOKENS`."""
    drawn = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    drawn[:, ::2] = torch.tensor(TOKENS)
    return {"input_ids": drawn}


def both_stacks(model: Any) -> dict[str, Tensor]:
    return {**ids(model), "decoder_input_ids": ids(model)["input_ids"].flip(1)}


def lora(**settings: Any) -> list[MethodConfig]:
    return [lk.LoRAConfig(**{"rank": 2, "alpha": 6, **settings})]


def tied() -> Any:
    return build("llama", tie_word_embeddings=True)


def tokens_of(head: str, family: str = "bert") -> Callable[[], Any]:
    return lambda: build(family, head=head)


BY_ITSELF = "reads by itself, once for all rows"
HEAD = lora(targets=("q", "v"), modules_to_save=("classifier",))
FORMS: Mapping[str, Form] = {
    "experts": Form(lambda: mixture("mixtral"), lora(targets="experts"), ids, fewer=True),
    "experts-gate-and-up": Form(
        lambda: mixture("gpt_oss"), lora(targets=("experts.gate", "experts.up")), ids, fewer=True
    ),
    "experts-by-tokens": Form(
        lambda: token_experts("switch", torch.float32),
        lora(targets="experts"),
        lambda model: token_inputs(2),
        fewer=True,
    ),
    "routers": Form(lambda: mixture("qwen3_moe"), lora(targets="mlp.gate"), ids),
    "experts-in-order": Form(
        lambda: mixture("llama4_text"),
        lora(targets="experts"),
        ids,
        rows="given tokens by expert",
        fewer=True,
    ),
    "multihead": Form(lambda: seeded(Attention), lora(targets="attn"), ids, rows=BY_ITSELF),
    "token-rows": Form(tied, lora(targets=(), trainable_token_indices=TOKENS), ids),
    "lora-bias": Form(lambda: build("gpt2"), lora(targets=("q", "up"), lora_bias=True)),
    "lora-bias-alone": Form(
        lambda: build("llama"),
        lora(targets=("q", "up"), lora_bias=True),
        unmergeable="no bias that could hold",
    ),
    "repeated-blocks": Form(repeated, lora(targets=("q", "v"), layer_replication="0-1,0-1")),
    "dora-of-embeddings": Form(
        lambda: build("llama"), lora(targets=("embed", "q"), use_dora=True), ids
    ),
    "dora-of-convolutions": Form(
        lambda: seeded(Convolutions), lora(targets=("first", "grouped"), use_dora=True), ids
    ),
    "grouped-convolutions": Form(
        lambda: seeded(Convolutions), lora(targets=("first", "grouped")), ids
    ),
    "tied-weights": Form(tied, lora(targets=("q", "embed"), ensure_weight_tying=True)),
    "pissa": Form(lambda: build("llama"), lora(targets=("q", "down"), init="pissa"), close=True),
    "loftq": Form(loftq_base, (), adapter=of_loftq),
    "encoder-decoder": Form(lambda: build("t5"), lora(targets=("q", "v", "up"))),
    "prefix-of-an-encoder": Form(
        bart,
        [lk.PrefixConfig(prefix=2, infix=1)],
        both_stacks,
        identity=False,
        unmergeable="cannot be merged",
    ),
    "prefix-layers-of-an-encoder": Form(
        lambda: build("t5"),
        [lk.PrefixConfig(prefix=2, infix=1, every_layer=True)],
        both_stacks,
        identity=False,
        unmergeable="cannot be merged",
    ),
    "head-of-words": Form(tokens_of("ForTokenClassification"), HEAD),
    "images": Form(lambda: build("vit"), HEAD),
    "sinks": Form(lambda: mixture("gpt_oss"), lora(targets=("q", "o")), ids),
    "soft-caps": Form(lambda: build("gemma2"), lora(targets=("q", "o"))),
}
"""By name; docs/methods.md, docs/models.md and docs/tasks.md say what each is."""

forms = sampled("form", list(FORMS))


@pytest.fixture
def made(form: str) -> tuple[Form, Any, dict[str, Tensor]]:
    chosen = FORMS[form]
    model = chosen.base()
    return chosen, model, chosen.inputs(model)


def attach_random(model: Any, form: Form, name: str = "default", *, seed: int = 0) -> None:
    form.attach(model, name)
    randomise(model, name, seed=seed)


@forms
def test_a_fresh_one_changes_nothing(made):
    form, model, inputs = made
    before = outputs(model, inputs)
    form.attach(model)
    if form.identity:
        limit = 1e-5 if form.close else 0
        torch.testing.assert_close(outputs(model, inputs), before, rtol=0, atol=limit)


@forms
def test_only_the_adapter_trains_and_all_of_it(made):
    form, model, inputs = made
    plan = form.attach(model)
    randomise(model)
    model(**inputs).logits.square().sum().backward()
    own = dict(adapter_parameters(model, "default"))
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    assert plan.parameters == sum(p.numel() for p in trained.values())
    assert trained.keys() <= {id(p) for p in own.values()}
    reached = [p.grad is not None and bool(p.grad.any()) for p in trained.values()]
    assert any(reached) if form.fewer else all(reached)
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


@forms
def test_save_and_load_gives_the_same_outputs_bit_for_bit(made, tmp_path):
    form, model, inputs = made
    attach_random(model, form)
    adapted = outputs(model, inputs)
    lk.extract(model).save(tmp_path / "saved")
    lk.detach(model)
    lk.attach(model, lk.Adapter.load(tmp_path / "saved"))
    assert torch.equal(outputs(model, inputs), adapted)


@forms
def test_merged_equals_unmerged_or_is_refused(made):
    form, model, inputs = made
    base = base_hash(model)
    attach_random(model, form)
    unmerged = outputs(model, inputs)
    if form.unmergeable:
        with pytest.raises(MergeError, match=form.unmergeable):
            lk.merge(model)
        return
    lk.merge(model)
    torch.testing.assert_close(outputs(model, inputs), unmerged, rtol=1e-4, atol=1e-4)
    lk.unmerge(model)
    assert base_hash(model) == base
    assert torch.equal(outputs(model, inputs), unmerged)


@forms
def test_detach_gives_the_base_back_bit_for_bit(made):
    form, model, inputs = made
    names, hashed, before = list(model.state_dict()), base_hash(model), outputs(model, inputs)
    shown = [(type(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    attach_random(model, form)
    assert not torch.equal(outputs(model, inputs), before)
    lk.detach(model)
    assert list(model.state_dict()) == names
    assert base_hash(model) == hashed
    now = [(type(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    assert now == shown
    assert torch.equal(outputs(model, inputs), before)


@forms
def test_rows_choose_or_the_route_says_why_not(made):
    form, model, inputs = made
    base = outputs(model, inputs)
    attach_random(model, form)
    adapted = outputs(model, inputs)
    if form.rows is not None:
        with pytest.raises(RouteError, match=form.rows):
            lk.route(model, ["default", None]).__enter__()
        with lk.route(model, ["default"] * 2):
            torch.testing.assert_close(outputs(model, inputs), adapted, rtol=1e-4, atol=1e-4)
        return
    with lk.route(model, ["default", None]):
        mixed = outputs(model, inputs)
    torch.testing.assert_close(mixed[0], adapted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], base[1], rtol=1e-4, atol=1e-4)


@forms
def test_adapters_live_side_by_side_and_in_copies(made):
    form, model, inputs = made
    base = outputs(model, inputs)
    attach_random(model, form, "first")
    first = outputs(model, inputs)
    attach_random(model, form, "second", seed=1)
    second = outputs(model, inputs)
    assert not torch.equal(first, second)
    twin = copy.deepcopy(model)
    for name, expected in {"first": first, None: base, "second": second}.items():
        lk.switch(twin, name)
        assert torch.equal(outputs(twin, inputs), expected)
    randomise(twin, "second", seed=2)
    assert torch.equal(outputs(model, inputs), second)
