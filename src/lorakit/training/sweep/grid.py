"""The trials of a sweep: which settings may vary, and the settings and the name of each trial."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from lorakit.config.base import Settings, problem_lines
from lorakit.config.marks import Mark, mark_of, settings_where
from lorakit.config.methods import MethodConfig
from lorakit.config.train import TrainConfig
from lorakit.errors import ConfigError


def _varies(mark: Mark) -> bool:
    return mark.varies


_MARKED = settings_where(TrainConfig, _varies)

SECTIONS = {
    name: section
    for name in _MARKED
    if isinstance(section := TrainConfig.model_fields[name].annotation, type)
    and issubclass(section, Settings)
}
"""Settings that hold settings, which may vary each by itself."""

VARYING = (
    *(
        f"{name}.{inner}"
        for name, section in SECTIONS.items()
        for inner in settings_where(section, _varies, default=mark_of(TrainConfig, name))
    ),
    *(name for name in _MARKED if name not in SECTIONS),
)
"""Settings that may differ between trials; they share all others, the base first of all."""

LONGEST_NAME = 100
"""Most characters of a trial's name, which is the name of a folder too."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep."""

    name: str
    """The name of its folder in the sweep's folder, and of its adapter in the model."""
    settings: Mapping[str, Any]
    """Its values of the settings that vary, as JSON values."""
    config: TrainConfig
    """All its settings, those of a run alone."""


def trials_of(config: TrainConfig) -> tuple[Trial, ...]:
    """The trials that `config.sweep` describes.

    Raises:
        ConfigError: settings are unknown, may not vary, or have wrong values; or names are not
            fit or not unique: all problems in one message.
    """
    problems: list[str] = []
    given = list(_given(config.sweep, problems))
    keys = list(dict.fromkeys(key for settings in given for key in settings if key != "name"))
    problems += [line for key in keys if (line := _refusal(key))]
    made = [] if problems else [_config(config, settings, problems) for settings in given]
    configs = [each for each in made if each is not None]
    if not problems:
        trials = _named(config, configs, keys, [settings.get("name") for settings in given])
        problems += _clashes(trials)
    if problems:
        raise ConfigError.listing("sweep cannot be used", list(dict.fromkeys(problems)))
    return tuple(trials)


def _given(sweep: Any, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the settings of each trial, and add to the problems what is not of the right form."""
    if not sweep:
        problems.append("it is empty: give lists of values, such as {lora.rank: [1, 2, 4, 8]}")
    elif isinstance(sweep, dict):
        for key, values in sweep.items():
            if not isinstance(values, list) or not values:
                problems.append(f"{key}: must be a list of values to try, found {values!r}")
        lists = [values if isinstance(values, list) else [values] for values in sweep.values()]
        for combination in itertools.product(*lists):
            yield dict(zip(sweep, combination, strict=True))
    else:
        for number, settings in enumerate(sweep, start=1):
            if isinstance(settings, dict):
                yield {str(key): value for key, value in settings.items()}
            else:
                problems.append(f"trial {number}: must be a mapping of settings, not {settings!r}")


def _refusal(key: str) -> str | None:
    """The reason why a setting may not vary, or None."""
    if key in VARYING:
        return None
    if key in SECTIONS:
        own = (each for each in SECTIONS[key].model_fields if each not in MethodConfig.model_fields)
        return f"{key}: is a section: name its settings, such as {key}.{next(own)}"
    if key in TrainConfig.model_fields:
        return f"{key}: cannot vary, because the trials of a sweep share it"
    return f"{key}: unknown setting{_nearest(key)}"


def _nearest(key: str) -> str:
    """A hint at the known setting with the nearest name, whether or not its section was given."""
    short = {known.rpartition(".")[2]: known for known in VARYING}
    close = difflib.get_close_matches(key.rpartition(".")[2], short, n=1)
    if close:
        return f"; did you mean '{short[close[0]]}'?"
    return f"; those that may vary are {', '.join(VARYING)}"


def _config(
    config: TrainConfig, settings: Mapping[str, Any], problems: list[str]
) -> TrainConfig | None:
    """A trial's settings with the sweep's folder; None, and added problems, if they are wrong."""
    values = {**config.model_dump(), "sweep": None, "ray": None}
    for key, value in settings.items():
        section, dot, name = key.rpartition(".")
        if key != "name":
            (values[section] if dot else values)[name] = value
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        problems += problem_lines(TrainConfig, error)
        return None


def _named(
    config: TrainConfig, configs: Sequence[TrainConfig], keys: Sequence[str], names: Sequence[Any]
) -> list[Trial]:
    """The trials; the name of one that was given none is made of the settings that vary."""
    trials = []
    for number, (each, given) in enumerate(zip(configs, names, strict=True), start=1):
        values = each.model_dump(mode="json")
        settings = {key: _value(values, key) for key in keys}
        name = str(given) if given is not None else _name(settings) or f"member-{number}"
        own = each.model_copy(update={"out": config.out / name})
        trials.append(Trial(name=name, settings=settings, config=own))
    return trials


def _value(values: Mapping[str, Any], key: str) -> Any:
    section, dot, name = key.rpartition(".")
    return (values[section] if dot else values)[name]


def label(settings: Mapping[str, Any]) -> str:
    """Settings as text for people: rank=4, targets=q+v."""
    return ", ".join(f"{key.rpartition('.')[2]}={word(v)}" for key, v in settings.items())


def _name(settings: Mapping[str, Any]) -> str:
    """Settings as the name of a folder."""
    text = re.sub(r"[^A-Za-z0-9._+=,-]+", "-", label(settings).replace(", ", ","))
    return text.lstrip(".-")[:LONGEST_NAME]


def word(value: Any) -> str:
    """One value as text for people."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "+".join(map(word, value)) or "none"
    if isinstance(value, dict):
        return "+".join(f"{key}-{word(each)}" for key, each in value.items()) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    # The end of a file's path says the most.
    return str(value).rstrip("/").rpartition("/")[2]


def _clashes(trials: Sequence[Trial]) -> list[str]:
    """The problems of the names, and the trials that have the settings of another."""
    problems = []
    by_name: dict[str, Trial] = {}
    by_content: dict[str, Trial] = {}
    for trial in trials:
        if not re.fullmatch(rf"[\w+=,-][\w.+=,-]{{,{LONGEST_NAME - 1}}}", trial.name, re.ASCII):
            problems.append(
                f"name: {trial.name!r} is not fit for a folder: letters, digits and ._+=,- only, "
                f"at most {LONGEST_NAME}"
            )
        content = json.dumps(trial.config.model_dump(mode="json", exclude={"out"}))
        twin = by_content.setdefault(content, trial)
        # Some file systems do not tell capitals from small letters.
        namesake = by_name.setdefault(trial.name.casefold(), trial)
        if twin is not trial:
            problems.append(f"{trial.name}: has the settings of {twin.name}, so it would repeat it")
        elif namesake is not trial:
            problems.append(
                f"{trial.name}: two trials have this name; write the sweep as a list, and give "
                "each trial a name"
            )
    return problems
