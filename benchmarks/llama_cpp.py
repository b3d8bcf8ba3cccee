"""An adapter in llama.cpp: its greedy answers beside lorakit's on the same base.

    python benchmarks/llama_cpp.py --server llama-server --adapter out/places [--out FILE]

The adapter is of SmolLM2, and written as `lorakit convert --to gguf` does. llama.cpp has it beside
the packaged GGUF file, of about four bits, and beside that file with its weights in float32, which
is what lorakit computes with. Prompts are those of places, as tokens, so that no tokenizer counts.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch

import lorakit as lk
from lorakit.adapter.llama_cpp import save_gguf
from lorakit.bench.serving.asking import Client
from lorakit.bench.serving.process import free_port, started
from lorakit.data.encode import encode_rows
from lorakit.data.rows import read_rows
from lorakit.models.packaged import packaged_file
from measured import begin, write_result

NEW = 24
"""Tokens of an answer, at most."""
Answers = list[list[int]]


def in_float32(file: Path, out: Path) -> None:
    """Write a GGUF file anew with all tensors in float32, and nothing else changed."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if name == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_llama_cpp(server: Path, base: Path, adapter: Path, prompts: Answers) -> dict[str, Answers]:
    """llama.cpp's answers, with the adapter and without."""
    port = free_port()
    client = Client(port)
    words = ["--model", base, "--lora", adapter, "--port", port, "--ctx-size", 1024]
    words += ["--parallel", 1, "--no-webui"]

    def ready(said: str) -> Client | None:
        try:
            return client if client.get("/health").is_good else None
        except OSError:
            return None

    def answer(prompt: Sequence[int], scale: float) -> list[int]:
        asked = {"prompt": list(prompt), "n_predict": NEW, "temperature": 0, "return_tokens": True}
        reply = client.post(
            "/completion", asked | {"cache_prompt": False, "lora": [{"id": 0, "scale": scale}]}
        )
        if not reply.is_good:
            raise SystemExit(f"{server} answers {reply.status}: {reply.body}")
        found: list[int] = reply.body["tokens"]
        return found

    with started([str(server), *map(str, words)], ready, threads=None):
        return {
            name: [answer(prompt, scale) for prompt in prompts]
            for name, scale in (("adapter", 1.0), ("base", 0.0))
        }


def of_lorakit(adapter: Path, prompts: Answers) -> dict[str, Answers]:
    """lorakit's answers on the packaged base in float32, with the adapter and without."""
    model, tokenizer = lk.load_model("smollm2")
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    how["pad_token_id"] = tokenizer.pad_token_id

    def answers() -> Answers:
        asked = (torch.tensor([prompt]) for prompt in prompts)
        return [model.generate(ids, **how)[0, ids.shape[1] :].tolist() for ids in asked]

    base = answers()
    lk.attach(model, adapter)
    return {"adapter": answers(), "base": base}


def alike(one: Sequence[int], other: Sequence[int], end: int) -> int | None:
    """The place of the first token that differs, the token at the end left out; None: none does."""
    cut = [list(each[: each.index(end)] if end in each else each) for each in (one, other)]
    if cut[0] == cut[1]:
        return None
    pairs = zip(*cut, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(map(len, cut)))


def main() -> None:
    """Compare, print, and write the result, if --out names a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", type=Path, required=True, help="llama.cpp's llama-server")
    parser.add_argument("--adapter", type=Path, required=True, help="a folder, of SmolLM2")
    parser.add_argument("--rows", type=int, default=32, help="prompts")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    arguments = parser.parse_args()
    conditions = begin(arguments.out)
    model, tokenizer = lk.load_model("smollm2")
    data = lk.DataConfig(train="builtin:places:validation")
    rows = read_rows(str(data.train), data, limit=arguments.rows, task="generation")
    examples = encode_rows(rows, tokenizer, data).examples
    prompts = [
        [i for i, label in zip(each.input_ids, each.labels, strict=True) if label < 0]
        for each in examples
    ]
    end = tokenizer.eos_token_id
    ours = of_lorakit(arguments.adapter, prompts)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        written = save_gguf(
            lk.Adapter.load(arguments.adapter), folder / "adapter.gguf", model.config
        )
        in_float32(packaged_file("smollm2"), folder / "base.gguf")
        for name, base in (
            ("float32", folder / "base.gguf"),
            ("packaged", packaged_file("smollm2")),
        ):
            theirs = of_llama_cpp(arguments.server, base, written, prompts)
            for which, answers in theirs.items():
                pairs = zip(ours[which], answers, strict=True)
                differ = [place for a, b in pairs if (place := alike(a, b, end)) is not None]
                told = {"equal": len(prompts) - len(differ), "of": len(prompts)}
                found[f"{name}, {which}"] = told | {"first_difference": differ}
                print(f"{name}, {which}: {found[f'{name}, {which}']}")
    changed = sum(a != b for a, b in zip(ours["adapter"], ours["base"], strict=True))
    print(f"the adapter changes {changed} of {len(prompts)} answers")
    write_result(arguments.out, {**conditions, "answers": found, "changed": changed})


if __name__ == "__main__":
    main()
