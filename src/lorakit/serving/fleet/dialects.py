"""What lorakit's and vLLM's servers differ in: which adapters they take, and how they are asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lorakit.serving.fleet.version import Version
from lorakit.serving.refusals import RefusalError

Weighted = Sequence[tuple[Version, float]]
"""Adapters with their weights in a combination."""


@runtime_checkable
class Dialect(Protocol):
    """One kind of server."""

    name: str
    ready_path: str
    """What answers 200 where the server takes requests."""
    tells_content: bool
    """Whether its answers tell by their fingerprint what answered."""

    def problems(self, version: Version) -> Sequence[str]:
        """Why it can't serve an adapter; empty: it can, as far as that can be told here."""

    def load_body(self, version: Version) -> dict[str, Any]:
        """The body that loads an adapter."""

    def check(self, weighted: Weighted) -> None:
        """Make sure that it can answer with these weights.

        Raises:
            RefusalError: it can't.
        """

    def asked(self, body: Mapping[str, Any], base: str, weighted: Weighted) -> dict[str, Any]:
        """A body in its words, that names adapters as it knows them.

        Args:
            body: what a client asked.
            base: what the server calls its base.
            weighted: what answers.

        Raises:
            RefusalError: it can't be asked so.
        """


class LorakitDialect:
    """`lorakit serve`, which serves every adapter, and asks each as it was trained."""

    name = "lorakit"
    ready_path = "/ready"
    tells_content = True

    def problems(self, version: Version) -> Sequence[str]:
        """None: what it does not serve it refuses itself, with every problem."""
        return ()

    def load_body(self, version: Version) -> dict[str, Any]:
        """The body that loads an adapter, and changes nothing where it is loaded."""
        return _load_body(version) | {"load_inplace": True}

    def check(self, weighted: Weighted) -> None:
        """Any weights will do."""

    def asked(self, body: Mapping[str, Any], base: str, weighted: Weighted) -> dict[str, Any]:
        """The body, with the names that adapters have there."""
        named = _without_names(body)
        if _is_plain(weighted):
            return named | {"model": weighted[0][0].key if weighted else base}
        return named | {"adapters": [{"name": v.key, "weight": weight} for v, weight in weighted]}


class VllmDialect:
    """vLLM's server, which serves LoRA of one rank alone, and knows nothing of its training."""

    name = "vllm"
    ready_path = "/health"
    tells_content = False

    def problems(self, version: Version) -> Sequence[str]:
        """What of an adapter vLLM does not do."""
        return version.obstacles

    def load_body(self, version: Version) -> dict[str, Any]:
        """The body that loads an adapter."""
        return _load_body(version)

    def check(self, weighted: Weighted) -> None:
        """Refuse weighted combinations."""
        if not _is_plain(weighted):
            raise RefusalError(
                "a vLLM server answers with one adapter, and can't weight or combine them",
                param="adapters",
            )

    def asked(self, body: Mapping[str, Any], base: str, weighted: Weighted) -> dict[str, Any]:
        """The body in vLLM's newest words, as the adapter was trained to be asked."""
        self.check(weighted)
        named = _without_names(body)
        older = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}
        for word, newer in (older | {"guided_grammar": "grammar"}).items():
            if word in named:
                named["structured_outputs"] = {newer: named.pop(word)}
        if not weighted:
            return named | {"model": base}
        version = weighted[0][0]
        return _as_trained(named, version) | {"model": version.key}


LORAKIT: Dialect = LorakitDialect()
VLLM: Dialect = VllmDialect()


def fingerprint_of_vllm(root: str) -> str:
    """What stands for the base of a vLLM server, which tells no more of it than where it is."""
    return hashlib.sha256(f"vllm {root}".encode()).hexdigest()


def _load_body(version: Version) -> dict[str, Any]:
    return {"lora_name": version.key, "lora_path": str(version.copy)}


def _is_plain(weighted: Weighted) -> bool:
    return not weighted or (len(weighted) == 1 and weighted[0][1] == 1.0)


def _without_names(body: Mapping[str, Any]) -> dict[str, Any]:
    names = ("model", "adapter_id", "adapters")
    return {name: value for name, value in body.items() if name not in names}


def _as_trained(body: dict[str, Any], version: Version) -> dict[str, Any]:
    """A body with the prompt's form, chat template and end tokens of an adapter's training."""
    trained = version.trained
    made = dict(body)
    if (
        trained.end_tokens
        and not body.get("ignore_eos")
        and ("prompt" in body or "messages" in body)
    ):
        given = body.get("stop_token_ids") or []
        made["stop_token_ids"] = list(dict.fromkeys([*given, *trained.end_tokens]))
    if trained.rows_kind == "prompt":
        separator = trained.data.separator
        if "prompt" in body:
            made["prompt"] = _with_separator(body["prompt"], separator)
        if body.get("messages"):
            made |= _prompt_as_chat(body["messages"], separator, version.name)
    elif trained.chat_template is not None and body.get("messages"):
        made["chat_template"] = trained.chat_template
    return made


def _with_separator(prompt: Any, separator: str) -> Any:
    if isinstance(prompt, str):
        return prompt.removesuffix(separator) + separator
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        return [_with_separator(each, separator) for each in prompt]
    return prompt


def _prompt_as_chat(messages: Sequence[Any], separator: str, name: str) -> dict[str, Any]:
    """A chat template that writes the one message as the prompts of the training were."""
    if len(messages) > 1:
        raise RefusalError(
            f"{name} was trained on prompts, and knows no conversations: send one message of the "
            "user, or a prompt to /v1/completions",
            param="messages",
        )
    return {
        "chat_template": f"{{{{ messages[0].content }}}}{{{{ {json.dumps(separator)} }}}}",
        "add_special_tokens": True,
    }
