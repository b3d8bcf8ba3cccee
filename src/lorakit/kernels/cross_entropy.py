"""Cross-entropy behind an output head, chunk by chunk: logits never exist for all tokens at once.

After the loss of a chunk only the gradient of its logits is needed, so the forward pass computes
that too, writes it over the logits and multiplies it by the head's weight. What is kept for the
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

from lorakit.kernels import liger
from lorakit.kernels.choice import KernelChoice
from lorakit.kernels.logit_transform import IDENTITY, LogitTransform
from lorakit.kernels.stand_in import kind_of_device

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
"""Size of a chunk's logits, by the kind of device. Each chunk reads the head's weight twice, and a
GPU needs more tokens than a CPU to be busy meanwhile."""

_BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 512 * 2**20}
"""Size of a block of logits in the loss's precision, by the kind of device. On a CPU it stays in a
core's cache between two passes; a GPU takes a chunk as a whole."""

PerToken = float | Float[Tensor, "*tokens"]
"""One value for all tokens, or one for each."""


@dataclass(frozen=True, kw_only=True)
class TokenTargets:
    """What tokens are to predict, and how that counts. All tensors have one shape."""

    targets: Int[Tensor, "*tokens"]
    """The token to predict; a negative number: none."""
    weights: Float[Tensor, "*tokens"]
    """The factor on each token's loss, in the loss's precision."""
    label_smoothing: PerToken
    """Share of the target probability that is spread over all tokens."""
    z_loss: PerToken
    """Factor on the square of log Σ exp(x)."""

    @property
    def is_uniform(self) -> bool:
        """Whether label smoothing and z-loss are the same for all tokens."""
        return not (isinstance(self.label_smoothing, Tensor) or isinstance(self.z_loss, Tensor))

    def part(self, tokens: slice) -> TokenTargets:
        """The part for some tokens of each row, (tokens,)."""

        def cut(values: Any) -> Any:
            return values[..., tokens].flatten() if isinstance(values, Tensor) else values

        return TokenTargets(
            targets=cut(self.targets),
            weights=cut(self.weights),
            label_smoothing=cut(self.label_smoothing),
            z_loss=cut(self.z_loss),
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
    kernels: KernelChoice = "auto",
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
        change: what turns the head's output into the logits x.
        chunk_tokens: tokens whose logits exist at once, of all rows together; at least one of each
            row. None: as many as `CHUNK_BYTES` has room for.
        kernels: what computes losses from logits. auto: liger where it can, else plain torch.
    """
    with torch.no_grad():
        # An empty input tells width and precision, whatever the head is.
        logits = head(hidden[..., :0, :])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weights = weights.to(dtype)
    chunked = _ChunkedLoss(
        head=head,
        targets=TokenTargets(
            targets=targets,
            weights=weights,
            label_smoothing=_like(weights, label_smoothing),
            z_loss=_like(weights, z_loss),
        ),
        chunk_tokens=_chunk_tokens(logits, targets, chunk_tokens),
        dtype=dtype,
        transform=change,
        kernels=kernels,
    )
    trained = [p for p in head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        return _HeadCrossEntropy.apply(chunked, hidden, *trained)
    return chunked.run(hidden, None)


def _like(losses: Tensor, value: PerToken) -> PerToken:
    """A setting of the loss as one number, or in the form of the losses."""
    return value.to(losses).expand(losses.shape) if isinstance(value, Tensor) else float(value)


def _chunk_tokens(logits: Tensor, targets: Tensor, chunk_tokens: int | None) -> int:
    """The number of tokens of each row in a chunk."""
    if chunk_tokens is None:
        room = CHUNK_BYTES.get(kind_of_device(logits), CHUNK_BYTES["cpu"])
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
class _ChunkedLoss:
    """The loss behind a head, computed for one chunk of tokens after the other."""

    head: nn.Module
    targets: TokenTargets
    chunk_tokens: int
    """Tokens of each row in a chunk."""
    dtype: torch.dtype
    """The loss's precision."""
    transform: LogitTransform
    """What turns the head's output into logits."""
    kernels: KernelChoice

    def run(self, hidden: Tensor, gradients: _Gradients | None) -> tuple[Tensor, Tensor]:
        """The sum and each token's loss; add to the gradients, where some are wanted."""
        losses = torch.zeros(hidden.shape[:-1], dtype=self.dtype, device=hidden.device)
        for start in range(0, hidden.shape[-2], self.chunk_tokens):
            tokens = slice(start, min(start + self.chunk_tokens, hidden.shape[-2]))
            # In one piece: else torch copies a frozen head's weight once per row.
            chunk, part = hidden[..., tokens, :].contiguous(), self.targets.part(tokens)
            if gradients is None:
                logits = self.head(chunk).flatten(0, -2)
                of_chunk = self._losses(logits, part)
            else:
                differentiate = self._by_hand if self._is_frozen_linear() else self._by_autograd
                of_chunk, found = differentiate(chunk, part, gradients)
                gradients.add(tokens, found)
            losses[..., tokens] = of_chunk.view(chunk.shape[:-1])
        return (self.targets.weights * losses).sum(), losses

    def _losses(
        self, output: Tensor, targets: TokenTargets, gradient: Tensor | None = None
    ) -> Tensor:
        return token_losses(
            output, targets, transform=self.transform, gradient=gradient, kernels=self.kernels
        )

    def _is_frozen_linear(self) -> bool:
        """Whether the head is W·x + b of a frozen W and b."""
        # accelerate gives an object a forward of its own where weights move between devices.
        own_forward = "forward" in vars(self.head)
        frozen = not any(p.requires_grad for p in self.head.parameters())
        return type(self.head) is nn.Linear and frozen and not own_forward

    def _by_hand(
        self, chunk: Tensor, targets: TokenTargets, gradients: _Gradients
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Losses and gradients of a frozen linear head; the gradients overwrite the logits."""
        assert isinstance(self.head, nn.Linear)
        x = chunk.flatten(0, -2)
        logits = F.linear(x, self.head.weight, self.head.bias)
        losses = self._losses(logits, targets, gradient=logits)
        return losses, [(logits @ self.head.weight).view(chunk.shape)]

    def _by_autograd(
        self, chunk: Tensor, targets: TokenTargets, gradients: _Gradients
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Losses and gradients of any head, through autograd's graph of one chunk."""
        leaf = chunk.detach().requires_grad_(gradients.hidden is not None)
        with torch.enable_grad():
            logits = self.head(leaf)
        # Not over the logits: a head may have kept them for its backward pass.
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        losses = self._losses(
            logits.detach().flatten(0, -2), targets, gradient.view(-1, gradient.shape[-1])
        )
        wanted = [leaf] * (gradients.hidden is not None) + list(gradients.trained)
        if not logits.requires_grad:
            return losses, [None] * len(wanted)
        return losses, torch.autograd.grad(logits, wanted, gradient, allow_unused=True)


class _HeadCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, chunked: _ChunkedLoss, hidden: Tensor, *trained: nn.Parameter
    ) -> tuple[Tensor, Tensor]:
        gradients = _Gradients(hidden, trained, of_hidden=ctx.needs_input_grad[1])
        total, losses = chunked.run(hidden, gradients)
        ctx.save_for_backward(*gradients.finished())
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        found = (kept if kept is None else kept * of_total for kept in ctx.saved_tensors)
        return None, *found


def token_losses(
    output: Float[Tensor, "tokens vocabulary"],
    targets: TokenTargets,
    *,
    transform: LogitTransform = IDENTITY,
    gradient: Float[Tensor, "tokens vocabulary"] | None = None,
    kernels: KernelChoice = "auto",
) -> Float[Tensor, " tokens"]:
    """Each token's loss; the gradient of Σ weight·loss with regard to the output is written.

    Args:
        output: of the head, for the tokens.
        targets: of the tokens, (tokens,).
        transform: what turns the output into logits.
        gradient: where to write it, which may be over the output; None: nowhere.
        kernels: see `head_cross_entropy`.
    """
    losses = torch.empty_like(targets.weights)
    for rows in _blocks(output, losses.element_size()):
        part = targets.part(rows)
        block = output[rows].to(losses.dtype, copy=True)
        in_liger = kernels == "auto" and part.is_uniform and liger.is_usable(block)
        compute = _losses_in_liger if in_liger else _losses_in_torch
        losses[rows], found = compute(block, part, transform, wants_gradient=gradient is not None)
        if gradient is not None and found is not None:
            gradient[rows] = found
    return losses


def _losses_in_liger(
    x: Tensor, targets: TokenTargets, transform: LogitTransform, *, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The same as `_losses_in_torch` by liger's kernel, which knows no scale."""
    losses, gradient = liger.token_losses(
        x.mul_(transform.scale) if transform.scale != 1 else x,
        targets.targets,
        targets.weights,
        label_smoothing=float(targets.label_smoothing),
        z_loss=float(targets.z_loss),
        cap=transform.cap,
        wants_gradient=wants_gradient,
    )
    if gradient is not None and transform.scale != 1:
        gradient.mul_(transform.scale)
    return losses, gradient


def _blocks(output: Tensor, element_size: int) -> Iterator[slice]:
    """Yield groups of rows that have `_BLOCK_BYTES` in the loss's precision."""
    room = _BLOCK_BYTES.get(kind_of_device(output), _BLOCK_BYTES["cpu"])
    size = max(1, room // (element_size * output.shape[1]))
    for start in range(0, output.shape[0], size):
        yield slice(start, min(start + size, output.shape[0]))


def _losses_in_torch(
    x: Tensor, targets: TokenTargets, transform: LogitTransform, *, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses and gradient for an output in the loss's precision, which is overwritten."""
    transform.apply_(x)
    # Now, since nothing is left of the logits when their gradient is there.
    derivative = transform.derivative(x) if wants_gradient else 1.0
    smoothing, z = (_column(value, x) for value in (targets.label_smoothing, targets.z_loss))
    target = targets.targets.clamp(min=0)[:, None]
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
    none = targets.targets < 0
    if wants_gradient:
        weight = targets.weights[:, None]
        x.mul_(weight * slope / total)
        if smoothing is not None:
            x.sub_(weight * smoothing / x.shape[-1])
        x.scatter_add_(-1, target, -weight * share)
        if not transform.is_none:
            x.mul_(derivative)
        x.masked_fill_(none[:, None], 0.0)
    return loss[:, 0].masked_fill(none, 0.0), x if wants_gradient else None


def _column(value: PerToken, x: Tensor) -> Tensor | None:
    """A value of tokens as a column beside their logits; None for a 0."""
    if isinstance(value, Tensor):
        return value[:, None]
    return torch.tensor([[value]], dtype=x.dtype, device=x.device) if value else None
