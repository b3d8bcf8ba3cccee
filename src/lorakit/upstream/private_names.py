"""The private names of torch, transformers and accelerate that lorakit needs, all in one place.

A new version may drop any of them without a word. `lorakit.upstream.reasons` says of each why it is
needed and what breaks without it; the tests resolve them all on the installed versions, and find
uses that are not in here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import (
    NonDynamicallyQuantizableLinear as NonDynamicallyQuantizableLinear,
)
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten

BatchNorm = _BatchNorm
"""The base class of all batch norms."""

UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
FUSED_ATTENTIONS = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""The operations that scaled_dot_product_attention becomes where it is one kernel."""

CPU_ATTENTION_GRADIENT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
"""The operation that computes the gradients of fused attention on a CPU."""

GROUPED_MATMUL = torch.ops.aten._grouped_mm.default
"""The operation by which experts multiply: each group of rows with a matrix of its own."""

COMPILED_WRAPPER = "_orig_mod"
"""The attribute in which torch.compile's wrapper holds a model."""
CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""The attribute of a block by which transformers calls it where it is checkpointed."""
ATTENTION_FLAGS = ("_supports_attention_backend", "_supports_flash_attn")
"""transformers' flags of models that look attention up and pass it all settings by keyword."""


def in_backward() -> bool:
    """Whether this is called by autograd, in a backward pass."""
    return torch._C._current_graph_task_id() != -1


def functorch_is_active() -> bool:
    """Whether this runs inside a transform of torch.func, such as vmap or grad."""
    return torch._C._are_functorch_transforms_active()


def in_compiled_call() -> bool:
    """Whether this runs within torch.compile, traced or between two graphs."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def is_traced() -> bool:
    """Whether torch.jit.trace records what is computed."""
    return torch._C._is_tracing()


def mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """Let one compiled graph serve all sizes of a dimension, if the compiler can."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises where it cannot compile; importing it takes a second."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


