"""Small adapters made by hand, one for each thing that the file format has to carry."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.site import Site, scale_of
from lorakit.config.methods import LoRAConfig
from lorakit.models.identity import BaseIdentity

BASE = BaseIdentity(
    name="someone/tiny",
    architecture="gpt2",
    dtype="float32",
    tensors=3,
    names_hash="ab" * 32,
    samples="AACAPwAAAEA=",
)
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""The shapes of A and B, by the path of their site."""
CARD = {"task_type": "CAUSAL_LM", "seed": 3, "scores": {"bleu": 65.6}, "note": 'rows of 8 — "ü"'}


def site(
    path: str, *, rank: int = 4, alpha: float = 8.0, rslora: bool = False, **facts: Any
) -> Site:
    """A site whose scale follows from its rank and alpha."""
    scale = scale_of(rank, alpha, use_rslora=rslora)
    return Site(path=path, rank=rank, alpha=alpha, scale=scale, **facts)


def slice_of(
    path: str, role: str, *rows: tuple[int, int], layer_rows: int = 24, **facts: Any
) -> Site:
    """The site of a slice."""
    return site(path, role=role, rows=rows, layer_rows=layer_rows, **facts)


def adapter(
    *sites: Site,
    shapes: Shapes | None = None,
    extra: dict[str, tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float32,
    config: LoRAConfig | None = None,
    **facts: Any,
) -> Adapter:
    """An adapter with random tensors.

    Args:
        sites: each has A (rank, 8) and B (16 or the slice's rows, rank), if `shapes` has no other.
        shapes: shapes of A and B by path.
        extra: shapes of the tensors that replace parameters of the base, by name.
        dtype: of all tensors.
        config: the settings.
        facts: further fields of the adapter.
    """
    generator = torch.Generator().manual_seed(len(sites))
    tensors: dict[str, Tensor] = {}
    for each in sites:
        rows = 16 if each.rows is None else sum(stop - start for start, stop in each.rows)
        a, b = (shapes or {}).get(each.path, ((each.rank, 8), (rows, each.rank)))
        tensors[f"{each.name}.lora_a"] = torch.randn(a, generator=generator).to(dtype)
        tensors[f"{each.name}.lora_b"] = torch.randn(b, generator=generator).to(dtype)
    for name, shape in (extra or {}).items():
        tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    config = config or LoRAConfig(rank=4, alpha=8)
    return Adapter(configs=(config,), sites=sites, tensors=tensors, base=BASE, card=CARD, **facts)


def linear() -> Adapter:
    return adapter(site("model.layers.0.q_proj"), site("model.layers.1.q_proj"))


def slices() -> Adapter:
    path = "h.0.attn.c_attn"
    facts: dict[str, Any] = {"kind": "transposed"}
    return adapter(
        slice_of(path, "q", (0, 8), **facts),
        slice_of(path, "v", (16, 24), **facts),
        slice_of("h.1.attn.c_attn", "k", (8, 16), **facts),
    )


def interleaved() -> Adapter:
    path = "layers.0.query_key_value"
    return adapter(
        slice_of(path, "q", (0, 4), (12, 16)),
        slice_of(path, "v", (8, 12), (20, 24)),
    )


def slices_of_other_ranks() -> Adapter:
    path = "h.0.c_attn"
    return adapter(
        slice_of(path, "q", (0, 8), rank=3, alpha=1.0),
        slice_of(path, "v", (16, 24), rank=6, alpha=2.0),
    )


def slices_of_scales_1_and_4() -> Adapter:
    path = "h.0.c_attn"
    return adapter(
        slice_of(path, "q", (0, 8), alpha=4.0), slice_of(path, "v", (16, 24), alpha=16.0)
    )


def slices_of_scales_1_and_3() -> Adapter:
    path = "h.0.c_attn"
    return adapter(
        slice_of(path, "q", (0, 8), alpha=4.0), slice_of(path, "v", (16, 24), alpha=12.0)
    )


def rslora_slices() -> Adapter:
    path = "h.0.c_attn"
    return adapter(
        slice_of(path, "q", (0, 8), rank=3, rslora=True),
        slice_of(path, "k", (8, 16), rank=3, rslora=True),
        config=LoRAConfig(rank=3, alpha=8, use_rslora=True, targets=("q", "k")),
    )


def patterns() -> Adapter:
    paths = [f"layers.{block}.{name}" for block in range(3) for name in ("q_proj", "up_proj")]
    ranks = [4, 4, 4, 2, 4, 8]
    alphas = [8.0, 8.0, 6.5, 8.0, 8.0, 3.0]
    sites = [site(p, rank=r, alpha=a) for p, r, a in zip(paths, ranks, alphas, strict=True)]
    return adapter(*sites)


def embedding() -> Adapter:
    path = "model.embed_tokens"
    return adapter(site(path, kind="embedding"), shapes={path: ((4, 30), (8, 4))})


def convolution() -> Adapter:
    shapes = {"conv": ((4, 3, 3, 5), (6, 4, 1, 1)), "time": ((4, 3, 3), (6, 4, 1))}
    return adapter(site("conv", kind="conv"), site("time", kind="conv"), shapes=shapes)


def grouped_convolution() -> Adapter:
    shapes: Shapes = {"conv": ((4, 3, 3, 3), (6, 4, 1, 1))}
    return adapter(site("conv", kind="conv", groups=2), shapes=shapes)


def head_and_biases() -> Adapter:
    return adapter(
        site("encoder.query"),
        extra={
            "encoder.query.bias": (16,),
            "encoder.norm.bias": (8,),
            "classifier.dense.weight": (8, 8),
            "classifier.dense.bias": (8,),
            "classifier.out.weight": (3, 8),
        },
        copied_modules=("classifier",),
        target_modules=("query",),
        config=LoRAConfig(rank=4, alpha=8, bias="all", dropout=0.1, modules_to_save="classifier"),
    )


def only_a_head() -> Adapter:
    config = LoRAConfig(targets=(), modules_to_save="score")
    return adapter(extra={"score.weight": (3, 8)}, copied_modules=("score",), config=config)


def brain_floats() -> Adapter:
    path = "h.0.c_attn"
    return adapter(
        slice_of(path, "q", (0, 8)),
        slice_of(path, "v", (16, 24), alpha=2.0),
        dtype=torch.bfloat16,
        config=LoRAConfig(rank=4, alpha=8, dtype="bfloat16"),
    )


MAKERS: tuple[Callable[[], Adapter], ...] = (
    linear,
    slices,
    interleaved,
    slices_of_other_ranks,
    slices_of_scales_1_and_4,
    slices_of_scales_1_and_3,
    rslora_slices,
    patterns,
    embedding,
    convolution,
    grouped_convolution,
    head_and_biases,
    only_a_head,
    brain_floats,
)
IN_OWN_FORM = (slices_of_scales_1_and_3, only_a_head)
"""Those for which PEFT has no exact form."""
