"""What is said of an adapter that does not fit a model: each problem once, and nothing else."""

import peft
import pytest
import transformers

import lorakit as lk
from lorakit.errors import AdapterFileError
from tiny_models import build


def refusal(model, adapter):
    """The lines of the refusal, without the first."""
    with pytest.raises(AdapterFileError) as caught:
        lk.attach(model, adapter)
    return str(caught.value).splitlines()[1:]


def test_a_layer_that_is_not_there_is_one_line(tmp_path):
    model = build("llama")
    lk.attach(model, lk.LoRAConfig(targets="q"))
    found = refusal(build("llama", num_hidden_layers=1), lk.extract(model))
    assert [line.strip() for line in found[:1]] == [
        "model.layers.1.self_attn.q_proj  is not a module of this model"
    ]
    assert not [line for line in found if "missing" in line]


def test_a_token_beyond_the_embedding_is_one_problem(tmp_path):
    model = build("llama", vocab_size=80)
    lk.attach(model, lk.LoRAConfig(targets="q", trainable_token_indices=[3, 70]))
    adapter = lk.extract(model)
    found = refusal(build("llama"), adapter)
    assert "token 70 is named: resize the embedding first" in "".join(found)
    assert not [line for line in found if "has no place" in line]


def mixtral(experts):
    """A tiny Mixtral of one block."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=experts,
        )
    )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_target_modules_of_peft_are_no_parameters_of_experts(tmp_path):
    """There they match nothing, and nothing of experts was trained."""
    words = ["q_proj", "gate_up_proj", "down_proj"]
    theirs = peft.get_peft_model(mixtral(2), peft.LoraConfig(target_modules=words))
    theirs.save_pretrained(str(tmp_path))
    assert "gate_up_proj" in lk.Adapter.load(tmp_path).target_modules
    model = mixtral(2)
    assert len(lk.attach(model, tmp_path).components) == 1


def test_another_number_of_experts_is_not_called_a_rank():
    model = mixtral(4)
    lk.attach(model, lk.LoRAConfig(targets="experts.down"))
    found = refusal(mixtral(2), lk.extract(model))
    assert "lora_a  shape (4, 8, 24) in the adapter, (2, 8, 24) expected: was it trained on 4" in (
        "".join(found)
    )
