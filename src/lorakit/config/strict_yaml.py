"""Strict YAML for settings: plain data alone, no key twice, no booleans but true and false."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from lorakit.errors import ConfigError


def load(text: str) -> Any:
    """The plain data of a YAML text.

    Raises:
        yaml.YAMLError: the text breaks the syntax, names a Python object, or gives a key twice.
        ValueError: a number or a date in it is impossible, such as month 13.
    """
    return yaml.load(text, _Loader)


def read_mapping(file: Path) -> dict[Any, Any]:
    """The mapping in a file; an empty file is an empty mapping.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 or not YAML, gives a key twice, or holds
            something else than a mapping.
    """
    try:
        values = load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration file {str(file)!r}: {error.strerror}. "
            "Settings are given in a YAML file or as --name VALUE."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{file} is not YAML{_place_and_reason(error)}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(
            f"{file} must be a list of settings such as 'steps: 300', "
            f"but it is {values!r:.60} as a whole"
        )
    return values or {}


def _place_and_reason(error: Exception) -> str:
    """The end of a message: the position and reason of an error of YAML's parser."""
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return f"{place}: {reason}"


class _Loader(yaml.SafeLoader):
    """The safe loader, without YAML 1.1's surprises.

    It refuses a key given twice, of which YAML alone would drop the first; and as in YAML 1.2, yes,
    no, on and off are words: `packing: off` means the word, and a class may be called no.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The next mapping of the document, before its `<<` keys add other mappings to it."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} is given twice"
                raise ComposerError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node


_BOOLEAN = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _BOOLEAN, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
