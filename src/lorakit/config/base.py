"""The base of all settings: frozen, unknown keys refused, every problem reported at once."""

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from lorakit.config.fields import Key, meant, types_of, types_within
from lorakit.errors import ConfigError

DTypeName = Literal["float32", "bfloat16", "float16"]
"""The name of a precision."""
Device = Literal["auto", "cpu", "cuda"]
"""What a model computes on. auto: a GPU where torch sees one, else the CPU."""
HeldIn = Literal["as-trained", "none", "4bit", "8bit"]
"""The precision of a base's weights in memory: that in which an adapter was trained, the base's
`dtype`, or few bits."""


def comma_list(value: Any) -> Any:
    """Split "q, v" into its names, so that a flag or a YAML line needs no brackets."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def dtype_name(value: Any) -> Any:
    """The name of a torch.dtype, such as bfloat16; any other value is left to be validated."""
    torch = sys.modules.get("torch")
    is_torchs = torch is not None and isinstance(value, torch.dtype)
    return str(value).removeprefix("torch.") if is_torchs else value


def _as_text(value: Any) -> Any:
    """The text of a path; any other value is left to be validated.

    Raises:
        ValueError: the text is empty.
    """
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty: give a path (the working folder is .)")
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text.startswith("~"):
        return text
    expanded = os.path.expanduser(text)
    if expanded == text:
        raise ValueError(f"{text}: there is no such home folder")
    return expanded


AdapterPlace = Annotated[str, BeforeValidator(_as_text)]
"""An adapter's folder, or its hub id, OWNER/NAME or OWNER/NAME@REVISION: a Path would lose the
difference."""
if TYPE_CHECKING:
    import torch

    Names = Sequence[str] | str
    DType = DTypeName

    class AnyPath:
        """A path for type checkers: it may be given as text too, and is read as a Path."""

        def __get__(self, instance: object, owner: object = None) -> Path: ...
        def __set__(self, instance: object, value: str | os.PathLike[str]) -> None: ...

    class AnyDType:
        """A precision for type checkers: it may be given as torch has it, and is read as a name."""

        def __get__(self, instance: object, owner: object = None) -> DTypeName: ...
        def __set__(self, instance: object, value: DTypeName | torch.dtype) -> None: ...

    class AutoDType:
        """The same, or auto."""

        def __get__(self, instance: object, owner: object = None) -> Literal["auto", DTypeName]: ...
        def __set__(
            self, instance: object, value: Literal["auto", DTypeName] | torch.dtype
        ) -> None: ...
else:
    Names = Annotated[tuple[str, ...], BeforeValidator(comma_list)]
    """Names, which may be given in any sequence, or as one text with commas between them."""
    DType = Annotated[DTypeName, BeforeValidator(dtype_name)]
    """A precision by its name or as a torch.dtype, which is read as its name."""
    AnyDType = DType
    AutoDType = Annotated[Literal["auto", DTypeName], BeforeValidator(dtype_name)]
    AnyPath = Path
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Topic:
    """Settings that the help explains together."""

    name: str
    meaning: str
    settings: tuple[str, ...]
    """Their dotted names, such as lora.rank."""


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, every problem reported at once."""

    positional: ClassVar[tuple[str, ...]] = ()
    """The settings that words of a command line without a flag give, in this order."""

    topics: ClassVar[tuple[Topic, ...]] = ()
    """The settings by topic, in the help of a class that has many; the first has what people need
    first. A section is a topic too, of what these leave in it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_what_pydantic_converts(cls, value: Any, info: Any) -> Any:
        """Refuse true in the place of 1, and an empty path, which would be the working folder."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        types = types_within(annotation)
        if types & {int, float} and not types & {bool, Any} and _has_truth_value(value):
            raise ValueError(f"true and false are no numbers, found {value!r}")
        if Path in types_of(annotation) and isinstance(value, str) and not value.strip():
            raise ValueError("is empty: give a path (the working folder is .)")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _expands_home(cls, value: Any) -> Any:
        if not isinstance(value, Path):
            return value
        try:
            return value.expanduser()
        except RuntimeError as error:
            raise ValueError(f"{value}: {error}") from None

    def __init__(self, *positional: Any, **values: Any) -> None:
        if positional:
            raise ConfigError(
                f"{type(self).__name__} takes its settings by name; "
                f"{positional[0]!r:.60} was given without one"
            )
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(type(self), error) from None

    # Pydantic then builds nested settings without this constructor, so that the outermost
    # one collects the problems of all of them.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def config_error(settings: type[BaseModel], error: ValidationError) -> ConfigError:
    """One ConfigError with a line for each of pydantic's problems."""
    return ConfigError.listing(headline(settings), problem_lines(settings, error))


def headline(settings: type[BaseModel]) -> str:
    """The first line of an error that lists the problems of some settings."""
    return f"{settings.__name__} has settings that cannot be used"


def problem_lines(
    settings: type[BaseModel], error: ValidationError, *, told: Collection[Key] = ()
) -> list[str]:
    """A line for each of pydantic's problems: the setting, and what is wrong with it.

    Args:
        settings: the class that was validated.
        error: what pydantic found.
        told: settings whose problem is told already.
    """
    lines = []
    for problem in error.errors():
        if problem["loc"] in told:
            continue
        key = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown setting{_nearest(settings, key)}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: must be given")
        elif problem["type"] == "value_error":
            lines.append(f"{key}: {problem['ctx']['error']}")
        else:
            found = repr(problem["input"])
            lines.append(f"{key}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, found {found}")
    return lines


def _nearest(settings: type[BaseModel], name: str) -> str:
    """The hint "; did you mean 'x'?" with the settings that an unknown name may mean."""
    likely = meant(settings, name)
    if likely:
        return f"; did you mean {' or '.join(map(repr, likely))}?"
    return f"; the known ones are {', '.join(settings.model_fields)}"


def _has_truth_value(value: Any) -> bool:
    """Whether a value is true or false, or has one of them in it."""
    if isinstance(value, Mapping):
        return any(map(_has_truth_value, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(map(_has_truth_value, value))
    return isinstance(value, bool)
