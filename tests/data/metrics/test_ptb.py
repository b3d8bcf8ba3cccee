"""The tokens of the COCO metrics."""

import pytest

from lorakit.data.metrics.ptb import coco_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The Mill isn't cheap.", "the mill is n't cheap"),
        ("It's the owner's, they'll say!", "it 's the owner 's they 'll say"),
        ("Cannot I'm gonna won't", "can not i 'm gon na wo n't"),
        ("A kid-friendly pub (£20-25).", "a kid-friendly pub -lrb- # 20-25 -rrb-"),
        ("“Quoted” and 'so' – or -- so…", "quoted and so or so"),
        ("Rated 3.5/5, 1,000.50 seats, at 5:30", "rated 3.5 / 5 1,000.50 seats at 5:30"),
        ("In the U.S. team", "in the u.s. team"),
        ("Near St. John's and Mr. Holm", "near st. john 's and mr. holm"),
        ("A. B. Holm got a B. The end", "a. b. holm got a b the end"),
        ("in the center., nearby", "in the center. nearby"),
        ("rock 'n' roll & R&amp;B", "rock 'n' roll & r&b"),
        ("o'clock or O'Neil", "o'clock or o'neil"),
        ("18L/36R, km/h, 08/26", "18l/36r km/h 08/26"),
        ("a@b.org or https://b.org/x?", "a@b.org or https://b.org/x"),
        ("", ""),
    ],
)
def test_a_line_is_cut_as_by_corenlp(text: str, tokens: str) -> None:
    assert coco_tokens([text]) == [tokens.split()]


def test_lines_are_cut_together_and_breaks_inside_one_are_spaces() -> None:
    lines = ["It is in Serie B.", "The club\nplays", "10 m.", "it is"]
    assert coco_tokens(lines) == [
        ["it", "is", "in", "serie", "b"],
        ["the", "club", "plays"],
        ["10", "m."],
        ["it", "is"],
    ]
