"""Merge an adapter into the base's weights for zero latency, and give the base back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.attachment.attach import check_in_place, detach, restore_original_weights
from lorakit.attachment.original_weights import Checkpoint, restore_module, set_parameter
from lorakit.attachment.state import (
    Attachment,
    active_name,
    attachment_of,
    require_attachment,
    require_name,
)
from lorakit.errors import MergeError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.operation import Update
from lorakit.layers.route import Frame
from lorakit.merging.probe import default_probe, outputs_on
from lorakit.merging.report import MergedWeight, MergeReport
from lorakit.merging.rounding import distance, is_rounding, rounding_errors
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.models.base import (
    base_modules,
    base_parameter,
    base_parameters,
    is_offloaded,
    unwrapped,
)
from lorakit.models.loftq import drop_loftq_mark
from lorakit.models.quantized_weight import is_quantized
from lorakit.routing.route import route
from lorakit.upstream.private_names import own_parameters


def merge(
    model: nn.Module,
    name: str | None = None,
    *,
    probe: Mapping[str, Tensor] | None = None,
    round_to: torch.dtype | None = None,
    original_weights: Literal["copy", "checkpoint"] = "copy",
    measure: bool = True,
) -> MergeReport:
    """Write W + scale·B·A into the weights, so that the model runs with no extra latency.

    The sum is formed in float32 from the original weight and rounded once. The original weights are
    kept, and `unmerge` puts them back. A weight that is tied to another is untied until then. Where
    another adapter is merged, this one takes its place, with the bits of a merge into the base.

    Args:
        model: a model with adapters.
        name: which adapter; None: the active one.
        probe: a batch to run before and after. None: a fixed batch of token ids, an image or a
            sound, whichever the model takes.
        round_to: round to this precision (kept in the weights' own), for a checkpoint that will be
            written in it.
        original_weights: where to keep them. copy: in the CPU's memory; checkpoint: in the
            safetensors files that the model was loaded from, where they hold the same bits (they
            must stay as they are until `unmerge`), else in memory.
        measure: compute what rounding cost, and run the probe; without, the report is empty and
            the merge several times faster.

    Raises:
        AttachError: layers were replaced or resized since the adapter was attached.
        MergeError: no adapter is active, this one cannot be merged (bottlenecks, virtual tokens,
            quantised weights), is merged already, a route is open, or the outputs changed by much
            more than rounding explains.

    Examples:
        >>> plan = lk.attach(model, "out/places")
        >>> report = lk.merge(model)
        >>> print(report.warning)
        None
        >>> lk.unmerge(model)  # every bit is back
    """
    model = unwrapped(model)
    state = require_attachment(model)
    name = _name_to_merge(model, state, name)
    probe = (default_probe(model) if probe is None else probe) if measure else None
    before = None if probe is None else _outputs_before(model, state, name, probe)
    try:
        weights = tuple(_merge_layers(model, state, name, round_to, original_weights, measure))
    except BaseException:
        restore_original_weights(model, state)
        raise
    state.route.set_bottom(Frame(name=name, merged=True))
    state.rounded_to = round_to
    after = outputs_on(model, probe)
    if before is None or after is None:
        return MergeReport(adapter=name, weights=weights, logit_change=None)
    _check_change(model, state, weights, probe, (before, after))
    change = (after - before).abs().max().item()
    return MergeReport(adapter=name, weights=weights, logit_change=change)


def _name_to_merge(model: nn.Module, state: Attachment, name: str | None) -> str:
    """The adapter that is asked for, or the active one, which can be merged now.

    Raises:
        AttachError: its layers were replaced or resized since it was attached.
        MergeError: there is none, or it cannot be merged.
    """
    name = active_name(model) if name is None else name
    if name is None:
        raise MergeError(f"no adapter is active: name one of {', '.join(state.adapters)}")
    require_name(state, name)
    if state.route.merged == name:
        raise MergeError(f"adapter {name!r} is merged already: lk.unmerge(model) first")
    if state.route.below:
        raise MergeError("a route is open, which would restore another adapter: merge after it")
    check_in_place(model, state, name)
    _check_mergeable(state, name)
    return name


def _outputs_before(
    model: nn.Module, state: Attachment, name: str, probe: Mapping[str, Tensor]
) -> Tensor | None:
    """The outputs of an adapter beside the base's own weights, which are put back for that."""
    if state.route.merged is not None:
        restore_original_weights(model, state)
    with route(model, name):
        return outputs_on(model, probe)


def _check_change(
    model: nn.Module,
    state: Attachment,
    weights: Sequence[MergedWeight],
    probe: Mapping[str, Tensor] | None,
    outputs: tuple[Tensor, Tensor],
) -> None:
    """Take back a merge that changed the outputs by much more than rounding explains.

    Raises:
        MergeError: it did; the weights are the base's again.
    """
    before, after = outputs
    name = state.route.merged
    assert name is not None
    sizes = {each.name: each.rounding_error * each.relative_update for each in weights}
    layers = {number: state.layers[number] for number in state.adapters[name].updates}
    with state.route.own.pushed(Frame(rounding_errors(layers, sizes))):
        moved = outputs_on(model, probe)
    if moved is None or is_rounding(before, after, moved):
        return
    restore_original_weights(model, state)
    raise MergeError(
        f"merging adapter {name!r} changed the outputs by {distance(before, after):.3g}, where "
        f"rounding explains {distance(moved, after):.3g}: merged, the adapter does something else "
        "than attached, and one of them is wrong; the weights are the base's again"
    )


def unmerge(model: nn.Module) -> None:
    """Put the original weights back, bit for bit; the adapter stays attached and active.

    Raises:
        MergeError: nothing is merged.

    Examples:
        >>> plan = lk.attach(model, "out/places")
        >>> weight = model.model.layers[0].self_attn.q_proj.weight
        >>> before, report = weight.clone(), lk.merge(model)
        >>> lk.unmerge(model)
        >>> bool((weight == before).all())
        True
    """
    model = unwrapped(model)
    state = attachment_of(model)
    if state is None or state.route.merged is None:
        raise MergeError("no adapter is merged into this model")
    restore_original_weights(model, state)


def _check_mergeable(state: Attachment, name: str) -> None:
    """Refuse an adapter that adds something which no weights can hold.

    Raises:
        MergeError: with each reason once, and where it holds.
    """
    reasons: dict[str, str] = {}
    for number, update in state.adapters[name].updates.items():
        layer = state.layers[number]
        reason = (
            update.why_unmergeable(layer)
            or _quantized_reason(layer, update)
            or _computed_reason(layer, update)
            or _offloaded_reason(layer)
        )
        if reason is not None:
            reasons.setdefault(reason, layer.adapter_path)
    if reasons:
        lines = [f"{reason} (first at {path or 'the model'})" for reason, path in reasons.items()]
        method = state.adapters[name].record.method
        raise MergeError.listing(
            f"adapter {name!r} ({method}) cannot be merged, so it keeps its extra latency", lines
        )


def _quantized_reason(layer: nn.Module, update: Update) -> str | None:
    """Why an update cannot be merged into a quantised weight; None: it does not have to."""
    only_bias = isinstance(update, LoRAUpdate) and not update.parts
    if only_bias or not is_quantized(layer):
        return None
    return (
        "the weight is quantised, and would lose most of the update in being so again: save the "
        "adapter and run `lorakit merge`, or detach it, dequantize the model, and attach it again"
    )


def _offloaded_reason(layer: nn.Module) -> str | None:
    """Why nothing can be merged into a layer's weights; None: they are in memory."""
    if not any(is_offloaded(module) for _, module in base_modules(layer)):
        return None
    return "the weight is offloaded and read anew for each call: load the base into memory to merge"


def _computed_reason(layer: nn.Module, update: Update) -> str | None:
    """Why an update has no parameter to be merged into; None: it has."""
    changes_weight = isinstance(update, LoRAUpdate) and update.parts
    if not changes_weight or own_parameters(layer).get("weight") is not None:
        return None
    return (
        "the weight is computed in each forward pass from others (weight_norm, spectral_norm, …), "
        "which cannot hold a sum: make it a plain weight first (remove_parametrizations, "
        "remove_weight_norm), or keep the adapter unmerged"
    )


def _merge_layers(
    model: nn.Module,
    state: Attachment,
    name: str,
    round_to: torch.dtype | None,
    original_weights: str,
    measure: bool,
) -> Iterator[MergedWeight]:
    tied = _tied_parameters(model)
    kept_weights = (w for weights in state.original_weights.values() for w in weights.values())
    # Those that the adapter which is merged now has untied.
    tied |= {id(weight) for weight in kept_weights if isinstance(weight, nn.Parameter)}
    checkpoint = Checkpoint(model) if original_weights == "checkpoint" else None
    updates = state.adapters[name].updates
    untied: dict[int, nn.Parameter] = {}
    touched = {state.layers[number].adapter_path for number in updates}
    for path in state.original_weights.keys() - touched:
        restore_module(model, path, state.original_weights.pop(path))
    for number, update in updates.items():
        layer, path = state.layers[number], state.layers[number].adapter_path
        kept = state.original_weights.setdefault(path, {})
        restore_module(model, path, kept)
        for inner, merged in update.merged(layer, exact=_precision(layer)):
            full_name = f"{path}.{inner}"
            current = base_parameter(layer, inner)
            rounded = merged.to(round_to or current.dtype).to(current.dtype)
            if measure:
                yield _measure(full_name, layer, update, inner, rounded)
            if id(current) in tied:
                # The tied parameter itself is the original weight; this layer gets one of its own,
                # or, if both change alike, that of the layer it is tied to.
                kept[inner] = current
                twin = untied.get(id(current))
                if twin is None or not torch.equal(twin, rounded):
                    twin = untied[id(current)] = nn.Parameter(rounded, requires_grad=False)
                set_parameter(layer, inner, twin)
                continue
            if inner not in kept:
                on_file = checkpoint.holds(full_name, current) if checkpoint else None
                kept[inner] = on_file or current.detach().to("cpu", copy=True)
            current.data.copy_(rounded)


def _precision(layer: nn.Module) -> torch.dtype:
    """The precision in which a layer's sums are formed: float32, or better if its weights are."""
    own = {parameter.dtype for _, parameter in base_parameters(layer)}
    return torch.float64 if torch.float64 in own else torch.float32


def _measure(
    name: str, layer: AdaptedLayer, update: Update, inner: str, rounded: Tensor
) -> MergedWeight:
    """Compare a rounded sum with the sum in float64."""
    base = base_parameter(layer, inner).detach().double()
    exact = next(t for n, t in update.merged(layer, exact=torch.float64) if n == inner)
    delta = (exact - base).norm().item()
    lost = (rounded.double() - exact).norm().item()
    whole = base.norm().item()
    return MergedWeight(
        name=name,
        relative_update=delta / whole if whole else float(delta > 0),
        rounding_error=lost / delta if delta else 0.0,
    )


def _tied_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that the model holds under more than one name."""
    seen: dict[int, int] = {}
    for _, module in base_modules(model):
        for parameter in own_parameters(module).values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def finalize(model: nn.Module) -> None:
    """Make a merge final: the merged weights stay, all adapters go, and the model is plain.

    Raises:
        MergeError: nothing is merged.
    """
    model = unwrapped(model)
    state = attachment_of(model)
    if state is None or state.route.merged is None:
        raise MergeError("no adapter is merged into this model")
    untied = _came_apart(model, state)
    state.original_weights.clear()
    state.route.set_bottom(Frame())
    detach(model)
    drop_loftq_mark(model)
    config = getattr(model, "config", None)
    if untied and config is not None:
        # Otherwise transformers would tie the two again when the checkpoint is loaded.
        config.tie_word_embeddings = False


def _came_apart(model: nn.Module, state: Attachment) -> bool:
    """Whether a merge made several weights of a tied one."""
    now: dict[int, set[int]] = {}
    for path, weights in state.original_weights.items():
        for name, weight in weights.items():
            if isinstance(weight, nn.Parameter):
                merged = base_parameter(model.get_submodule(path), name)
                now.setdefault(id(weight), set()).add(id(merged))
    left = {id(parameter) for _, parameter in base_parameters(model)}
    return any(len(merged) > 1 or old in left for old, merged in now.items())
