"""The edits that tercom (7.25) counts between words that are far from each other.

It goes through an output word by word and drops paths that have more than 20 edits over the fewest
of those that matched or replaced the word before. Where an output needs many words more or less
than it has, the path of the fewest edits can be one of those.
"""

from __future__ import annotations

from math import inf

Words = list[str]
BEAM = 20
"""As many edits as a path may have over the best one."""


def beam_edits(output: Words, reference: Words) -> tuple[int, str]:
    """The edits that turn an output into a reference, and the path that has them.

    Args:
        output: its words.
        reference: its words.

    Returns:
        The number of edits; and the path's steps: `=` a match, `s` another word, `i` a word too
        many in the output, `d` one too few. Of equal paths it is tercom's.
    """
    columns = [{0: 0}]
    steps: list[dict[int, str]] = [{}]
    fewest = inf
    for number in range(len(output) + 1):
        word = output[number] if number < len(output) else None
        limit, fewest = fewest + BEAM, inf
        column, after, after_steps = columns[number], dict[int, int](), dict[int, str]()
        for at in range(len(reference) + 1):
            edits = column.get(at)
            if edits is None or (word is not None and edits > limit):
                continue
            if word is not None and at < len(reference):
                same = word == reference[at]
                after[at + 1], after_steps[at + 1] = edits + (not same), "=" if same else "s"
                fewest = min(fewest, edits + (not same))
            if word is not None and after.get(at, inf) > edits + 1:
                after[at], after_steps[at] = edits + 1, "i"
            if at < len(reference) and column.get(at + 1, inf) > edits + 1:
                column[at + 1], steps[number][at + 1] = edits + 1, "d"
        columns.append(after)
        steps.append(after_steps)
    return columns[len(output)][len(reference)], _path(steps, len(output), len(reference))


def _path(steps: list[dict[int, str]], number: int, at: int) -> str:
    """The steps from the beginning to a place."""
    path = []
    while number or at:
        path.append(steps[number][at])
        number -= path[-1] != "d"
        at -= path[-1] != "i"
    return "".join(reversed(path))
