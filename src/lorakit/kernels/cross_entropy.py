"""Cross-entropy behind an output head, chunk by chunk: logits never exist for all tokens at once.

Of a chunk's logits nothing is needed after its loss but its gradient, so that is computed at once,
in the forward pass, over the logits, and multiplied back through the head. What waits for the
backward pass is no larger than the hidden states and the head's trained parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorakit.kernels.grouping import Kernels, choose_kernels
from lorakit.kernels.logit_transform import IDENTITY, LogitTransform

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
"""Size of a chunk's logits, by the kind of device. Each chunk reads the head's weight twice, and a
GPU needs more tokens than a CPU to be busy meanwhile."""

_BLOCK_BYTES = 2 * 2**20  # Logits in float32 that stay in a core's cache between two passes.

PerToken = float | Float[Tensor, "*tokens"]
"""One value for all tokens, or one for each."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of each token. All tensors have one shape, and the loss's precision."""

    targets: Int[Tensor, "*tokens"]
    weights: Float[Tensor, "*tokens"]
    label_smoothing: Float[Tensor, "*tokens"] | None
    z_loss: Float[Tensor, "*tokens"] | None

    def part(self, tokens: slice) -> Asked:
        """The part for some tokens of each row, (tokens,)."""

        def cut(values: Tensor) -> Tensor:
            return values[..., tokens].flatten()

        return Asked(
            targets=cut(self.targets),
            weights=cut(self.weights),
            label_smoothing=None if self.label_smoothing is None else cut(self.label_smoothing),
            z_loss=None if self.z_loss is None else cut(self.z_loss),
        )


