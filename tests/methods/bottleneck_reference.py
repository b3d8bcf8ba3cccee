"""A bottleneck by its formula, in float64, and the modules that variants change, by hand."""

import copy

import torch

from lorakit.methods.bottleneck import BottleneckComponent
from references import outputs

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}
ATTENTION = {"llama": "self_attn.o_proj", "gpt2": "attn.c_proj", "bert": "attention.output.dense"}
MLP = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "bert": "output.dense"}
TINY = tuple(BLOCKS)
VARIANTS = ("h", "l", "p", "d")


def bottlenecks(plan):
    """The bottlenecks of a plan, without the norms that may be trained beside them."""
    return plan.of_kind(BottleneckComponent)


def changed_modules(family, variant, blocks=(0, 1)):
    """The modules that a variant of the paper changes, written down by hand."""
    ends = {
        "h": (f".{ATTENTION[family]}", f".{MLP[family]}"),
        "l": ("",),
        "p": (f".{MLP[family]}",),
        "d": (f".{MLP[family]}",),
    }[variant]
    return [f"{BLOCKS[family]}.{number}{end}" for number in blocks for end in ends]


def relu(x):
    return x * (x > 0)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


NONLINEARITIES = {
    "relu": relu,
    "gelu": gelu,
    "tanh": torch.tanh,
    "silu": lambda x: x / (1 + (-x).exp()),
}


def bottleneck(h, tensors, path, nonlinearity):
    """What a bottleneck adds to h, by its formula."""
    t = {k.removeprefix(f"{path}.bottleneck."): v.double() for k, v in tensors.items()}
    x = h
    if "norm.weight" in t:
        centred = h - h.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = centred / spread * t["norm.weight"] + t["norm.bias"]
    return nonlinearity(x @ t["down.weight"].T + t["down.bias"]) @ t["up.weight"].T + t["up.bias"]


def of(tensors, path):
    return {name: t for name, t in tensors.items() if name.startswith(f"{path}.bottleneck.")}


def hooked(model, paths, add):
    """The logits of a copy in float64 where `add(path, h)` comes to some outputs."""

    def hook(path, output):
        if isinstance(output, tuple):
            return (output[0] + add(path, output[0]), *output[1:])
        return output + add(path, output)

    plain = copy.deepcopy(model).double()
    for path in paths:
        plain.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: hook(path, o))
    return lambda inputs: outputs(plain, inputs)
