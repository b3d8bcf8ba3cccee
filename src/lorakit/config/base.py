"""The base of all settings: frozen, unknown keys refused, every problem reported at once."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from lorakit.errors import ConfigError, did_you_mean

DType = Literal["float32", "bfloat16", "float16"]
HeldIn = Literal["as-trained", "none", "4bit", "8bit"]
"""The precision of a base's weights in memory: that in which an adapter was trained, the base's
`dtype`, or few bits."""


def _comma_list(value: Any) -> Any:
    """Split "q, v" into its names, so that a flag or a YAML line needs no brackets."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_comma_list)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]


def _types(annotation: Any) -> tuple[Any, ...]:
    """A type, or the members of a union."""
    return get_args(annotation) or (annotation,)


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, every problem reported at once."""

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
    def _names_a_path(cls, value: Any, info: Any) -> Any:
        """Refuse an empty text as a path: Path("") is the working folder."""
        if value == "" and Path in _types(cls.model_fields[str(info.field_name)].annotation):
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

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise config_error(type(self), error) from None

    # Pydantic then builds nested settings without this constructor, so that the outermost
    # one collects the problems of all of them.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def config_error(settings: type[BaseModel], error: ValidationError) -> ConfigError:
    """One ConfigError with a line for each of pydantic's problems."""
    return ConfigError.listing(
        f"{settings.__name__} has settings that cannot be used", problem_lines(settings, error)
    )


def problem_lines(settings: type[BaseModel], error: ValidationError) -> list[str]:
    """A line for each of pydantic's problems: the setting, and what is wrong with it."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown setting{_nearest(settings, problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: must be given")
        elif problem["type"] == "value_error":
            lines.append(f"{key}: {problem['ctx']['error']}")
        else:
            found = repr(problem["input"])
            lines.append(f"{key}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, found {found}")
    return lines


def _nearest(settings: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """The hint "; did you mean 'x'?" with the known key nearest to an unknown one."""
    for part in location[:-1]:
        field = settings.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return ""
        settings = inner
    known = settings.model_fields
    hint = did_you_mean(str(location[-1]), known)
    return hint or f"; the known ones are {', '.join(known)}"