def head_cross_entropy(
    hidden: Float[Tensor, "*rows tokens d"],
    head: nn.Module,
    targets: Int[Tensor, "*rows tokens"],
    weights: Float[Tensor, "*rows tokens"],
    *,
    label_smoothing: PerToken = 0.0,
    z_loss: PerToken = 0.0,
    change: LogitTransform = IDENTITY,
    chunk_tokens: int | None = None,
    kernels: Kernels = "auto",
) -> tuple[Float[Tensor, ""], Float[Tensor, "*rows tokens"]]:
    """Σ weight·loss, and each token's loss, without its weight and without a gradient.

    With logits x, label smoothing ε and z-loss z (nats):

        loss = log Σ exp(x) − (1−ε)·x[target] − ε·mean(x) + z·(log Σ exp(x))²

    The sum can be differentiated once with regard to `hidden` and the head's parameters; a second
    time is an error. The loss is computed in float32, in float64 for logits of that precision.

    Args:
        hidden: what the head reads. Rows are for heads that treat each row in its own way: a chunk
            has the same tokens of all rows.
        head: its output head, which works on each token by itself. `nn.Identity()`: `hidden` are
            the logits.
        targets: the token to predict; a negative number: none, so loss and gradient are 0.
        weights: the factor on each token's loss.
        label_smoothing: share of the target probability that is spread over all tokens.
        z_loss: factor on the square of log Σ exp(x), which keeps it near 0 (PaLM, Chowdhery et al.
            2022, section 5).
        change: what makes the logits x of the head's answer.
        chunk_tokens: tokens whose logits exist at once, of all rows together; at least one of each
            row. None: as many as `CHUNK_BYTES` has room for.
        kernels: what computes losses from logits. auto: Triton where it can, else plain torch.
    """
    with torch.no_grad():
        # An empty input tells width and precision, whatever the head is.
        logits = head(hidden[..., :0, :])
    dtype = torch.promote_types(logits.dtype, torch.float32)

    def spread(value: PerToken) -> Tensor | None:
        if isinstance(value, float | int) and value == 0:
            return None
        return torch.as_tensor(value, dtype=dtype, device=logits.device).expand(targets.shape)

    work = _Work(
        head=head,
        asked=Asked(
            targets=targets,
            weights=weights.to(dtype),
            label_smoothing=spread(label_smoothing),
            z_loss=spread(z_loss),
        ),
        step=_step(logits, targets, chunk_tokens),
        dtype=dtype,
        change=change,
        kernels=kernels,
    )
    trained = [p for p in head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        return _HeadCrossEntropy.apply(work, hidden, *trained)
    return work.run(hidden, None)


def _step(logits: Tensor, targets: Tensor, chunk_tokens: int | None) -> int:
    """Return how many tokens of each row make a chunk."""
    if chunk_tokens is None:
        room = CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["cpu"])
        chunk_tokens = room // (logits.shape[-1] * logits.element_size())
    return max(1, chunk_tokens // max(1, targets.shape[:-1].numel()))


class _Gradients:
    """Gradients with regard to the hidden states and the head's parameters, as chunks add them."""

    def __init__(self, hidden: Tensor, trained: Sequence[nn.Parameter], *, of_hidden: bool) -> None:
        self.hidden = torch.empty_like(hidden) if of_hidden else None
        self.trained = tuple(trained)
        self._sums: list[Tensor | None] = [None] * len(trained)

    def add(self, tokens: slice, found: Sequence[Tensor | None]) -> None:
        """Take over a chunk's gradients: of its hidden states, if wanted, and of the parameters."""
        of_trained = found
        if self.hidden is not None:
            of_hidden, *of_trained = found
            self.hidden[..., tokens, :] = 0.0 if of_hidden is None else of_hidden
        for at, new in enumerate(of_trained):
            if new is not None:
                # In half precision a long sum would lose its small terms.
                wide = new.to(torch.promote_types(new.dtype, torch.float32))
                old = self._sums[at]
                self._sums[at] = wide if old is None else old.add_(wide)

    def finished(self) -> list[Tensor | None]:
        """The gradients, each in the precision of its tensor; None: there is none."""
        pairs = zip(self._sums, self.trained, strict=True)
        return [self.hidden, *(s if s is None else s.to(p.dtype) for s, p in pairs)]


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A head, what is asked of its tokens, and how much of that is done at once."""

    head: nn.Module
    asked: Asked
    step: int
    """Tokens of each row in a chunk."""
    dtype: torch.dtype
    """The loss's precision."""
    change: LogitTransform
    """What makes logits of the head's answer."""
    kernels: Kernels

    def run(self, hidden: Tensor, gradients: _Gradients | None) -> tuple[Tensor, Tensor]:
        """The sum and each token's loss; add to the gradients, where some are wanted."""
        losses = torch.zeros(hidden.shape[:-1], dtype=self.dtype, device=hidden.device)
        for start in range(0, hidden.shape[-2], self.step):
            tokens = slice(start, min(start + self.step, hidden.shape[-2]))
            # In one piece: else torch copies a frozen head's weight once per row.
            chunk, asked = hidden[..., tokens, :].contiguous(), self.asked.part(tokens)
            if gradients is None:
                logits = self.head(chunk).flatten(0, -2)
                of_chunk = self._losses(logits, asked)
            else:
                differentiate = self._by_hand if self._is_plain() else self._by_autograd
                of_chunk, found = differentiate(chunk, asked, gradients)
                gradients.add(tokens, found)
            losses[..., tokens] = of_chunk.view(chunk.shape[:-1])
        return (self.asked.weights * losses).sum(), losses

    def _losses(self, answer: Tensor, asked: Asked, gradient: Tensor | None = None) -> Tensor:
        return token_losses(
            answer, asked, change=self.change, gradient=gradient, kernels=self.kernels
        )

    def _is_plain(self) -> bool:
        """Whether the head is W·x + b with nothing to train."""
        # accelerate gives an object a forward of its own where weights move between devices.
        own_forward = "forward" in vars(self.head)
        frozen = not any(p.requires_grad for p in self.head.parameters())
        return type(self.head) is nn.Linear and frozen and not own_forward

    def _by_hand(
        self, chunk: Tensor, asked: Asked, gradients: _Gradients
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Return losses and gradients of a frozen linear head; they overwrite the logits."""
        assert isinstance(self.head, nn.Linear)
        x = chunk.flatten(0, -2)
        logits = F.linear(x, self.head.weight, self.head.bias)
        losses = self._losses(logits, asked, gradient=logits)
        return losses, [(logits @ self.head.weight).view(chunk.shape)]

    def _by_autograd(
        self, chunk: Tensor, asked: Asked, gradients: _Gradients
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Return losses and gradients of any head, through the graph of one chunk."""
        leaf = chunk.detach().requires_grad_(gradients.hidden is not None)
        with torch.enable_grad():
            logits = self.head(leaf)
        # Not over the logits: a head may have kept them for its backward pass.
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        losses = self._losses(
            logits.detach().flatten(0, -2), asked, gradient.view(-1, gradient.shape[-1])
        )
        wanted = [leaf] * (gradients.hidden is not None) + list(gradients.trained)
        if not logits.requires_grad:
            return losses, [None] * len(wanted)
        return losses, torch.autograd.grad(logits, wanted, gradient, allow_unused=True)


class _HeadCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, work: _Work, hidden: Tensor, *trained: nn.Parameter
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(hidden, trained, of_hidden=ctx.needs_input_grad[1])
        total, losses = work.run(hidden, gradients)
        ctx.save_for_backward(*gradients.finished())
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        found = (kept if kept is None else kept * of_total for kept in ctx.saved_tensors)
        return None, *found


def token_losses(
    answer: Float[Tensor, "tokens vocabulary"],
    asked: Asked,
    *,
    change: LogitTransform = IDENTITY,
    gradient: Float[Tensor, "tokens vocabulary"] | None = None,
    kernels: Kernels = "auto",
) -> Float[Tensor, " tokens"]:
    """Each token's loss, and write the gradient of Σ weight·loss with regard to the answer.

    Args:
        answer: the head's, for the tokens.
        asked: of the tokens, (tokens,).
        change: what makes logits of the answer.
        gradient: where to write it, which may be over the answer; None: nowhere.
        kernels: see `head_cross_entropy`.
    """
    if choose_kernels(kernels, answer.device, answer.dtype) == "triton":
        from lorakit.kernels import cross_entropy_triton

        return cross_entropy_triton.token_losses(
            answer,
            gradient,
            targets=asked.targets,
            weights=asked.weights,
            label_smoothing=asked.label_smoothing,
            z_loss=asked.z_loss,
            change=change,
        )
    losses = torch.empty_like(asked.weights)
    for rows in _blocks(answer):
        part = asked.part(rows)
        block = answer[rows].to(losses.dtype, copy=True)
        losses[rows] = _losses_of_block(block, part, change, wants_gradient=gradient is not None)
        if gradient is not None:
            gradient[rows] = block
    return losses


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Yield groups of rows that are small enough for several passes over them in a cache."""
    size = max(1, _BLOCK_BYTES // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], size):
        yield slice(start, min(start + size, logits.shape[0]))


def _losses_of_block(
    x: Tensor, asked: Asked, change: LogitTransform, *, wants_gradient: bool
) -> Tensor:
    """Return losses for an answer in the loss's precision; the gradient takes its place."""
    change.apply_(x)
    # Now, since nothing is left of the logits when their gradient is there.
    derivative = change.derivative(x) if wants_gradient else 1.0
    smoothing, z = (
        None if v is None else v[:, None] for v in (asked.label_smoothing, asked.z_loss)
    )
    target = asked.targets.clamp(min=0)[:, None]
    top = x.amax(-1, keepdim=True)
    # Relative to the largest: a loss near 0 is not the difference of two large numbers.
    chosen = x.sub_(top).gather(-1, target)
    mean = None if smoothing is None else x.mean(-1, keepdim=True)
    total = x.exp_().sum(-1, keepdim=True)
    log_total = total.log()
    share: float | Tensor = 1.0 if smoothing is None else 1 - smoothing
    loss = log_total - share * chosen
    slope: float | Tensor = 1.0
    if smoothing is not None and mean is not None:
        loss = loss - smoothing * mean
    if z is not None:
        loss = loss + z * (top + log_total).square()
        slope = 1 + 2 * z * (top + log_total)
    none = asked.targets < 0
    if wants_gradient:
        weight = asked.weights[:, None]
        x.mul_(weight * slope / total)
        if smoothing is not None:
            x.sub_(weight * smoothing / x.shape[-1])
        x.scatter_add_(-1, target, -weight * share)
        if not change.is_none:
            x.mul_(derivative)
        x[none] = 0.0
    return loss[:, 0].masked_fill(none, 0.0)
