"""lorakit.json: what PEFT's two files lack of an adapter, and hashes that prove it unchanged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from lorakit.adapter.content import AdapterContent
from lorakit.adapter.json_files import file_problems, read_object, to_json
from lorakit.adapter.site import LayerKind, RowRanges, Site
from lorakit.config.methods import METHODS, MethodConfig, combination_problems, config_of
from lorakit.errors import ConfigError
from lorakit.models.identity import BaseIdentity
from lorakit.models.loftq import LoftQ

RECORD_FILE = "lorakit.json"
VERSION = 2
RowsText = Annotated[str, Field(pattern=r"^\d+:\d+(,\d+:\d+)*$")]
NEWER = ("lora_bias", "trainable_token_indices", "ensure_weight_tying", "layer_replication")
"""Settings that folders of this version did not have from its beginning. They are written where
they are used, so that an adapter without them stays the same bytes, which older lorakits read."""
TensorText = Annotated[str, Field(pattern=r"^(float32|bfloat16|float16|float64)( \d+(x\d+)*)?$")]


class MethodRecord(BaseModel):
    """The settings of one method."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    method: str
    own: dict[str, Any]
    """Its settings, without those that the method's name implies."""

    @classmethod
    def of(cls, config: MethodConfig) -> MethodRecord:
        """The record of a method's settings."""
        _, implied = METHODS[config.method]
        fields = type(config).model_fields
        newer = [name for name in NEWER if name in fields]
        unused = {name for name in newer if getattr(config, name) == fields[name].default}
        own = config.model_dump(mode="json", exclude={*implied, *unused})
        return cls(method=config.method, own=own)

    def settings(self) -> MethodConfig:
        """The settings.

        Raises:
            ConfigError: there is no such method, or the settings are wrong.
        """
        return config_of(self.method, self.own)


class SiteRecord(BaseModel):
    """One site."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: str
    kind: LayerKind = "linear"
    role: str | None = None
    rows: RowsText | None = None
    layer_rows: int | None = None
    rank: Annotated[int, Field(ge=1)]
    alpha: float
    scale: float
    groups: Annotated[int, Field(ge=1)] = 1
    frozen: Annotated[int, Field(ge=0)] = 0
    tied_to: str | None = None

    @model_validator(mode="after")
    def _check(self) -> SiteRecord:
        if self.frozen >= self.rank:
            raise ValueError(f"{self.frozen} of {self.rank} ranks do not train: none is left")
        return self

    @classmethod
    def of(cls, site: Site) -> SiteRecord:
        """The record of a site."""
        rows = None if site.rows is None else ",".join(f"{a}:{b}" for a, b in site.rows)
        return cls(**{**vars(site), "rows": rows})

    def site(self) -> Site:
        """The site."""
        return Site(**{**vars(self), "rows": None if self.rows is None else _rows(self.rows)})


class AdapterRecord(BaseModel):
    """The whole file, in the order of its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["lorakit adapter"] = "lorakit adapter"
    version: int = VERSION
    method: str
    content_hash: str
    """`Adapter.content_hash()`."""
    configs: tuple[MethodRecord, ...]
    sites: tuple[SiteRecord, ...]
    tensors: dict[str, TensorText]
    """Precision and shape of each tensor, under its name in lorakit."""
    copied_modules: tuple[str, ...]
    target_modules: tuple[str, ...]
    base: BaseIdentity | None
    loftq: LoftQ | None = None
    """Written where it is used, as settings that are newer than this version's first folders."""
    card: dict[str, Any]
    unverified: tuple[str, ...]

    @classmethod
    def of(cls, adapter: AdapterContent) -> AdapterRecord:
        """The record of an adapter; it computes the adapter's hash."""
        return cls(
            method=adapter.method,
            content_hash=adapter.content_hash(),
            configs=tuple(MethodRecord.of(config) for config in adapter.configs),
            sites=tuple(SiteRecord.of(site) for site in adapter.sites),
            tensors={name: _describe(tensor) for name, tensor in sorted(adapter.tensors.items())},
            copied_modules=adapter.copied_modules,
            target_modules=adapter.target_modules,
            base=adapter.base,
            loftq=adapter.loftq,
            card=dict(adapter.card),
            unverified=adapter.unverified,
        )

    def adapter(self, tensors: Mapping[str, Tensor]) -> AdapterContent:
        """The adapter with its tensors."""
        return AdapterContent(
            configs=tuple(config.settings() for config in self.configs),
            sites=tuple(site.site() for site in self.sites),
            tensors=tensors,
            copied_modules=self.copied_modules,
            target_modules=self.target_modules,
            base=self.base,
            loftq=self.loftq,
            card=self.card,
            unverified=self.unverified,
        )

    def empty_tensors(self) -> dict[str, Tensor]:
        """Tensors of the recorded shapes on the meta device."""
        empty = {text: _empty(text) for text in set(self.tensors.values())}
        return {name: empty[text] for name, text in self.tensors.items()}

    def text(self) -> str:
        """The file: JSON with sorted keys and a checksum over all of them."""
        # Pydantic would write NaN as null.
        unused = {"loftq"} if self.loftq is None else set()
        content = self.model_dump(mode="json", exclude={"card", *unused}) | {"card": self.card}
        content["sites"] = [
            site.model_dump(mode="json", exclude_defaults=True) for site in self.sites
        ]
        content = json.loads(to_json(content))  # the form that the reader hashes
        return to_json(content | {"checksum": checksum(content)})


def checksum(content: Mapping[str, Any]) -> str:
    """The SHA-256 of the file's content without the checksum itself."""
    kept = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_record(data: bytes, problems: list[str]) -> AdapterRecord | None:
    """The record in lorakit.json; None where it cannot be used.

    Args:
        data: the whole file.
        problems: gets a line for each thing that is wrong.
    """
    raw = read_object(data, RECORD_FILE, problems)
    if raw is None:
        return None
    version = raw.get("version")
    if version != VERSION:
        problems.append(
            f"{RECORD_FILE}  is of format version {version!r}; this lorakit reads {VERSION}"
        )
        return None
    if raw.pop("checksum", None) != checksum(raw):
        problems.append(f"{RECORD_FILE}  was changed or damaged after it was written")
        return None
    try:
        record = AdapterRecord.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        problems += file_problems(RECORD_FILE, error)
        return None
    problems += _method_problems(record)
    return record


def _method_problems(record: AdapterRecord) -> list[str]:
    """A line for each thing that is wrong with the settings of a record's methods."""
    try:
        configs = [each.settings() for each in record.configs]
    except ConfigError as error:
        return [f"{RECORD_FILE}  {error}"]
    methods = [config.method for config in configs]
    problems = combination_problems(methods)
    if not problems and record.method != "+".join(methods):
        problems = [f"it has method {record.method!r}, but the settings of {'+'.join(methods)}"]
    return [f"{RECORD_FILE}  {problem}" for problem in problems]


def _rows(text: str) -> RowRanges:
    pairs = (part.split(":") for part in text.split(","))
    return tuple((int(first), int(last)) for first, last in pairs)


def _describe(tensor: Tensor) -> str:
    size = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} {size}".rstrip()


def _empty(text: str) -> Tensor:
    shape = [int(size) for size in re.findall(r"\d+", text.partition(" ")[2])]
    return torch.empty(shape, dtype=getattr(torch, text.partition(" ")[0]), device="meta")
