import re
from logging import Handler
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, PreTrainedTokenizerFast
from transformers.utils import logging

import lorakit as lk
from hub_stand_in import stand_in
from lorakit.errors import ModelError
from lorakit.models.load import load_model, model_name, redraw_fresh_head
from lorakit.models.source import explained
from lorakit.models.tasks import TASKS, check_does
from tiny_models import VOCABULARY, build

WORDS = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCABULARY))]


def save_tokenizer(folder, **special):
    words = models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w3")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    build("llama", pad_token_id=None, tie_word_embeddings=True).save_pretrained(folder)
    save_tokenizer(folder, eos_token="</s>")
    return folder


@pytest.fixture
def copy(llama_folder, tmp_path):
    """A copy of the folder that a test may spoil."""
    for file in llama_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def told(*arguments, **settings):
    with pytest.raises(ModelError) as caught:
        load_model(*arguments, **settings)
    return str(caught.value)


# What comes back.


def test_a_folder_gives_its_weights_in_eval_mode(llama_folder):
    model, _ = load_model(llama_folder)
    expected = build("llama", pad_token_id=None, tie_word_embeddings=True).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_asked_precision(llama_folder, dtype):
    torchs = getattr(torch, dtype)
    for asked in (dtype, torchs):
        model, _ = load_model(llama_folder, dtype=asked)
        assert {parameter.dtype for parameter in model.parameters()} == {torchs}


def test_a_tokenizer_without_padding_pads_with_its_end_token(llama_folder):
    _, tokenizer = load_model(llama_folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


def test_a_padding_token_is_kept(copy):
    save_tokenizer(copy, eos_token="</s>", pad_token="<pad>")
    _, tokenizer = load_model(copy)
    assert tokenizer.pad_token == "<pad>"


def test_a_classifier_has_its_labels_in_order(llama_folder):
    model, _ = load_model(llama_folder, task="classification", labels=("no", "maybe", "yes"))
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert model.config.label2id == {"no": 0, "maybe": 1, "yes": 2}
    assert model.score.weight.shape == (3, 32)
    assert model(torch.tensor([[5, 6]]), labels=torch.tensor([2])).loss > 0
    assert not model.training


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "gpt2"])
def test_a_redrawn_head_is_that_of_another_load(family, tmp_path):
    build(family, head="Model").save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="<pad>")
    loaded = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded.append(load_model(tmp_path, task="classification", labels=("a", "b", "c"))[0])
    torch.manual_seed(2)
    redraw_fresh_head(loaded[0])
    expected = loaded[1].state_dict()
    for name, tensor in loaded[0].state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_head_of_the_checkpoint_is_not_redrawn(tmp_path):
    build("bert").save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="<pad>")
    model: Any = load_model(tmp_path, task="classification")[0]
    before = model.classifier.weight.clone()
    redraw_fresh_head(model)
    assert torch.equal(model.classifier.weight, before)


def test_a_regressor_has_one_output(llama_folder):
    model, _ = load_model(llama_folder, task="regression")
    assert model.config.problem_type == "regression"
    output = model(torch.tensor([[5, 6]]), labels=torch.tensor([0.5]))
    assert output.logits.shape == (1, 1)
    error = (output.logits[0, 0] - 0.5) ** 2
    assert torch.allclose(output.loss, error)


def test_a_classifying_decoder_does_not_read_the_padding(llama_folder):
    model, tokenizer = load_model(llama_folder, task="classification", labels=("no", "yes"))
    tokenizer.padding_side = "right"
    batch = tokenizer(["w5 w6 w7 w8", "w9 w10"], padding=True, return_tensors="pt")
    single = tokenizer("w9 w10", return_tensors="pt")
    together = model(batch.input_ids, attention_mask=batch.attention_mask).logits[1]
    alone = model(single.input_ids, attention_mask=single.attention_mask).logits[0]
    assert torch.allclose(together, alone, atol=1e-6)


