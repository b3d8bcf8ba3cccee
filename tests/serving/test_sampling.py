"""How tokens are chosen: each rule against naive lines."""

import math
from collections import Counter

import pytest
import torch

from covering import sampled
from lorakit.serving.sampling import LEAST_LOGPROB, Sampler, Sampling, gumbel_noise, reported

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])


def drawn(count=4000, **how):
    sampler = Sampler(Sampling(temperature=how.pop("temperature", 1.0), seed=1, **how), [])
    found = []
    for _ in range(count):
        sampler._written.clear()
        found.append(sampler.choose(LOGITS).id)
    return {token: times / count for token, times in sorted(Counter(found).items())}


def shares(logits, kept):
    exps = [math.exp(x) if at in kept else 0.0 for at, x in enumerate(logits)]
    return {at: x / sum(exps) for at, x in enumerate(exps) if x}


@sampled(
    ("how", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 1e-6}, {0}),
        ({"min_p": 0.1}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.9}, {0, 1}),
    ],
)
def test_tokens_are_drawn_by_their_probability_among_those_kept(how, kept):
    found = drawn(**how)
    assert found == pytest.approx(shares(LOGITS.tolist(), kept), abs=0.03)


def test_the_temperature_divides_the_logits():
    expected = shares((LOGITS / 2).tolist(), {0, 1, 2, 3, 4})
    assert drawn(temperature=2.0) == pytest.approx(expected, abs=0.03)


def test_without_temperature_the_likeliest_is_taken():
    assert Sampler(Sampling(), []).choose(LOGITS).id == 0


def test_penalties_and_biases_change_the_logits():
    frequency = Sampler(Sampling(frequency_penalty=0.6), [])
    assert [frequency.choose(LOGITS).id for _ in range(4)] == [0, 0, 1, 0]
    presence = Sampler(Sampling(presence_penalty=1.5), [])
    assert [presence.choose(LOGITS).id for _ in range(3)] == [0, 1, 0]
    assert Sampler(Sampling(repetition_penalty=3.0), [0]).choose(LOGITS).id == 1
    assert Sampler(Sampling(logit_bias={4: 6.0}), []).choose(LOGITS).id == 4
    assert Sampler(Sampling(logit_bias={0: -100.0}), []).choose(LOGITS).id == 1


def test_log_probabilities_come_before_temperature_and_penalties():
    how = Sampling(temperature=3.0, seed=0, alternatives=2, logit_bias={1: 50.0})
    token = Sampler(how, []).choose(LOGITS)
    expected = LOGITS.log_softmax(-1)
    assert token.id == 1
    assert token.logprob == pytest.approx(float(expected[1]))
    assert [other for other, _ in token.alternatives] == [0, 1]
    assert Sampler(Sampling(), []).choose(LOGITS).logprob is None


def test_a_rank_is_one_more_than_the_tokens_with_larger_logits():
    # These differ by less than their log-probabilities can tell.
    near = torch.tensor([1e-7, 2e-7, 9.0, 9.0, float("-inf")])
    assert float(near.log_softmax(-1)[0]) == float(near.log_softmax(-1)[1])
    token = reported(near, 0, 4, ranked=True)
    assert {other for other, _ in token.alternatives[:2]} == {2, 3}
    assert [other for other, _ in token.alternatives[2:]] == [1, 0]
    assert token.ranks == (4, 1, 1, 3, 4)
    assert reported(near, 3, 0, ranked=True).ranks == (1,)
    assert reported(near, 0, 4).ranks == ()
    least = reported(near, 4, 5, ranked=True)
    assert least.logprob == least.alternatives[-1][1] == LEAST_LOGPROB
    assert least.ranks == (5, 1, 1, 3, 4, 5)


def test_a_seed_gives_the_same_and_none_gives_others():
    def run(seed):
        sampler = Sampler(Sampling(temperature=5.0, seed=seed), [])
        return [sampler.choose(LOGITS).id for _ in range(40)]

    assert run(3) == run(3) != run(4)
    assert run(None) != run(None)


def test_rounding_of_the_logits_changes_no_draw():
    torch.manual_seed(0)
    logits = torch.randn(5000)
    rounded = logits + 1e-6 * torch.randn(5000)
    how = Sampling(temperature=1.0, seed=1)
    one, other = Sampler(how, []), Sampler(how, [])
    drawn = [one.choose(logits).id for _ in range(200)]
    assert drawn == [other.choose(rounded).id for _ in range(200)]
    assert len(set(drawn)) > 150


def test_noise_is_gumbels():
    noise = gumbel_noise(7, torch.arange(200_000))
    # Euler's constant, and pi² / 6.
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(1.6449, abs=0.03)
    assert torch.equal(noise[[5, 9]], gumbel_noise(7, torch.tensor([5, 9])))
    other = gumbel_noise(8, torch.arange(200_000))
    assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.01


def test_the_lowest_temperature_takes_the_likeliest():
    sampler = Sampler(Sampling(temperature=5e-324, seed=0), [1])
    assert sampler.choose(torch.tensor([1.0, 30.0, 29.0])).id == 1