def traced(function: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphModule:
    """The graph of the operations by which a function computes; nothing is computed.

    Tensors that the function reads beside its inputs are attributes of the graph.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    made = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)
    return made(*inputs)


def compile_to_file(graph: GraphModule, inputs: Sequence[Tensor], path: Path) -> None:
    """Compile a graph for inputs like these; the code writes into those that the graph writes."""
    from torch._inductor import standalone_compile

    made = standalone_compile(
        graph,
        list(inputs),
        dynamic_shapes="from_example_inputs",
        # Else it would start processes of its own for what takes seconds.
        options={"config_patches": {"compile_threads": 1}},
        aot=True,
    )
    made.save(path=str(path))


def load_code(path: Path) -> Callable[..., Any]:
    """What `compile_to_file` has made, as a function of the inputs one by one."""
    from torch._inductor.standalone_compile import CompiledArtifact

    return CompiledArtifact.load(path=str(path))


def is_compiled_wrapper(model: nn.Module) -> bool:
    """Whether a model is what torch.compile(model) returned."""
    return hasattr(model, COMPILED_WRAPPER)


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What a module's `__call__` runs after `module.compile()`; None: it is not compiled."""
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Let a module's `__call__` run this; None: its own forward pass with its hooks."""
    module._compiled_call_impl = call


def call_uncompiled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A module's output by its own forward pass with its hooks, also where it is compiled."""
    return module._call_impl(*args, **kwargs)


def write_count(tensor: Tensor) -> int:
    """How often a tensor was written in place; not counted for inference tensors."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Whether autograd knows a tensor as a view of another one."""
    return tensor._is_view()


def storage_number(tensor: Tensor) -> int:
    """A number of the memory behind a tensor, which views of it share."""
    return tensor.untyped_storage()._cdata


def arguments_of(operation: Any) -> Any:
    """The declared arguments of an operation that a dispatch mode sees."""
    return operation._schema.arguments


def reshaped_result(x: Tensor, shape: list[int]) -> Tensor:
    """A fresh, contiguous result in another shape, which autograd does not take for a view."""
    return torch.ops.aten._unsafe_view(x, shape)


def softmax_gradient(gradient: Tensor, probabilities: Tensor) -> Tensor:
    """The gradient of the scores, given the softmax over the last dimension and its gradient."""
    return torch.ops.aten._softmax_backward_data(gradient, probabilities, -1, gradient.dtype)


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Attention as the one kernel that a CPU has for it, also where there are no values."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = attend(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)[0]
    return out


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer by oneDNN's matmul, which torch itself takes for half precision alone."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def own_parameters(module: nn.Module) -> MutableMapping[str, nn.Parameter | None]:
    """A module's own parameters by name, those that are None included."""
    return module._parameters


def own_modules(module: nn.Module) -> MutableMapping[str, nn.Module | None]:
    """A module's children by name, those that are None included."""
    return module._modules


def own_buffers(module: nn.Module) -> Mapping[str, Tensor | None]:
    """A module's own buffers by name."""
    return module._buffers


def forward_pre_hooks(module: nn.Module) -> Mapping[int, Callable[..., Any]]:
    """The hooks that are called before a module's forward pass."""
    return module._forward_pre_hooks


def twin_of(module: nn.Module) -> nn.Module:
    """Another module with the same parameters, hooks and children, which may be replaced."""
    made = type(module).__new__(type(module))
    vars(made).update(vars(module))
    vars(made)["_modules"] = dict(module._modules)
    return made


def forget_hooks(twin: nn.Module, *hooks: Callable[..., Any]) -> None:
    """Have a twin not call some of the hooks of the module that it is made from."""
    for kept in ("_forward_hooks", "_forward_pre_hooks"):
        others = {n: hook for n, hook in vars(twin)[kept].items() if hook not in hooks}
        vars(twin)[kept] = OrderedDict(others)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of a module would call a hook."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def convolution_of(layer: nn.Module) -> Callable[..., Tensor]:
    """A convolution as a function of (x, weight, bias), with the layer's stride and padding."""
    return cast(Any, layer)._conv_forward


def loaded_from(model: nn.Module) -> str:
    """The folder or hub id that a model was loaded from; "" if it was not."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def initialize(model: nn.Module, module: nn.Module) -> None:
    """Draw the weights of one of a model's modules as transformers does."""
    cast(Any, model)._init_weights(module)


def kept_in_float32(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules that a model wants in float32 whatever its precision."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def names_attention(config: Any) -> bool:
    """Whether a config says by name which attention function its layers call."""
    return hasattr(config, "_attn_implementation_internal")


def attention_name(config: Any) -> str | None:
    """The name of the attention function, without a look at the configs inside."""
    return config._attn_implementation_internal


def set_attention_name(config: Any, name: str | None) -> None:
    """Name the attention function in this config alone."""
    config._attn_implementation_internal = name


def checkpoint_function(block: Any) -> Any:
    """The function by which transformers calls a checkpointed block; None: it has none."""
    return getattr(block, CHECKPOINT_FUNCTION, None)


def set_checkpoint_function(block: Any, function: Callable[..., Any]) -> None:
    """Let transformers call a checkpointed block by this function."""
    block._gradient_checkpointing_func = function


def accelerate_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward pass that accelerate's hook on a module calls; None: it has no hook."""
    return vars(module).get("_old_forward")


def set_accelerate_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let accelerate's hook on a module call this."""
    cast(Any, module)._old_forward = forward


def accelerate_device(module: nn.Module) -> torch.device | None:
    """Where accelerate's hook brings a module's weights and inputs for a call, if it has one."""
    hook: Any = vars(module).get("_hf_hook")
    if hook is None:
        return None
    devices = (getattr(each, "execution_device", None) for each in getattr(hook, "hooks", (hook,)))
    found = next((device for device in devices if device is not None), None)
    return None if found is None else torch.device(found)


def set_sync_gradients(gradient_state: Any, value: bool) -> None:
    """Tell accelerate whether the batch at hand is the last one of an optimizer step."""
    gradient_state._set_sync_gradients(value)