def test_torchs_seed_decides_the_fresh_head(llama_folder):
    def head(seed):
        torch.manual_seed(seed)
        return load_model(llama_folder, task="classification", labels=("a", "b"))[0].score.weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_a_trained_classifier_keeps_its_head_and_labels(tmp_path):
    trained = build("bert", id2label={0: "x", 1: "y", 2: "z"})
    trained.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="<pad>")
    model: Any = load_model(tmp_path, task="classification")[0]
    assert torch.equal(model.classifier.weight, trained.classifier.weight)
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}


@pytest.fixture
def logged(monkeypatch):
    """A list of what transformers logs, at its usual verbosity."""
    records: list[Any] = []
    handler = Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.add_handler(handler)
    yield records
    logging.remove_handler(handler)
    logging.set_verbosity(before)


def test_loading_says_nothing(llama_folder, logged, capfd):
    load_model(llama_folder, task="classification", labels=("a", "b"))
    assert logged == []
    assert capfd.readouterr() == ("", "")


def test_transformers_speaks_again_after_a_load(llama_folder, logged):
    bars = logging.is_progress_bar_enabled()
    load_model(llama_folder)
    with pytest.raises(ModelError):
        load_model(llama_folder / "nothing")
    assert logging.is_progress_bar_enabled() == bars
    logging.get_logger("transformers").warning("heard")
    assert [record.msg for record in logged] == ["heard"]


# Mistakes.


def test_all_wrong_settings_are_told_at_once(llama_folder):
    assert told(llama_folder, dtype="fp16", task="translation", labels=("a", "b")).splitlines() == [
        "the model cannot be loaded in this way (3 problems):",
        "  dtype 'fp16' is none of float32, bfloat16, float16",
        f"  task 'translation' is none of {', '.join(TASKS)}",
        "  labels belong to tasks with classes, not to translation",
    ]


def test_a_precision_of_torch_that_no_base_has_is_named(llama_folder):
    message = told(llama_folder, dtype=torch.float64)
    assert message.endswith("dtype 'float64' is none of float32, bfloat16, float16")


@pytest.mark.parametrize("labels", [(), ("a",), ("a", "a"), ("a", "b", "a")])
def test_labels_must_be_several_and_different(llama_folder, labels):
    message = told(llama_folder, task="classification", labels=labels)
    assert "labels must be two or more different names" in message


def test_a_folder_without_a_config_holds_no_model(tmp_path):
    assert told(tmp_path) == f"{tmp_path} holds no model: it has no config.json."


