"""How one request's tokens are chosen from the model's logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lorakit.serving.grammars import Matcher

LEAST_TEMPERATURE = 1e-30
"""Less than this is computed as this: its reciprocal, which GPUs take, would be infinite."""
LEAST_LOGPROB = -9999.0
"""Less than this is told as this, as by vLLM: a logit may be minus infinity, which JSON has not."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; the defaults are those of OpenAI's API, but for the temperature."""

    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this probability together."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0: from all."""
    min_p: float = 0.0
    """Draw from tokens that have at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """The logits of tokens that the prompt or the answer has are divided by it, or multiplied where
    they are negative."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Taken off the logits of the answer's tokens as often as it has them."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: int | None = None
    """Of the generator; None: one that nobody knows."""
    alternatives: int | None = None
    """How many of the likeliest tokens are reported beside each; None: not even its own
    log-probability."""


@dataclass(frozen=True)
class Token:
    """A token of an answer, with log-probabilities where they were asked for."""

    id: int
    logprob: float | None = None
    """Of the model itself, before temperature and penalties."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place and their log-probabilities, the likeliest first."""
    ranks: tuple[int, ...] = ()
    """Of the token and of these, where they were asked for: 1 more than there are tokens with a
    larger logit."""


class Sampler:
    """Chooses the tokens of one answer, one after the other.

    What it draws depends on its own generator and on the row's logits alone: neither on the other
    rows of the batch nor on the slot. Each token takes one number of the generator, from which all
    tokens of the vocabulary get noise: the one whose logit and noise are the largest together is
    drawn with its probability (Gumbel's method). A batch of another size adds in another order,
    which moves logits by some millionths; that decides only between tokens as near as that, while a
    place in the sum of all probabilities would move past small ones.

    Args:
        sampling: how.
        prompt: the token ids before the answer.
        grammar: what the answer must be; None: anything.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], grammar: Matcher | None = None
    ) -> None:
        self._how, self._grammar = sampling, grammar
        self._prompt = torch.tensor(sorted(set(prompt)), dtype=torch.long)
        self._written: Counter[int] = Counter()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**63)

    @property
    def is_plain(self) -> bool:
        """Whether it takes the likeliest token and reports nothing of it."""
        how = self._how
        changes = self._changes_logits or self._grammar is not None
        return how.temperature == 0 and how.alternatives is None and not changes

    @property
    def is_over(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self._grammar is not None and self._grammar.is_over

    @property
    def _changes_logits(self) -> bool:
        how = self._how
        penalties = how.presence_penalty or how.frequency_penalty
        return bool(how.repetition_penalty != 1 or penalties or how.logit_bias)

    def choose(self, logits: Tensor) -> Token:
        """The next token.

        Args:
            logits: of the model for this row (vocabulary), in any precision.

        Raises:
            GrammarError: the grammar was too much for its library.
        """
        logits = logits.float()
        changed = self._penalised(logits) if self._changes_logits else logits
        if self._grammar is not None:
            barred = ~self._grammar.allowed().to(logits.device)
            changed = changed.masked_fill(barred, float("-inf"))
        greedy = self._how.temperature == 0
        return self.chosen(logits, int(changed.argmax()) if greedy else self._drawn(changed))

    def chosen(self, logits: Tensor, token: int) -> Token:
        """Count a token as the next one, with the log-probabilities that are asked for."""
        self._written[token] += 1
        if self._grammar is not None:
            self._grammar.take(token)
        return reported(logits, token, self._how.alternatives)

    def _penalised(self, logits: Tensor) -> Tensor:
        how, logits = self._how, logits.clone()
        written = torch.tensor(list(self._written), dtype=torch.long, device=logits.device)
        if how.repetition_penalty != 1:
            seen = torch.cat([self._prompt.to(logits.device), written]).unique()
            own = logits[seen]
            factor = how.repetition_penalty
            logits[seen] = torch.where(own > 0, own / factor, own * factor)
        if self._written and (how.presence_penalty or how.frequency_penalty):
            counts = torch.tensor(list(self._written.values()), device=logits.device)
            logits[written] -= how.presence_penalty + how.frequency_penalty * counts
        for token, bias in how.logit_bias.items():
            logits[token] += bias
        return logits

    def _drawn(self, logits: Tensor) -> int:
        how = self._how
        # Below the largest logit, and in float64, so that no temperature makes it infinite.
        below = (logits - logits.max()).double()
        probabilities = (below / max(how.temperature, LEAST_TEMPERATURE)).softmax(-1)
        if how.min_p > 0:
            probabilities[probabilities < how.min_p * probabilities.max()] = 0
        if 0 < how.top_k < len(probabilities):
            least = probabilities.topk(how.top_k).values[-1]
            probabilities[probabilities < least] = 0
        if how.top_p < 1:
            probabilities = _nucleus(probabilities / probabilities.sum(), how.top_p)
        key = int(torch.randint(2**63 - 1, (), generator=self._generator))
        tokens = probabilities.nonzero()[:, 0]
        scores = probabilities[tokens].log() + gumbel_noise(key, tokens.cpu()).to(tokens.device)
        return int(tokens[scores.argmax()])


def gumbel_noise(key: int, tokens: Tensor) -> Tensor:
    """Gumbel's noise of tokens, each its own, in float64.

    Args:
        key: with another one all noise is another.
        tokens: their ids, on the CPU.
    """
    # A token's number among those of splitmix64 (Steele, Lea and Flood, 2014), begun at the key.
    bits = tokens.numpy().astype(np.uint64)
    bits += np.uint64(1)
    bits *= np.uint64(0x9E3779B97F4A7C15)
    bits += np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits ^= bits >> np.uint64(shift)
        bits *= np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    # The middles of 2^53 equal parts of (0, 1).
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -(-torch.from_numpy(uniform).log()).log()


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The probabilities of the likeliest tokens that have `top_p` together, and zeros."""
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    # Those before which less than top_p is there: the first always stays.
    kept = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(probabilities).index_put((tokens[kept],), ordered[kept])


def reported(
    logits: Tensor, token: int, alternatives: int | None, *, ranked: bool = False
) -> Token:
    """A token with its log-probability and so many of the likeliest in its place; None: neither.

    Args:
        logits: of its place (vocabulary).
        token: that is there.
        alternatives: how many of the likeliest.
        ranked: give the ranks of all of them, too.
    """
    if alternatives is None:
        return Token(token)
    logits = logits.float()
    # By logits: log-probabilities are rounded once more, and may be equal where these are not.
    values, tokens = logits.topk(min(alternatives, len(logits)))
    logprobs = logits.log_softmax(-1)
    own, *others = (
        max(value, LEAST_LOGPROB) for value in (float(logprobs[token]), *logprobs[tokens].tolist())
    )
    ranks: tuple[int, ...] = ()
    if ranked:
        # Whatever is larger than one of the likeliest is among them.
        of_others = 1 + (values > values[:, None]).sum(-1)
        ranks = (1 + int((logits > logits[token]).sum()), *of_others.tolist())
    return Token(token, own, tuple(zip(tokens.tolist(), others, strict=True)), ranks)
