"""Other servers with the same adapters: vLLM, and llama.cpp's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.llama_cpp import save_gguf
from lorakit.bench.serving.asking import Client, CompletionRequest, Reply
from lorakit.bench.serving.process import free_port, started
from lorakit.config.bench import ServeBenchConfig
from lorakit.errors import LorakitError
from lorakit.models.packaged import PACKAGES, packaged_file

SPARE_TOKENS = 16
"""The context of each client beyond its prompt and answer."""


@dataclass(frozen=True)
class Other:
    """A server that is not ours."""

    client: Client
    ask: Callable[[Client, CompletionRequest], Reply]
    """Asks it in its own words."""


@contextmanager
def others(
    settings: ServeBenchConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Sequence[Path],
    folder: Path,
) -> Iterator[tuple[dict[str, Other], dict[str, str]]]:
    """The servers that settings name, inside a block, and why others of them do not run.

    Args:
        settings: of the benchmark.
        model: the base.
        tokenizer: its tokenizer.
        adapters: their folders.
        folder: for what is written for them.
    """
    made: dict[str, Other] = {}
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        for name, program, start in (
            ("vllm", settings.vllm, _vllm),
            ("llama.cpp", settings.llama_cpp, _llama_cpp),
        ):
            if program is None:
                continue
            try:
                server = start(settings, program, model, tokenizer, adapters, folder)
                made[name] = stack.enter_context(server)
            except LorakitError as error:
                failed[name] = str(error).strip().splitlines()[-1]
        yield made, failed


@contextmanager
def _vllm(
    settings: ServeBenchConfig,
    python: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Sequence[Path],
    folder: Path,
) -> Iterator[Other]:
    """vLLM's server, of the environment with a Python."""
    base, port = folder / "base", free_port()
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    how = {
        "model": base,
        "served-model-name": "base",
        "dtype": settings.dtype,
        "max-loras": len(adapters),
        "max-cpu-loras": len(adapters),
        "max-lora-rank": max(8, settings.rank),
        "max-num-seqs": settings.clients,
        "max-model-len": _length(settings),
        "port": port,
    }
    words = [part for name, value in how.items() for part in (f"--{name}", str(value))]
    words += ["--enable-lora", "--no-enable-prefix-caching", "--lora-modules"]
    words += [f"{adapter.name}={adapter}" for adapter in adapters]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *words]
    with _started(settings, command, port, {"VLLM_CPU_KVCACHE_SPACE": "1"}) as client:
        yield Other(client, Client.complete)


@contextmanager
def _llama_cpp(
    settings: ServeBenchConfig,
    program: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Sequence[Path],
    folder: Path,
) -> Iterator[Other]:
    """llama.cpp's server, by its program; its base is the packaged file, of about 4 bits.

    Raises:
        LorakitError: the base does not come in such a file.
    """
    if settings.model not in PACKAGES:
        raise LorakitError(f"{settings.model} does not come as a GGUF file")
    port, names = free_port(), [adapter.name for adapter in adapters]
    how = {
        "model": packaged_file(settings.model),
        "parallel": settings.clients,
        "ctx-size": settings.clients * _length(settings),
        "threads": settings.threads or torch.get_num_threads(),
        "port": port,
    }
    words = [part for name, value in how.items() for part in (f"--{name}", str(value))]
    for adapter in adapters:
        file = folder / f"{adapter.name}.gguf"
        save_gguf(Adapter.load(adapter), file, model.config)
        words += ["--lora", str(file)]

    def ask(client: Client, request: CompletionRequest) -> Reply:
        scales = [
            {"id": number, "scale": float(name == request.model)}
            for number, name in enumerate(names)
        ]
        return client.post(
            "/v1/completions", request.body() | {"lora": scales, "cache_prompt": False}
        )

    command = [str(program), *words, "--lora-init-without-apply", "--no-webui"]
    with _started(settings, command, port, {}) as client:
        yield Other(client, ask)


def _length(settings: ServeBenchConfig) -> int:
    return settings.prompt_tokens + settings.new_tokens + SPARE_TOKENS


@contextmanager
def _started(
    settings: ServeBenchConfig, command: Sequence[str], port: int, variables: Mapping[str, str]
) -> Iterator[Client]:
    client = Client(port)

    def ready(said: str) -> Client | None:
        try:
            return client if client.get("/health").is_good else None
        except OSError:
            return None

    # An environment of its own, in which our packages are not.
    inherited: dict[str, Any] = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment = {**inherited, **variables}
    with started(command, ready, threads=settings.threads, environment=environment) as server:
        yield server.client