def test_an_adapter_folder_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "but an adapter: load the base that it names" in told(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    missing = str(tmp_path / "model")
    assert told(missing) == f"there is no folder {missing!r}. Packaged are smollm2 and minilm."


def test_a_hub_id_out_of_reach_is_told_how_to_get(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    message = told("nobody/no-such-model")
    assert message.startswith("'nobody/no-such-model' is not a folder, nor a hub id in the local")
    assert "Run `hf download nobody/no-such-model` where there is a network" in message


def test_a_failed_download_is_told_with_the_way_out(monkeypatch):
    def unreachable(_name, **_settings):
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    message = told("smolm2")
    assert message == (
        "'smolm2' cannot be loaded for generation: We couldn't connect to the hub. Run `hf download"
        " smolm2` where there is a network, or give a folder. Packaged are smollm2 and minilm; did"
        " you mean 'smollm2'?"
    )


def test_a_gated_base_says_where_access_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    estimated = lk.TrainConfig(model="someone/gated", out="out")
    for what in (lambda: lk.load_model("someone/gated"), lambda: lk.estimate(estimated)):
        with stand_in() as asked, pytest.raises(ModelError) as caught:
            what()
        message = str(caught.value)
        assert re.match(r"'someone/gated' cannot be loaded for .*: .*gated repo", message), message
        advice = "Ask for access on its page, http://127.0.0.1:"
        assert advice in message
        assert message.endswith("/someone/gated, then log in here by `hf auth login`.")
        assert asked


def test_a_misspelt_packaged_name_is_put_right(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    assert told("smolm2").endswith("did you mean 'smollm2'?")


def test_a_missing_weight_is_not_left_to_chance(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    for task in ("generation", "regression"):
        message = told(copy, task=task)
        assert message.splitlines()[0].endswith("(1 problem):")
        assert "model.layers.1.mlp.up_proj.weight  not in the checkpoint" in message


def test_a_long_list_of_missing_weights_is_cut(copy):
    save_file({"x": torch.zeros(1)}, copy / "model.safetensors", {"format": "pt"})
    lines = told(copy).splitlines()
    assert len(lines) == 7
    assert lines[-1].endswith("more that are missing")


def test_a_trained_head_for_other_labels_is_not_thrown_away(tmp_path):
    build("bert").save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="<pad>")
    message = told(tmp_path, task="classification", labels=("a", "b"))
    assert "classifier.weight  (3, 32) in the checkpoint, (2, 32) needed" in message


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_an_encoder_that_is_to_write_says_what_writes_and_what_it_does(family, tmp_path):
    build(family, head="Model").save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="<pad>")
    assert told(tmp_path) == (
        f"{tmp_path} was asked for generation, the task of rows with a prompt, and is an encoder"
        f" ({family}), which reads a text at once and writes none: give a base that writes, such as"
        " smollm2, or another task and its rows (classification, regression, multi-label,"
        " token-classification, question-answering, embedding)"
    )


def test_a_class_that_writes_does_not_make_an_encoder_write():
    # Its tokens see those that follow, unless the config has the switch.
    named = {"architectures": ["BertLMHeadModel"]}
    check_does("", BertConfig(**named, is_decoder=True), "generation")
    with pytest.raises(ModelError, match="is an encoder"):
        check_does("", BertConfig(**named), "generation")


def test_a_truncated_checkpoint_is_a_model_error(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert told(copy).startswith(f"{str(copy)!r} cannot be loaded for generation: ")


def test_an_error_that_begins_with_an_empty_line_is_told():
    told = pytest.raises(ModelError, match=r"cannot be loaded .*for generation: it needs y\. ")
    with told, explained("x", "x", "generation"):
        raise ImportError("\n  it needs y\nSee z.")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_type": "gpt17"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_damaged_config_is_a_model_error(copy, text):
    (copy / "config.json").write_text(text)
    assert told(copy).startswith(f"{str(copy)!r} cannot be loaded for generation: ")


def test_a_model_of_the_wrong_kind_is_a_model_error(tmp_path):
    build("vit").save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="<pad>")
    assert "cannot be loaded for generation" in told(tmp_path)


def test_a_folder_without_a_tokenizer_is_a_model_error(tmp_path):
    build("llama").save_pretrained(tmp_path)
    assert "cannot be loaded for generation" in told(tmp_path)


def test_a_tokenizer_with_nothing_to_pad_with_is_an_error(copy):
    save_tokenizer(copy)
    assert told(copy).endswith("has no token to pad with, nor an end token")


# Names, and another head.


def test_a_models_name_is_the_folder_that_it_was_asked_by(llama_folder):
    assert model_name(load_model(llama_folder)[0]) == str(llama_folder)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), build("gpt2")])
def test_a_model_that_was_not_loaded_has_no_name(model):
    assert model_name(model) == ""


def test_a_checkpoint_of_other_classes_gets_a_fresh_head_where_asked(tiny_bert, tmp_path):
    torch.manual_seed(0)
    three, tokenizer = load_model(tiny_bert, task="classification", labels=("a", "b", "c"))
    three.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    how = {"task": "classification", "labels": ("no", "yes")}
    message = told(tmp_path, **how)
    assert "classifier.weight  (3, 32) in the checkpoint, (2, 32) needed" in message
    assert message.endswith("fresh_head leaves the checkpoint's head out, and starts another")
    torch.manual_seed(1)
    two, _ = load_model(tmp_path, fresh_head=True, **how)
    assert two.classifier.weight.shape == (2, 32)
    kept = dict(three.bert.named_parameters())
    assert all(torch.equal(p, kept[name]) for name, p in two.bert.named_parameters())
    torch.manual_seed(1)
    again, _ = load_model(tmp_path, fresh_head=True, task="classification")
    assert again.classifier.weight.shape == (3, 32)
    assert not torch.equal(again.classifier.weight, three.classifier.weight)
