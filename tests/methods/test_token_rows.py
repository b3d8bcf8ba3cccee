"""Rows of single tokens: what is tied to the embedding has them too, and so do PEFT's files."""

import copy
import json

import pytest
import torch

import lorakit as lk
from lorakit.attachment.attach import adapter_parameters
from lorakit.errors import AdapterFileError, AnalysisError, ConfigError, TargetError
from lorakit.training.lm_loss import plain_losses, text_losses
from references import alone, base_hash, outputs, randomise
from tiny_models import build, example_inputs

TOKENS = [5, 3, 17]
# PEFT asks transformers in words that it is giving up.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Model has `tie_word_embeddings"
)


def inputs_of(model):
    """Inputs, half of whose tokens have trained rows."""
    inputs = example_inputs(model, rows=3)
    inputs["input_ids"][:, ::2] = torch.tensor(TOKENS)[:, None]
    return inputs


def attached(model, name="default", *, seed=0, **settings):
    given = {"targets": (), "trainable_token_indices": TOKENS, **settings}
    plan = lk.attach(model, lk.LoRAConfig(**given), name=name)
    randomise(model, name, seed=seed)
    return plan


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_the_rows_are_those_of_the_weight_and_of_what_is_tied_to_it(family, tied):
    base = build(family, tie_word_embeddings=tied)
    model = copy.deepcopy(base)
    attached(model)
    (rows,) = lk.extract(model).tensors.values()
    plain = copy.deepcopy(base)
    plain.get_input_embeddings().weight.data[TOKENS] = rows
    inputs = inputs_of(base)
    expected = outputs(plain, inputs)
    assert (expected - outputs(base, inputs)).abs().max() > 1e-2
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-5)
    lk.merge(model)
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    lk.detach(model)
    assert base_hash(model) == base_hash(base)


def test_a_fresh_one_answers_as_before_and_only_its_rows_learn():
    model = build("llama", tie_word_embeddings=True)
    before, inputs = base_hash(model), inputs_of(model)
    expected = outputs(model, inputs)
    plan = lk.attach(model, lk.LoRAConfig(targets=(), trainable_token_indices=TOKENS))
    assert torch.equal(outputs(model, inputs), expected)
    ((name, rows),) = adapter_parameters(model, "default")
    assert (name, plan.parameters) == ("model.embed_tokens.token_rows", rows.numel())
    assert "rows of model.embed_tokens" in str(plan)
    optimizer, losses = torch.optim.SGD([rows], lr=1.0), []
    for _ in range(4):
        loss, _ = text_losses(model, inputs, inputs["input_ids"], weights=1 / 30)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert [n for n, p in model.named_parameters() if p.grad is not None and p is not rows] == []
    lk.detach(model)
    assert base_hash(model) == before


def test_the_loss_of_target_tokens_alone_has_the_same_gradient():
    model = build("llama", tie_word_embeddings=True)
    lk.attach(model, lk.LoRAConfig(targets=(), trainable_token_indices=TOKENS))
    inputs = inputs_of(model)
    ((_, rows),) = adapter_parameters(model, "default")
    labels, zero = inputs["input_ids"], torch.zeros(1, 1)
    text_losses(model, inputs, labels)[0].backward()
    found, rows.grad = rows.grad, None
    plain_losses(model(**inputs).logits, labels, zero, zero).sum().backward()
    torch.testing.assert_close(found, rows.grad, rtol=1e-4, atol=1e-5)


def test_batch_rows_have_token_rows_of_their_own():
    model = build("llama", tie_word_embeddings=True)
    attached(model, "one", targets=("q",))
    attached(model, "two", seed=1, trainable_token_indices={"embed": [3]})
    inputs, names = inputs_of(model), ["one", None, {"one": 0.5, "two": 2.0}]
    expected = torch.stack(alone(model, inputs, names))
    with lk.route(model, names):
        torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_files_go_to_peft_and_come_from_it(tied, tmp_path):
    peft = pytest.importorskip("peft")
    base = build("llama", tie_word_embeddings=tied)
    inputs = inputs_of(base)
    for indices in (TOKENS, {"embed_tokens": TOKENS, "lm_head": TOKENS}):
        settings = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices)
        theirs = peft.get_peft_model(copy.deepcopy(base), settings).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        theirs.save_pretrained(str(tmp_path / "peft"))
        expected = outputs(theirs, inputs)
        ours = copy.deepcopy(base)
        lk.attach(ours, tmp_path / "peft")
        torch.testing.assert_close(outputs(ours, inputs), expected, rtol=1e-4, atol=1e-5)
        adapter = lk.extract(ours)
        folder = adapter.save(tmp_path / "ours", overwrite=True)
        assert lk.Adapter.load(folder).content_hash() == adapter.content_hash()
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
        torch.testing.assert_close(outputs(again, inputs), expected, rtol=1e-4, atol=1e-5)


def test_other_tokens_are_another_adapter(tmp_path):
    model = build("llama")
    attached(model, targets="q")
    folder = lk.extract(model).save(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": TOKENS}
    config["trainable_token_indices"] = [5, 3, 18]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match="trainable_token_indices are others"):
        lk.Adapter.load(folder)
    (folder / "lorakit.json").unlink()
    other = lk.Adapter.load(folder)
    assert other.content_hash() != lk.extract(model).content_hash()
    with pytest.raises(AnalysisError, match="the trained rows are of other tokens"):
        lk.analysis.combine([lk.extract(model), other])
    config["trainable_token_indices"] = [5, 3]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match=r"rows \(3, 32\) in the file for 2 trainable"):
        lk.Adapter.load(folder)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ({"embd": [1]}, "no module is called 'embd'"),
        ([1000], "model.embed_tokens has 64 rows, and token 1000 is named: resize"),
        ({"layers": [1]}, "model.layers is a ModuleList, which has no row for each token"),
    ],
)
def test_what_has_no_such_rows_is_refused(indices, text):
    with pytest.raises(TargetError, match=text):
        lk.plan(build("llama"), lk.LoRAConfig(trainable_token_indices=indices))


def test_tokens_named_twice_and_modules_changed_twice_are_refused():
    with pytest.raises(ConfigError, match="names some tokens of embed twice, or none"):
        lk.LoRAConfig(trainable_token_indices=[1, 1])
    settings = {"trainable_token_indices": [1]}
    for more in ({"targets": "q,embed"}, {"modules_to_save": "embed_tokens"}):
        with pytest.raises(TargetError, match=r"model.embed_tokens  has trained rows of tokens"):
            lk.plan(build("llama"), lk.LoRAConfig(**settings, **more))
