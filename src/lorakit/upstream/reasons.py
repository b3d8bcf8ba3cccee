"""Why lorakit needs each private name of torch, transformers and accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """One private name that lorakit needs."""

    owner: str
    """The dotted path of the module or class that has it; instances of a class may."""
    name: str
    why: str
    """What it is needed for."""
    breaks: str
    """What is wrong without it."""


_TABLE = """
# torch: autograd, functorch, the compiler
torch._C _current_graph_task_id
    tells a recomputation under checkpointing from a forward pass
    blocks are recomputed under whatever route is on by then: wrong gradients
torch._C _are_functorch_transforms_active
    our autograd functions know no vmap: plain torch runs inside transforms
    torch.func on an adapted model raises
torch._C._dynamo.eval_frame get_eval_frame_callback
    tells that virtual tokens' hooks run in compiled code, between its graphs too
    a compiled model with virtual tokens answers with those of an earlier call
torch._C _is_tracing
    tells that torch.jit.trace records, which cannot hold our autograd functions
    a traced model fails, or computes what its example did
torch._dynamo maybe_mark_dynamic
    the rank in a prepared batch may grow without a compilation
    a compiled bank compiles anew for each rank
torch._dynamo.exc FailOnRecompileLimitHit
    is what fullgraph raises after too many compilations
    such a run ends in torch's traceback, not in our error
torch._dynamo.exc TorchDynamoException
    is what the compiler raises for code that it cannot compile
    such a run ends in torch's traceback, not in our error
torch._inductor standalone_compile
    compiles a recorded block in another process than the one that computes
    the server's decode step is never compiled
torch._inductor CompiledArtifact
    is that code, which the server's process loads
    the server's decode step is never compiled
torch._dynamo.OptimizedModule _orig_mod
    is where torch.compile(model) holds the model
    adapters of a compiled model are not found
# torch: modules
torch.nn.Module _compiled_call_impl
    is what module.compile() sets, and what compiled training sets block by block
    compiled training; a bank on a compiled model does not check its rows
torch.nn.Module _call_impl
    calls a module with its hooks past its compiled code
    compiled training
# torch: tensors and operations
torch.Tensor _version
    counts writes in place: what was computed from a tensor is kept until it changes
    stale hashes, norms, A·x and prepared batches, or none that are kept
torch.Tensor _is_view
    autograd copies whole gradients where a view is written in place
    the fused update writes into views: slow, or an error of autograd
torch.UntypedStorage _cdata
    names a tensor's memory while it lives; addresses of empty tensors are all 0
    activation checkpointing cannot tell which result was written into
torch._ops.OpOverload _schema
    says which arguments an operation writes, and where dropout_p is
    activation checkpointing with memory: balanced and low
torch.utils._python_dispatch TorchDispatchMode
    sees each operation of a block, to keep its result or to give the kept one back
    activation checkpointing with memory: balanced and low
torch.utils._pytree tree_flatten
    finds the tensors in what a block is given
    the server's decode step is never compiled
torch.utils._pytree tree_unflatten
    gives a block's output its form back
    the server's decode step is never compiled
torch.utils._pytree tree_leaves
    finds the tensors in what an operation returns
    activation checkpointing with memory: balanced and low
torch.utils._pytree tree_map
    moves the tensors in what an operation returns
    activation checkpointing with memory: balanced and low
torch.ops.aten _unsafe_view
    gives a matmul its shape without a view, so that adapters may write into it
    quantised layers get one more copy of each output
torch.ops.aten _softmax_backward_data
    softmax's gradient in one pass; torch has it in no public function
    attention within packed sequences has no gradients
torch.ops.aten _scaled_dot_product_flash_attention
    is attention as one kernel, worth keeping by memory: balanced
    memory: balanced computes attention twice
torch.ops.aten _scaled_dot_product_flash_attention_for_cpu
    is attention as one kernel, worth keeping by memory: balanced
    memory: balanced computes attention twice
torch.ops.aten _scaled_dot_product_flash_attention_for_cpu_backward
    is the gradient of that kernel, whose FLOPs an estimate counts
    estimates of long rows on CPUs have too few FLOPs
torch.ops.aten _grouped_mm
    is the matmul of experts, whose FLOPs an estimate counts
    estimates of models with experts have too few FLOPs
torch.ops.aten _scaled_dot_product_efficient_attention
    is attention as one kernel, worth keeping by memory: balanced
    memory: balanced computes attention twice
