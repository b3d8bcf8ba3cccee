"""The chat template that tools such as TRL save beside PEFT's two files, with the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping

from lorakit.adapter.json_files import read_object

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer_config.json"


def own_template(files: Mapping[str, bytes], problems: list[str]) -> str | None:
    """The chat template among an adapter's files; None: there is none.

    Args:
        files: content by name.
        problems: gets a line for what is wrong.
    """
    if TEMPLATE_FILE in files:
        try:
            return files[TEMPLATE_FILE].decode("utf-8")
        except UnicodeDecodeError as error:
            problems.append(f"{TEMPLATE_FILE}  is not UTF-8 (byte {error.start})")
            return None
    if TOKENIZER_FILE not in files:
        return None
    settings = read_object(files[TOKENIZER_FILE], TOKENIZER_FILE, problems) or {}
    template = settings.get("chat_template")
    # Older tokenizers may have a list of named ones, of which none is said to be the adapter's.
    return template if isinstance(template, str) else None
