"""Whether an adapter and a base agree in the blocks that the base runs, and in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lorakit.config.methods import LoRAConfig, MethodConfig
from lorakit.errors import TargetError
from lorakit.models.replication import replication_of, same_order


def on_blocks_of(model: nn.Module, configs: Sequence[MethodConfig]) -> tuple[MethodConfig, ...]:
    """The settings of a fresh adapter, which say how the base repeats its blocks.

    Raises:
        TargetError: they say otherwise, or no method is LoRA, whose settings alone can say it.
    """
    order = replication_of(model)
    filled = tuple(
        each.model_copy(update={"layer_replication": order})
        if isinstance(each, LoRAConfig) and each.layer_replication is None
        else each
        for each in configs
    )
    for problem in other_blocks(model, filled):
        raise TargetError(problem)
    return filled


def other_blocks(model: nn.Module, configs: Sequence[MethodConfig]) -> Iterator[str]:
    """Yield a line if a base runs other blocks than an adapter is for."""
    order = replication_of(model)
    wanted = [each.layer_replication for each in configs if isinstance(each, LoRAConfig)]
    if order is not None and not wanted:
        yield (
            f"the base repeats blocks (layer_replication {order}), which only an adapter of lora "
            "can say: load it without, or train lora too"
        )
    for own in wanted:
        if same_order(own, order):
            continue
        how = f"runs {order}" if order else "runs each block once"
        then = (
            f"load it by lk.load_model(…, layer_replication={own!r}), or call "
            f"lk.replicate_layers(model, {own!r})"
            if own
            else "load it without layer_replication"
        )
        yield f"layer_replication of the adapter is {own}, and the base {how}: {then}"
