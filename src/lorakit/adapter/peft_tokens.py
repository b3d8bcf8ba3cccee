"""PEFT's `trainable_token_indices`: which tokens' rows a tensor of its files holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from lorakit.adapter.peft_config import CONFIG_FILE, PeftConfig


def tokens_of(config: PeftConfig, path: str, rows: Tensor) -> tuple[list[int], list[str]]:
    """The tokens of the rows of a module, and the problems with them.

    Args:
        config: the content of adapter_config.json, which alone says which tokens they are.
        path: of the module.
        rows: (tokens, d).
    """
    given = config.trainable_token_indices or []
    named = given.items() if isinstance(given, dict) else [(path, given)]
    found = [own for word, own in named if path == word or path.endswith(f".{word}")]
    tokens = found[0] if found else []
    if not tokens:
        return [], [f"{path}  has trained rows in the file, of which {CONFIG_FILE} has no tokens"]
    again = sorted({token for token in tokens if tokens.count(token) > 1})
    if again:
        text = f"{CONFIG_FILE} names {', '.join(map(str, again))} twice in trainable_token_indices"
        return tokens, [f"{path}  {text}"]
    if rows.dim() != 2 or len(rows) != len(tokens):
        text = f"rows {tuple(rows.shape)} in the file for {len(tokens)} trainable_token_indices"
        return tokens, [f"{path}  {text}"]
    return tokens, []


def absent_tokens(config: PeftConfig, found: Mapping[str, list[int]]) -> Iterator[str]:
    """Yield a line for each module whose tokens are named, and which has no rows in the file.

    A head that is tied to an embedding has the embedding's rows, which are in the file once.
    """
    given = config.trainable_token_indices or {}
    named = given if isinstance(given, dict) else {"the embedding": given}
    for word, tokens in named.items():
        if tokens not in found.values():
            yield f"{CONFIG_FILE}  trainable_token_indices of {word}: the file has no rows of them"
