"""Inputs that do not have the rows first: each row as alone, or a RouteError."""

import itertools

import pytest
import torch
import transformers as hf
from torch import nn

import lorakit as lk
from covering import covering, sampled
from lorakit.attachment.attach import adapter_parameters
from lorakit.errors import RouteError
from references import randomise
from tiny_models import STACKS, build, example_inputs

TINY = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def xlnet():
    config = hf.XLNetConfig(vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=16)
    return hf.XLNetForSequenceClassification(config), ("layer_1", "layer_2")


def longformer():
    config = hf.LongformerConfig(
        **TINY, intermediate_size=16, attention_window=4, max_position_embeddings=40
    )
    return hf.LongformerForSequenceClassification(config), ("query", "value")


def led():
    config = hf.LEDConfig(**STACKS, attention_window=4, max_encoder_position_embeddings=64)
    return hf.LEDForConditionalGeneration(config), ("query", "value")


class SequenceFirst(nn.Module):
    """A model that computes with (tokens, rows, d)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.inner = nn.Linear(16, 16)
        self.outer = nn.Linear(16, 16)

    def forward(self, input_ids, **_):
        x = self.embed(input_ids).transpose(0, 1)
        return self.outer(self.inner(x).tanh()).transpose(0, 1)


class Experts(nn.Module):
    """Experts as Linear modules, each given the tokens that chose it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.gate = nn.Linear(16, 2)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        tokens = x.reshape(-1, 16)
        chosen = self.gate(tokens).argmax(-1)
        found = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            own = (chosen == number).nonzero()[:, 0]
            if len(own):
                found = found.index_add(0, own, expert(tokens[own]))
        return found.view_as(x)


class FlatTokens(nn.Module):
    """A model whose inner layer is given all tokens without a dimension of rows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.inner = nn.Linear(16, 16)

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        return self.inner(x.flatten(0, 1)).view_as(x)


class SharedPositions(nn.Module):
    """A model that looks its positions up once for all rows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.positions = nn.Embedding(60, 16)

    def forward(self, input_ids, **_):
        return self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1]))


MAKERS = {
    "xlnet": xlnet,
    "longformer": longformer,
    "led": led,
    "sequence_first": lambda: (SequenceFirst(), ("inner", "outer")),
    "experts": lambda: (Experts(), ("re:experts.*",)),
    "flat_tokens": lambda: (FlatTokens(), ("inner",)),
    "shared_positions": lambda: (SharedPositions(), ("positions",)),
}


