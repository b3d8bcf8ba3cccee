"""Losses of a chunk of logits in Triton, with the gradient written over them: one program a token.

A program reads its row twice: for the sum of exponents, kept relative to the largest logit so far
(online softmax, Milakov and Gimelshein 2018), and for the gradient. `lorakit.kernels.cross_entropy`
calls this module; importing it imports Triton.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from lorakit.kernels.logit_transform import IDENTITY, LogitTransform
from lorakit.kernels.tuning_triton import autotuned, is_many

# No shape checks (`no_type_check`), because Triton reads the kernel's source.


@triton.jit
@no_type_check
def _tanh(x):
    size = tl.abs(x)
    # exp of a negative number alone cannot overflow.
    small = tl.exp(-2.0 * size)
    quotient = (1.0 - small) / (1.0 + small)
    # Near 0 the difference above loses its digits: the series up to x⁷.
    near = tl.minimum(size, 0.1)
    square = near * near
    series = near * (1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    result = tl.where(size < 0.1, series, quotient)
    return tl.where(x < 0, -result, result)


@triton.jit
@no_type_check
def _changed(x, SCALE: tl.constexpr, CAP: tl.constexpr):
    """The logit that the head's answer x becomes; CAP 0: none."""
    if CAP == 0:
        return x * SCALE
    return CAP * _tanh(x * SCALE / CAP)


@triton.jit
@no_type_check
def _through_change(slant, y, SCALE: tl.constexpr, CAP: tl.constexpr):
    """The gradient of the head's answer, from that of its logit y."""
    if CAP == 0:
        return slant * SCALE
    share = y / CAP
    return slant * SCALE * (1.0 - share * share)


@autotuned(
    [
        triton.Config({"BLOCK": block}, num_warps=warps)
        for block, warps in ((4096, 8), (2048, 8), (4096, 16), (8192, 16))
    ],
    key=["vocabulary", "WANTS_GRADIENT"],
    # It may be the head's answer itself.
    overwrites=["gradient"],
)
@triton.jit
@no_type_check
def _cross_entropy(
    answer,
    gradient,
    losses,
    targets,
    weights,
    smoothings,
    z_losses,
    vocabulary,
    answer_token,
    gradient_token,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    SMOOTHS: tl.constexpr,
    HAS_Z: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """losses[token] = loss of answer[token]; gradient[token] = weight · its derivative."""
    token = tl.program_id(0).to(tl.int64)
    row = answer + token * answer_token
    target = tl.load(targets + token)
    # Before the loop, whose sums make all threads wait: later some may have written over it.
    chosen = _changed(tl.load(row + tl.maximum(target, 0)).to(tl.float32), SCALE, CAP)
    top = -3.4028234663852886e38
    total = 0.0
    plain_sum = 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        x = _changed(tl.load(row + column, mask=inside, other=0.0).to(tl.float32), SCALE, CAP)
        x = tl.where(inside, x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), 0)
        top = new_top
        if SMOOTHS:
            plain_sum += tl.sum(tl.where(inside, x, 0.0), 0)
    log_total = tl.log(total)
    share = 1.0
    slope = 1.0
    smoothing = 0.0
    loss = log_total
    if SMOOTHS:
        smoothing = tl.load(smoothings + token)
        share = 1.0 - smoothing
        loss -= smoothing * (plain_sum / vocabulary - top)
    if HAS_Z:
        z = tl.load(z_losses + token)
        normalizer = top + log_total
        loss += z * normalizer * normalizer
        slope = 1.0 + 2.0 * z * normalizer
    loss -= share * (chosen - top)
    tl.store(losses + token, tl.where(target >= 0, loss, 0.0))
    if WANTS_GRADIENT:
        weight = tl.load(weights + token)
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocabulary
            x = _changed(tl.load(row + column, mask=inside, other=0.0).to(tl.float32), SCALE, CAP)
            wanted = tl.where(column == target, share, 0.0) + smoothing / vocabulary
            slant = weight * (tl.exp(x - top) * (slope / total) - wanted)
            slant = _through_change(slant, x, SCALE, CAP)
            slant = tl.where(target >= 0, slant, 0.0)
            place = gradient + token * gradient_token + column
            tl.store(place, slant.to(gradient.dtype.element_ty), mask=inside)


def token_losses(
    answer: Float[Tensor, "tokens vocabulary"],
    gradient: Float[Tensor, "tokens vocabulary"] | None,
    *,
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    label_smoothing: Float[Tensor, " tokens"] | None,
    z_loss: Float[Tensor, " tokens"] | None,
    change: LogitTransform = IDENTITY,
) -> Float[Tensor, " tokens"]:
    """Each token's loss in float32; see `lorakit.kernels.cross_entropy.token_losses`.

    Args:
        answer: the head's, of at most 32 bits.
        gradient: where to write it, which may be over the answer; None: nowhere.
        targets: a negative number: none.
        weights: the factor on each token's loss, which only the gradient has in it.
        label_smoothing: None: none.
        z_loss: None: none.
        change: what makes logits of the answer.
    """
    tokens, vocabulary = answer.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=answer.device)
    if not tokens:
        return losses
    answer = answer if answer.stride(1) == 1 else answer.contiguous()
    with torch.cuda.device_of(answer):
        _cross_entropy[(tokens,)](
            answer,
            answer if gradient is None else gradient,
            losses,
            targets.contiguous(),
            weights.contiguous(),
            losses if label_smoothing is None else label_smoothing.contiguous(),
            losses if z_loss is None else z_loss.contiguous(),
            vocabulary,
            answer.stride(0),
            answer.stride(0) if gradient is None else gradient.stride(0),
            SCALE=change.scale,
            CAP=change.cap or 0.0,
            SMOOTHS=label_smoothing is not None,
            HAS_Z=z_loss is not None,
            WANTS_GRADIENT=gradient is not None,
            MANY=is_many(answer),
        )
    return losses
