"""The fields of settings: what type they have, which nest settings, and which one was meant."""

import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorakit.config.other_names import OTHER_NAMES

Key = tuple[str, ...]
"""The path of a setting: the names of its sections, then its own, as in ("lora", "rank")."""


def types_of(annotation: Any) -> list[Any]:
    """The members of a union, such as A and None of A | None; of any other type, the type."""
    if get_origin(annotation) is Annotated:
        return types_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [each for part in get_args(annotation) for each in types_of(part)]
    return [annotation]


def types_within(annotation: Any) -> set[Any]:
    """The types of which an annotation is made, such as dict, str and int of dict[str, int]."""
    origin = get_origin(annotation)
    if origin is None or origin is Literal:
        return {origin or annotation}
    parts = get_args(annotation)[: 1 if origin is Annotated else None]
    return {origin}.union(*map(types_within, parts))


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The class of the settings that a field nests, or None for a plain value."""
    for each in types_of(field.annotation):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def fields_of(settings: type[BaseModel], within: Key = ()) -> Iterator[tuple[Key, FieldInfo]]:
    """A class's settings and those of its sections, in order."""
    for name, field in settings.model_fields.items():
        section = section_of(field)
        if section:
            yield from fields_of(section, (*within, name))
        else:
            yield (*within, name), field


def meant(settings: type[BaseModel], name: str) -> list[str]:
    """The dotted settings that an unknown name may mean, the likeliest first; at most three.

    Those of its name in another section, the one that another tool calls so, or the one that is
    spelled most like it.
    """
    dotted = name.strip("-").replace("-", "_")
    keys = [".".join(key) for key, _ in fields_of(settings)]
    last = dotted.rpartition(".")[2]
    other = OTHER_NAMES.get(dotted, OTHER_NAMES.get(last, ""))
    for wanted in (last, other, other.rpartition(".")[2]):
        same = [key for key in keys if wanted and wanted in (key, key.rpartition(".")[2])]
        if same:
            return same[:3]
    close = difflib.get_close_matches(dotted, [*keys, *settings.model_fields], n=1)
    if close:
        return close
    short = {key.rpartition(".")[2]: key for key in reversed(keys)}
    return [short[each] for each in difflib.get_close_matches(last, short, n=1)]
