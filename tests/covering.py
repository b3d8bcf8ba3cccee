"""Which cases of a product `make test` runs; the others are thorough, for `make test-all`."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

Case = Sequence[Any]


def covering(
    names: str | Sequence[str],
    cases: Iterable[Case],
    *,
    each: int = 1,
    also: Callable[..., object] | None = None,
    **options: Any,
) -> Callable[[Any], Any]:
    """Parametrise a test with cases, of which all that `chosen` leaves out are marked `thorough`.

    The test's name is the seed, so other claims are tested on other cases.

    Args:
        names: As for `pytest.mark.parametrize`, as are `options`.
        cases: The values of all names, for each case.
        each: In how many cases of `make test` every value is, where that many have it.
        also: What else must be in as many cases, such as the branch that the test will take; it
            is called with a case's values.
    """
    cases = list(cases)

    def parametrized(test: Any) -> Any:
        kept = chosen(cases, each=each, seed=test.__name__, also=also)
        marked = [
            pytest.param(*case, marks=() if at in kept else pytest.mark.thorough)
            for at, case in enumerate(cases)
        ]
        return pytest.mark.parametrize(names, marked, **options)(test)

    return parametrized


def sampled(
    name: str | tuple[str, ...], values: Sequence[Any], *, share: int = 4, **options: Any
) -> Callable[[Any], Any]:
    """Parametrise a test with values, of which one in `share` stays; the others are thorough.

    Of several names each value is a tuple.

    The test's name is the seed: of several claims about the same values, each stays with others.
    """

    def parametrized(test: Any) -> Any:
        # What a tuple holds may have another representation in each process.
        named = [None if isinstance(name, tuple) else value for value in values]
        drawn = sorted(range(len(values)), key=lambda at: _drawn(test.__name__, at, named[at]))
        kept = set(drawn[: -(-len(values) // share)])
        marked = [
            pytest.param(
                *(value if isinstance(name, tuple) else (value,)),
                marks=() if at in kept else pytest.mark.thorough,
            )
            for at, value in enumerate(values)
        ]
        return pytest.mark.parametrize(name, marked, **options)(test)

    return parametrized


def chosen(
    cases: Sequence[Case],
    *,
    each: int,
    seed: str,
    also: Callable[..., object] | None = None,
) -> set[int]:
    """The numbers of the cases that are kept, the same in every process.

    Cases come in an order drawn by the seed, and one is kept if any of its values is in fewer than
    `each` of those kept before. So every value ends in that many.
    """
    named = [[*map(_name, case), *([repr(also(*case))] if also else [])] for case in cases]
    kept: set[int] = set()
    seen: Counter[tuple[int, str]] = Counter()
    for at in sorted(range(len(cases)), key=lambda at: _drawn(seed, at, named[at])):
        values = list(enumerate(named[at]))
        if any(seen[value] < each for value in values):
            kept.add(at)
            seen.update(values)
    return kept


def _drawn(seed: str, at: int, name: object) -> bytes:
    return hashlib.sha256(f"{seed} {at} {name}".encode()).digest()


def _name(value: object) -> str:
    name = getattr(value, "__name__", None) or repr(value)
    assert " at 0x" not in name, f"{name} has another name in each process"
    return name
