"""Files of other tools: recognised by the names of their tensors, to be named in a message."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from lorakit.adapter.file_sizes import header_of
from lorakit.errors import AdapterFileError

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

_ENDS = {
    "kohya's sd-scripts": (".lora_down.weight", ".lora_up.weight", ".hada_w1_a", ".lokr_w1"),
    "diffusers": (".lora.down.weight", ".lora.up.weight", "lora_linear_layer.down.weight"),
    "mlx-lm": (".lora_a", ".lora_b"),
}
_STARTS = {
    "kohya's sd-scripts": ("lora_unet_", "lora_te"),
    "diffusers": ("unet.", "transformer.", "text_encoder."),
    "PEFT, without its adapter_config.json": ("base_model.model.",),
}


def tool_of(names: Iterable[str]) -> str | None:
    """The tool that gives a LoRA's tensors such names; None: it is not known."""
    updates = [name for name in names if "lora" in name or ".hada_" in name or ".lokr_" in name]
    ways: tuple[tuple[dict[str, tuple[str, ...]], Callable[[str, tuple[str, ...]], bool]], ...] = (
        (_STARTS, str.startswith),
        (_ENDS, str.endswith),
    )
    for words, fits in ways:
        for tool, marks in words.items():
            if any(fits(name, marks) for name in updates):
                return tool
    return None


def check_not_safetensors(path: Path) -> None:
    """Refuse a safetensors file where a pickle is expected, and say whose it seems to be.

    Raises:
        AdapterFileError: it is one.
    """
    header = header_of(path)
    if header is None and path.suffix == ".safetensors":
        raise AdapterFileError(f"{path} is not a readable safetensors file: was it cut off?")
    if header is None:
        return
    names = [name for name in header if name != "__metadata__"]
    tool = tool_of(names)
    whose = f"of {tool}" if tool else f"with tensors such as {', '.join(map(repr, names[:2]))}"
    raise AdapterFileError(
        f"{path} is a safetensors file {whose}: lorakit reads folders of lorakit, PEFT and mlx-lm, "
        "loralib's .pt files, and with base=MODEL, the model that they are for, files of kohya's "
        "sd-scripts and of diffusers"
    )


def named_files(folder: Path) -> str:
    """The end of a message: which other tool's files a folder has; else ""."""
    if not (folder / DIFFUSERS_FILE).is_file():
        return ""
    return f"; {DIFFUSERS_FILE} is a LoRA of diffusers, which is read with base=MODEL"
