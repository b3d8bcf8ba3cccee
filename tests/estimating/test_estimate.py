"""Estimates: what a step holds and computes, told from shapes alone, beside what really happens."""

import json
import math

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

import lorakit as lk
from lorakit.adapter.adapter import Adapter
from lorakit.cli.main import main
from lorakit.config.estimate import EstimateConfig
from lorakit.data.samples import Example
from lorakit.estimating.counter import StepCounter
from lorakit.estimating.estimate import Estimator, estimate
from lorakit.estimating.fit import fitting
from lorakit.estimating.serving import READ
from lorakit.estimating.training_step import count_step
from lorakit.models.without_weights import build_without_weights
from lorakit.serving.decoder import Decoder
from lorakit.training.lm_loss import text_losses
from lorakit.training.memory.memory_setting import training_memory
from lorakit.upstream.private_names import TorchDispatchMode

SIZES = {"vocab_size": 512, "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 160}
ROWS, LENGTH = 4, 48


def llama():
    return transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)


def config_for(**given):
    settings = {"model": "x", "dtype": "float32", "batch_size": ROWS, "row_tokens": LENGTH}
    return EstimateConfig(**(settings | {"calibrate": False} | given))


def estimated(**given):
    shape = build_without_weights(llama(), dtype=given.get("dtype", "float32"))
    return estimate(config_for(**given), model=shape)