def made(maker):
    """A model in eval mode with two random adapters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, targets = maker()
    return with_adapters(model.eval(), targets)


def with_adapters(model, targets, **config):
    for name in ("a", "b"):
        lk.attach(model, lk.LoRAConfig(rank=2, alpha=8, targets=targets, **config), name=name)
        randomise(model, name, seed=ord(name), std=0.5)
    return model


def batch(model, rows, length):
    ids = torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(rows))
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if decodes else {})


def logits(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


def as_alone(model, inputs, choice):
    """Whether a mixed batch answers each row as under its own adapter; None: it is refused."""
    alone = []
    for row, name in enumerate(choice):
        with lk.route(model, name):
            alone.append(logits(model, inputs)[row])
    try:
        with lk.route(model, choice):
            mixed = logits(model, inputs)
    except RouteError:
        return None
    return all(torch.allclose(m, a, atol=1e-4) for m, a in zip(mixed, alone, strict=True))


@pytest.mark.filterwarnings("ignore")
@covering(
    ("maker", "size"),
    itertools.product(MAKERS, [(2, 8), (3, 12), (8, 8), (4, 4), (2, 2)]),
)
def test_rows_that_are_not_first_are_refused(maker, size):
    model = made(MAKERS[maker])
    choice = ["a", "b", None, "a"] * 2
    found = as_alone(model, batch(model, *size), choice[: size[0]])
    # As many tokens as rows in each expert's input are right where each row has one.
    assert found is None, "answered wrongly" if found is False else "answered rightly"


@sampled("family", ["llama", "gpt2", "bert", "t5", "opt", "deberta-v2"], share=2)
@pytest.mark.parametrize("rows", [2, 7])
def test_as_many_tokens_as_rows_are_no_reason_to_refuse(family, rows):
    targets = {"gpt2": ("q", "down"), "bert": ("q", "down"), "opt": ("q", "up", "down")}
    model = with_adapters(build(family), targets.get(family, ("q", "v")))
    inputs = example_inputs(model, rows=rows)
    assert as_alone(model, inputs, (["a", "b", None] * 3)[:rows])


def test_the_probe_that_tells_runs_once_and_leaves_no_trace():
    model = with_adapters(build("llama"), ("q", "v")).train()
    inputs = example_inputs(model, rows=7)
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    state = torch.random.get_rng_state()
    for wanted in (2, 3):
        with lk.route(model, ["a", None] * 3 + ["b"]):
            model(**inputs)
        assert len(calls) == wanted
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_gradients_are_not_mixed_either():
    model = made(xlnet).train()
    for rows, length in ((2, 8), (3, 3)):
        inputs = batch(model, rows, length)
        refused = pytest.raises(RouteError, match="tokens, windows or images")
        with refused, lk.route(model, ["a", "b", "a"][:rows]):
            model(**inputs).logits.sum().backward()
    assert not any(p.grad is not None for _, p in adapter_parameters(model, "a"))


def llava():
    text = hf.LlamaConfig(**TINY, intermediate_size=24, pad_token_id=0)
    vision = hf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = hf.LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=55, vision_feature_layer=-1
    )
    return hf.LlavaForConditionalGeneration(config)


def test_images_are_no_rows():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = llava().eval()
        pixels = torch.randn(2, 3, 8, 8)
    image = [55] * 4
    rows = torch.tensor([[5, *image, 6, *image, 7, 8], list(range(9, 21))])
    inputs = {
        "input_ids": rows,
        "pixel_values": pixels,
        "attention_mask": torch.ones_like(rows),
    }
    with_adapters(model, ("all-linear",))
    refused = pytest.raises(RouteError, match="which are no rows of the batch")
    with refused, lk.route(model, ["a", "b"]):
        pass
    lk.detach(model)
    with_adapters(model, ("re:model.language_model.*q_proj",))
    assert as_alone(model, inputs, ["a", "b"])


def qwen2_vl():
    text = {**TINY, "intermediate_size": 24, "num_key_value_heads": 1, "pad_token_id": 0}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text["rope_parameters"]["rope_theta"] = 10_000.0
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    vision |= {"patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 1}
    words = ("image", "video", "vision_start", "vision_end")
    ids = {f"{word}_token_id": 55 + number for number, word in enumerate(words)}
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    return hf.Qwen2VLForConditionalGeneration(config)


@pytest.mark.thorough
def test_the_patches_of_all_images_are_no_rows():
    """Qwen2-VL reads images of 32 and of 16 patches as one sequence."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = qwen2_vl().eval()
        patches = torch.randn(48, 12)
    first, second = [57, *[55] * 8, 58, 5], [57, *[55] * 4, 58, 6, 7, 8, 9, 10]
    rows = torch.tensor([first, second])
    inputs = {
        "input_ids": rows,
        "attention_mask": torch.ones_like(rows),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 8], [1, 4, 4]]),
        "mm_token_type_ids": (rows == 55).int(),
    }
    with_adapters(model, ("all-linear",))
    assert as_alone(model, inputs, ["a", "b"]) is None
    lk.detach(model)
    with_adapters(model, ("re:model.language_model.*q_proj",))
    assert as_alone(model, inputs, ["a", "b"])


def test_the_windows_of_an_image_follow_its_row():
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.SwinForImageClassification(config).eval()
        inputs = {"pixel_values": torch.randn(3, 3, 16, 16)}
    with_adapters(model, ("q_proj", "v_proj", "o_proj", "fc1"))
    assert as_alone(model, inputs, ["a", None, "b"])


def test_a_compiled_model_is_asked_before_its_code_runs():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SequenceFirst().eval()
    adapters = {}
    with_adapters(model, ("inner",))
    for name in ("a", "b"):
        adapters[name] = lk.extract(model, name)
    lk.detach(model)
    compiled = torch.compile(model, backend="eager")
    bank = lk.AdapterBank(compiled)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    with bank.route(["a", "b"]), pytest.raises(RouteError, match="tokens, windows or images"):
        compiled(**batch(model, 2, 8))
