"""The reference implementation of virtual tokens: embeddings by hand, hooks over blocks."""

import copy

import torch

import lorakit as lk
from lorakit.config.methods import PrefixConfig
from references import randomise
from tiny_models import build

CAUSAL = ("llama", "gpt2", "opt", "bloom", "gemma")
ENCODERS = ("bert", "roberta", "deberta-v2", "electra")
PREFIX, INFIX = 2, 3


def prefixed(family, *, every_layer=True, name="default", seed=0, model=None, **settings):
    """A tiny model in float64 with random virtual tokens."""
    model = build(family, num_hidden_layers=3) if model is None else model
    config = PrefixConfig(
        **{"prefix": PREFIX, "infix": INFIX, "every_layer": every_layer, **settings}
    )
    lk.attach(model, config, name=name)
    model.double()
    randomise(model, name, seed=seed, std=0.5)
    return model


def bare(model):
    """The base alone."""
    base = copy.deepcopy(model)
    lk.detach(base)
    return base


def row_with_tokens(ids, *, causal, prompt=None, prefix=PREFIX, infix=INFIX):
    """A row as a list of token ids and, as ~n, of virtual tokens."""
    ids = list(ids)
    prompt = len(ids) if prompt is None else prompt
    lead = 0 if causal else 1
    first = [~n for n in range(prefix)]
    second = [~n for n in range(prefix, prefix + infix)]
    return [*ids[:lead], *first, *ids[lead:prompt], *second, *ids[prompt:]]


@torch.no_grad()
def expected(base, tensors, row):
    """The logits of one row of ids and virtual tokens, without gradients."""
    return run(base, tensors, row)


def run(base, tensors, row):
    embedding = base.get_input_embeddings()
    path = next(p for p, m in base.named_modules() if m is embedding)
    vectors = {name.removesuffix(".prompt"): t.double() for name, t in tensors.items()}
    numbers = [~at for at in row if at < 0]
    positions = [position for position, at in enumerate(row) if at < 0]
    embeds = embedding(torch.tensor([[max(at, 0) for at in row]]))
    embeds = embeds.index_put((torch.tensor(0), torch.tensor(positions)), vectors[path][numbers])

    def overwrite(block):
        def hook(_module, _args, output):
            states = output[0] if isinstance(output, tuple) else output
            states = states.index_put(
                (torch.tensor(0), torch.tensor(positions)), vectors[block][numbers]
            )
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return base.get_submodule(block).register_forward_hook(hook)

    hooks = [overwrite(each) for each in vectors if each != path and positions]
    scale = getattr(embedding, "embed_scale", None)
    assert scale is None or base.config.model_type.startswith("gemma")
    try:
        return base(inputs_embeds=embeds).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def own_positions(row, *, causal):
    """The position whose logits count for each token of the row that is not virtual."""
    found = []
    for position, at in enumerate(row):
        if at >= 0:
            found.append(position)
        elif causal and found:
            found[-1] = position
    return found