torch.ops.aten _scaled_dot_product_cudnn_attention
    is attention as one kernel, worth keeping by memory: balanced
    memory: balanced computes attention twice
torch.ops.mkldnn _linear_pointwise
    is oneDNN's matmul for float32, on some processors faster for few rows than torch's own
    answers and served steps on such processors are slower
torch.nn.Module _parameters
    holds a module's own parameters, also where an adapter's value is read instead
    the walk over the base, in all rooms
torch.nn.Module _modules
    holds a module's children: banks of adapters are passed by, not searched
    the walk over the base, in all rooms
torch.nn.Module _buffers
    tells a norm with nothing but a weight
    memory-efficient norms
torch.nn.Module _forward_pre_hooks
    tells whether a hook is there already, and that a module must be called
    memory-efficient MLPs; a bank on a compiled model checks rows twice
torch.nn.Module _forward_hooks
    tells that a module must be called, since a hook waits for it
    memory-efficient MLPs
torch.nn.Module _backward_hooks
    tells that a module must be called, since a hook waits for it
    memory-efficient MLPs
torch.nn.Module _apply
    is overridden: quantisation scales move with their weight
    a quantised model that is moved has its scales on the old device
torch.nn.Conv2d _conv_forward
    convolves with A in place of the weight, padding modes included
    LoRA of convolutions
torch.nn.modules.batchnorm _BatchNorm
    is all batch norms, whose running statistics no adapter holds
    full training of such a model would lose them without an error
torch.nn.modules.linear NonDynamicallyQuantizableLinear
    is MultiheadAttention's output projection, whose weight is read without a call
    LoRA would adapt a layer that is never called
# transformers
transformers.PreTrainedConfig _name_or_path
    is the folder or the hub id that a model was loaded from
    records name no base; unmerging finds no file with the original weights
transformers.PreTrainedConfig _attn_implementation_internal
    names a layer's attention function; the public setter changes inner configs too
    packing: rows of several sequences cannot be kept apart
transformers.PreTrainedModel _supports_attention_backend
    tells that a model looks its attention function up
    packing is off for all models
transformers.PreTrainedModel _supports_flash_attn
    tells that a model passes attention all settings by keyword
    packing is off for all models
transformers.PreTrainedModel _init_weights
    draws a task's fresh head anew for each seed
    runs of a sweep with other seeds start from one head
transformers.PreTrainedModel _keep_in_fp32_modules
    names what must not be quantised
    quantised T5 and the like answer wrongly
transformers.modeling_layers.GradientCheckpointingLayer _gradient_checkpointing_func
    is where a block's checkpointing can be replaced by ours
    gradient checkpointing: no routes, no memory settings
transformers.Trainer _get_train_sampler
    is overridden: rows of like length share a batch
    batches of any lengths: slower
transformers.Trainer _get_num_items_in_batch
    is overridden: rows of a classification or regression are counted, whatever their labels
    a number to predict that is -100 is not counted: the loss is too large
transformers.Trainer _get_output_dir
    is overridden: a checkpoint is written aside until it is complete
    a killed run may leave half a checkpoint
transformers.Trainer _save_checkpoint
    is overridden: a complete checkpoint is put in place at once
    a killed run may leave half a checkpoint
transformers.Trainer _save
    is overridden: a checkpoint holds the adapter, not the model
    checkpoints hold the whole model
transformers.Trainer _load_from_checkpoint
    is overridden: a resumed run reads the adapter
    no run can be resumed
# accelerate
accelerate.hooks.ModelHook _old_forward
    is what accelerate's hook on a layer calls, once inputs and weights are where it computes
    adapters of layers whose weights are offloaded cannot read them
accelerate.hooks.ModelHook _hf_hook
    says where a layer computes whose weights are offloaded
    A and B of such layers have no values
accelerate.state.GradientState _set_sync_gradients
    the trainers of a joint sweep share this state and take turns
    gradient accumulation in a joint sweep steps at wrong times
"""
"""Owner and name; below them why the name is needed, and what breaks without it."""


def _entries(table: str) -> Iterator[PrivateName]:
    lines = (line.strip() for line in table.splitlines() if line and not line.startswith("#"))
    for names, why, breaks in zip(lines, lines, lines, strict=True):
        owner, name = names.split()
        yield PrivateName(owner, name, why, breaks)


PRIVATE = tuple(_entries(_TABLE))
"""Every private name that lorakit needs."""
