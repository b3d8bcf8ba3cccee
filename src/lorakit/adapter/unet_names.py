"""What Stability's code calls the layers of a U-Net that diffusers names otherwise.

Stability numbers all parts of the way down (`input_blocks`) and up (`output_blocks`) in a row;
diffusers groups them by resolution. kohya's files for SDXL have the former names. In each group of
the way down are as many parts as residual blocks and one that halves the resolution; on the way up
each group has one residual block more, and the last one doubles it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_WHOLE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESIDUAL_BLOCK = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PART = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def stability_names(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The paths of a U-Net's layers that have a name of Stability's, each with that name."""
    paths = list(paths)
    parts = {path: found for path in paths if (found := _PART.fullmatch(path))}
    downs = [found for found in parts.values() if found[1] == "down"]
    if not downs:
        return
    # The residual blocks of a group on the way down, and what follows them.
    step = 2 + max((int(each[4]) for each in downs if each[3] == "resnets"), default=-1)
    attending = {found[2] for found in parts.values() if found.group(1, 3) == ("up", "attentions")}
    for path in paths:
        if path in _WHOLE:
            yield path, _WHOLE[path]
        elif path in parts:
            yield path, _part(parts[path], step, upsampler=2 if parts[path][2] in attending else 1)
        elif found := _MIDDLE.fullmatch(path):
            kind, number, rest = found.groups()
            at = 2 * int(number) + (kind == "attentions")
            yield path, f"middle_block.{at}.{_inside(kind, rest)}"


def _part(found: re.Match[str], step: int, *, upsampler: int) -> str:
    way, group, kind, number, rest = found.groups()
    way, first = ("input", 1) if way == "down" else ("output", 0)
    at = first + int(group) * step + int(number)
    last = first + int(group) * step + step - 1
    if kind == "downsamplers":
        return f"{way}_blocks.{last}.0.op"
    if kind == "upsamplers":
        return f"{way}_blocks.{last}.{upsampler}.{rest}"
    return f"{way}_blocks.{at}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    return _IN_RESIDUAL_BLOCK.get(rest, rest) if kind == "resnets" else rest