def test_memory_counts_from_its_allocation_to_its_last_reference():
    with StepCounter() as counter:
        x = torch.empty(1000, device="meta")
        y = x.view(10, 100)
        del x
        assert counter.peak_bytes == 4000
        z = y + 1
        del y
        assert sum(counter.live.values()) == 4000
        del z
    assert (counter.peak_bytes, sum(counter.live.values())) == (8000, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_counted_in_every_precision(dtype):
    def flops(experts):
        config = transformers.MixtralConfig(
            **SIZES,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=experts,
        )
        given = config_for(dtype=dtype, memory="fast", lora={"targets": ["q", "mlp.gate"]})
        return estimate(given, model=build_without_weights(config, dtype=dtype)).flops

    # Three matrices of an expert for each token and block, forward and for the input's gradient.
    once = ROWS * LENGTH * 3 * 2 * SIZES["hidden_size"] * SIZES["intermediate_size"]
    assert flops(2) - flops(1) == 2 * SIZES["num_hidden_layers"] * once


def test_fixed_parts_are_those_of_the_model_and_of_what_is_trained():
    model = transformers.LlamaForCausalLM(llama())
    found = estimated()
    values = lk.plan(model, lk.LoRAConfig()).parameters
    held = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    # AdamW's two moments, and the copy of the weights that last gave a finite loss.
    assert found.training["optimizer"] == 3 * 4 * values
    assert (found.trained, found.training["adapter"]) == (values, 4 * values)
    assert found.training["weights"] == held
    assert found.training_bytes == sum(found.training.values())


@pytest.mark.thorough
def test_memory_modes_hold_less_and_compute_more():
    fast, balanced, low = (estimated(memory=mode) for mode in ("fast", "balanced", "low"))
    assert fast.training["activations"] > balanced.training["activations"]
    assert balanced.training["activations"] > low.training["activations"]
    assert fast.flops <= balanced.flops < low.flops


@pytest.mark.parametrize("method", ["prefix-embedding", "prefix-layer"])
def test_virtual_tokens_make_rows_longer(method):
    alone, found = estimated(), estimated(method=method)
    assert found.tokens > alone.tokens
    assert found.training["activations"] > alone.training["activations"]


class Matmuls(TorchDispatchMode):
    """The FLOPs of matmuls, by their sizes alone."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[-2:] if len(args) > 2 else args
            self.flops += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


def real_step(config):
    """A training step of the real model, and a step before it that is not looked at."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama()).train()
    lk.attach(model, config.methods())
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(1, 500, (ROWS, LENGTH))
    mask = torch.ones_like(ids)

    def step():
        loss, _ = text_losses(model, {"input_ids": ids, "attention_mask": mask}, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["fast", "balanced", "low"])
def test_flops_and_memory_are_those_of_a_real_step(mode):
    config = config_for(memory=mode, packing="off")
    model, step = real_step(config)
    shape = build_without_weights(llama(), dtype="float32")
    example = Example(input_ids=[1] * LENGTH, labels=[1] * LENGTH)
    counted = count_step(shape, config, [example] * ROWS, task="generation", device="cpu")
    with training_memory(model, config):
        step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
        # torch counts no FLOPs of attention as one kernel of a CPU, and of matmuls it does.
        with sdpa_kernel(SDPBackend.MATH), Matmuls() as matmuls:
            step()
    live = peak = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda each: each.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    moved = ("activations", "logits", "temporary", "gradients")
    ours = sum(counted.peak_bytes.get(kind, 0) for kind in moved)
    assert peak == pytest.approx(ours, rel=0.1)
    assert matmuls.flops == pytest.approx(counted.flops, rel=0.08)


@pytest.mark.thorough
def test_an_adapter_takes_as_much_on_disk_as_was_said(tmp_path):
    model = transformers.LlamaForCausalLM(llama())
    lk.attach(model, lk.LoRAConfig(rank=64))
    folder = lk.extract(model).save(tmp_path / "a")
    size = sum(file.stat().st_size for file in folder.iterdir())
    found = estimated(lora={"rank": 64})
    assert found.adapter_bytes == pytest.approx(size, rel=0.1)
    assert found.trained == Adapter.load(folder).parameters


REPEATED = "0-1,0-2"


@pytest.mark.thorough
def test_blocks_that_run_twice_have_adapters_of_their_own_and_weights_once(tmp_path):
    llama().save_pretrained(tmp_path)
    plain = estimate(config_for(model=str(tmp_path)))
    lora = {"layer_replication": REPEATED, "targets": ["all-linear"]}
    found = estimate(config_for(model=str(tmp_path), lora=lora))
    once = estimate(config_for(model=str(tmp_path), lora={"targets": ["all-linear"]}))
    real = transformers.LlamaForCausalLM(llama())
    lk.replicate_layers(real, REPEATED)
    attached = lk.attach(real, lk.LoRAConfig(**lora))
    assert found.trained == attached.parameters == once.trained // 3 * 5
    held = sum(each.nbytes for each in (*llama_tensors(real),))
    assert found.training["weights"] == held == plain.training["weights"]
    assert found.parameters == plain.parameters
    # The head and the loss are computed once.
    assert once.flops < found.flops < 5 / 3 * once.flops
    per_block = (found.flops - once.flops) / 2
    deeper = transformers.LlamaConfig(**{**llama().to_diff_dict(), "num_hidden_layers": 5})
    five = estimate(
        config_for(lora={"targets": ["all-linear"]}),
        model=build_without_weights(deeper, dtype="float32"),
    )
    assert found.flops == five.flops
    assert per_block * 3 < once.flops
    assert found.serving["keys and values"] == five.serving["keys and values"]
    # A checkpoint of the deeper base would hold the weights of all five.
    assert found.training["weights"] < five.training["weights"]
    assert found.training["activations"] == five.training["activations"]


def llama_tensors(model):
    """What the base itself holds, each tensor once."""
    adapter = {id(each) for each in model.parameters() if each.requires_grad}
    return (each for each in (*model.parameters(), *model.buffers()) if id(each) not in adapter)


@pytest.mark.thorough
def test_smollm2_with_repeated_blocks_trains_as_many_values_as_was_said():
    lora = {"rank": 4, "targets": ["q", "v"], "layer_replication": "0-19,10-29"}
    found = lk.estimate(config_for(model="smollm2", lora=lora))
    model, _ = lk.load_model("smollm2", layer_replication="0-19,10-29")
    assert found.trained == lk.attach(model, lk.LoRAConfig(**lora)).parameters
    assert found.parameters == model.num_parameters(exclude_embeddings=False) - found.trained


def test_an_order_that_the_base_cannot_run_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(lk.errors.ModelError, match="names block 7, and there are 3"):
        estimate(config_for(model=str(tmp_path), lora={"layer_replication": "0-7"}))


@pytest.mark.thorough
def test_several_processes_share_rows_and_the_base():
    alone, one_of_two = estimated(), estimated(processes=2)
    assert one_of_two.training["activations"] < 0.6 * alone.training["activations"]
    assert one_of_two.training["weights"] == alone.training["weights"]
    assert one_of_two.tokens == alone.tokens
    divided = estimated(processes=2, shard="base")
    model = transformers.LlamaForCausalLM(llama())
    block = sum(each.nbytes for each in model.model.layers[0].parameters())
    inside = sum(each.nbytes for each in model.model.layers.parameters())
    outside = sum(each.nbytes for each in model.parameters()) - inside
    share = math.ceil(alone.training["weights"] / 2)
    assert divided.training["weights"] == share + 2 * block + outside
    # With few activations the most is needed where embedding and head are gathered, and copied.
    few = estimated(processes=2, shard="base", memory="low", row_tokens=2)
    assert few.training["weights"] == share + 2 * block + 2 * outside
    assert few.training["activations"] == few.training["gradients"] == 0
    assert few.training["adapter"] == divided.training["adapter"]


@pytest.mark.thorough
def test_a_server_holds_keys_and_values_of_all_slots():
    found = estimated(serve={"slots": 4, "max_length": 60, "adapters": 2})
    # 2 · 3 layers · 2 heads of 16 numbers, in columns that are a power of two.
    assert found.serving["keys and values"] == 4 * 128 * 2 * 3 * 2 * 16 * 4
    assert found.serving["adapters"] == 2 * 4 * found.trained
    assert found.serving["adapters of slots"] == 4 * 4 * found.trained


@pytest.mark.thorough
@pytest.mark.parametrize(("dtype", "copies"), [("float32", 0), ("bfloat16", 2)])
def test_ranks_without_room_in_the_slots_are_copied_for_another_precision_alone(dtype, copies):
    given = {"slots": 4, "max_length": 60, "adapters": 2}
    found = estimated(serve=given, dtype=dtype, lora={"rank": 80})
    assert found.serving["adapters of slots"] == copies * 2 * found.trained


def profiled_bytes(work):
    """The most that lives at once of what some work allocates."""
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        made = work()
    live = peak = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda each: each.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del made
    return peak


@pytest.mark.thorough
@pytest.mark.parametrize(("slots", "length"), [(4, 100), (1, 300), (1, 700)])
def test_reading_prompts_takes_what_was_said(slots, length):
    torch.manual_seed(0)
    decoder = Decoder(transformers.LlamaForCausalLM(llama()).eval())
    texts = torch.randint(1, 500, (slots, length)).tolist()

    def read():
        if slots > 1:
            return decoder.read_together(texts, [DynamicCache() for _ in texts])
        cache = DynamicCache()
        for part in (texts[0][: -READ or None], texts[0][-READ:])[length <= READ :]:
            decoder.read(part, cache)
        return cache

    found = estimated(serve={"slots": slots, "max_length": length})
    took = profiled_bytes(read)
    assert found.serving["a step, or reading a prompt"] == pytest.approx(took, rel=0.1)


@pytest.mark.thorough
def test_settings_that_fit_are_found_and_say_what_they_cost():
    given = config_for(batch_size=8)
    estimator = Estimator()

    def of_shape(config):
        shape = build_without_weights(llama(), dtype=config.dtype)
        return estimator(config, model=shape)

    whole = of_shape(given).training_bytes
    found = fitting(given, whole - 1, estimate=of_shape)
    assert all(each.estimate.training_bytes < whole for each in found)
    first = found[0]
    assert first.changes == {"batch_size": 4, "accumulate": 2}
    assert first.costs == ("more passes of fewer rows; the same gradients",)
    assert math.isclose(first.times_flops, 1, rel_tol=0.01)
    smallest = config_for(batch_size=1, memory="low", dtype="bfloat16", quantize="8bit")
    with pytest.raises(lk.errors.ConfigError, match=r"nothing fits into 1e-06 GB: the least is"):
        fitting(smallest, 1000, estimate=of_shape)


def test_what_cannot_be_estimated_is_one_message(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": -1}))
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    told = []
    for words in (
        ["--model", str(tmp_path)],
        ["--model", str(unknown)],
        ["--fit", "lots"],
        ["--batch-size", "3", "--processes", "2"],
        ["--model", "minilm"],
    ):
        assert main(["estimate", *words]) == 2
        told.append(capsys.readouterr().err)
    assert "cannot be built by transformers for generation" in told[0]
    assert "cannot be loaded for any task" in told[1]
    assert "'lots' is no size: write 24GB, 80GiB or 500MB" in told[2]
    assert "batch_size 3 is the rows of all processes: give a multiple of 2" in told[3]
    assert "and is an encoder (bert), which reads a text at once" in told[4]


@pytest.mark.thorough
def test_the_verb_needs_no_more_of_a_model_than_its_config(tmp_path, capsys):
    llama().save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--row-tokens", "32", "--tflops", "0.001", "--json"]
    assert main(["estimate", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == transformers.LlamaForCausalLM(llama()).num_parameters()
    assert found["seconds"] == pytest.approx(found["flops"] / 1e9)
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]
