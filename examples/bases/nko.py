"""A trained encoder-decoder that writes Manding in N'Ko, and verses to teach it: examples/nko.yaml.

pip install --no-deps detransliterator       (74 MB; MIT)
python examples/bases/nko.py [FOLDER]        (out/nko; seconds)

The package carries a fairseq transformer (8 blocks each side, width 128) that reads Manding in
Latin letters with its tones written, and verses in both scripts. As people usually write it, Latin
Manding is without tones, which N'Ko has; that is what an adapter can learn. transformers'
Blenderbot computes what this transformer does: norms come first, positions are a table.
"""

import importlib.util
import io
import json
import math
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

CHECKPOINT = "latin2nqo_001.38"
LATIN, NKO = "diane_parallel_002.emk", "diane_parallel_002.nqo"
"""The verses: in Maninka without tones, and in N'Ko."""
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
"""fairseq's first four tokens, in its order."""
PAD, END = 1, 2
WIDTH, POSITIONS = 128, 1024
NEVER = -100.0
"""What is added to the logits of tokens that only the encoder knows."""
LONGEST = 160
"""Characters of a verse; longer ones are left out."""
HELD_OUT = 20
"""Of each this many verses one is kept for validation."""


def package() -> Path:
    """The folder of the package's files."""
    spec = importlib.util.find_spec("detransliterator")
    if spec is None or spec.origin is None:
        sys.exit("pip install --no-deps detransliterator, which has the model and the verses")
    return Path(spec.origin).parent / "assets"


class _Ignored:
    """What else is in the checkpoint: settings and counts, of classes that are not installed."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _OnlyTensors(pickle.Unpickler):
    """Reads tensors and plain containers; no other class of a pickle is ever made."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"torch._utils": "_rebuild_tensor_v2", "collections": "OrderedDict"}
        is_known = known.get(module) == name or (module == "torch" and name.endswith("Storage"))
        return super().find_class(module, name) if is_known else _Ignored


def weights(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a fairseq checkpoint."""
    reader = SimpleNamespace(
        __name__="tensors",
        Unpickler=_OnlyTensors,
        load=lambda opened, **how: _OnlyTensors(opened, **how).load(),
    )
    content = io.BytesIO(file.read_bytes())
    read = torch.load(content, map_location="cpu", pickle_module=reader, weights_only=False)
    return {name: each for name, each in read["model"].items() if isinstance(each, Tensor)}


def tokens_of(file: Path) -> list[str]:
    """The tokens of a fairseq dictionary, by the names that a BPE with `</w>` has for them."""
    words = [line.rpartition(" ")[0] for line in file.read_text("utf-8").splitlines() if line]
    pieces = [word[:-2] if word.endswith("@@") else f"{word}</w>" for word in words]
    return [*SPECIAL, *pieces]


def make_tokenizer(
    merges: Sequence[tuple[str, ...]], vocabulary: Mapping[str, int]
) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of both scripts, of which each has tokens of the one vocabulary."""
    made = Tokenizer(
        models.BPE(
            vocab=dict(vocabulary),
            merges=[(first, second) for first, second in merges],
            unk_token="<unk>",
            end_of_word_suffix="</w>",
        )
    )
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", END)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def positions() -> Tensor:
    """fairseq's table of positions, (POSITIONS, WIDTH): its first one has the number PAD + 1."""
    steps = torch.arange(WIDTH // 2) * (-math.log(10_000) / (WIDTH // 2 - 1))
    angles = (torch.arange(POSITIONS) + PAD + 1)[:, None] * steps.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def make_model(
    found: Mapping[str, Tensor], sides: Mapping[str, Sequence[str]], vocabulary: Mapping[str, int]
) -> transformers.BlenderbotForConditionalGeneration:
    """The model with the checkpoint's weights.

    Args:
        found: the checkpoint's tensors.
        sides: the tokens of encoder and decoder, in the order of their embeddings.
        vocabulary: the tokens' numbers in the tokenizer.
    """
    blocks = sum(name.endswith("fc1.weight") for name in found) // 2
    config = transformers.BlenderbotConfig(
        vocab_size=len(vocabulary),
        d_model=WIDTH,
        encoder_layers=blocks,
        decoder_layers=blocks,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        activation_function="relu",
        scale_embedding=True,
        max_position_embeddings=POSITIONS,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=END,
        decoder_start_token_id=END,
        forced_eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = transformers.BlenderbotForConditionalGeneration(config)
    state = {f"model.{name}": each for name, each in found.items()}
    for side, tokens in sides.items():
        # A token that a side does not know is its <unk>.
        own = state[f"model.{side}.embed_tokens.weight"]
        rows = dict(zip(tokens, own, strict=False))
        table = torch.stack([rows.get(token, own[SPECIAL.index("<unk>")]) for token in vocabulary])
        state[f"model.{side}.embed_tokens.weight"] = table
        state[f"model.{side}.embed_positions.weight"] = positions()
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"].clone()
    written = set(sides["decoder"])
    state["final_logits_bias"] = torch.tensor(
        [[0.0 if token in written else NEVER for token in vocabulary]]
    )
    state["model.shared.weight"] = torch.zeros_like(state["lm_head.weight"])
    wanted = model.state_dict()
    model.load_state_dict({name: state[name] for name in wanted})
    return model


def make_base(assets: Path, folder: Path) -> None:
    """Write the model and its tokenizer as transformers reads them."""
    place = assets / CHECKPOINT
    sides = {
        "encoder": tokens_of(place / "data" / "dict.roman.txt"),
        "decoder": tokens_of(place / "data" / "dict.nqo.txt"),
    }
    _, *lines = (place / "data" / "bpe.code").read_text("utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines]
    pieces = [piece for first, second in merges for piece in (first, second, first + second)]
    names = dict.fromkeys([*sides["encoder"], *sides["decoder"], *pieces])
    vocabulary = {name: number for number, name in enumerate(names)}
    found = weights(place / "checkpoints" / "checkpoint_best.pt")
    make_model(found, sides, vocabulary).save_pretrained(folder)
    make_tokenizer(merges, vocabulary).save_pretrained(folder)


def write_verses(assets: Path, folder: Path) -> int:
    """Write rows of a verse in both scripts, for training and for validation; returns how many."""
    both = []
    for name in (LATIN, NKO):
        lines = (assets / "test_data" / name).read_text("utf-8-sig").splitlines()
        # Some are quoted, N'Ko begins with a mark of its direction, and verses with their number.
        both.append([re.sub(r"^\W*[\d߀-߉]+[.:]\s*", "", line).strip(' "\u200f') for line in lines])
    rows = [
        {"prompt": latin, "completion": nko}
        for latin, nko in zip(*both, strict=True)
        if latin and nko and len(latin) < LONGEST
    ]
    for name, is_held in (("train", False), ("validation", True)):
        lines = [
            json.dumps(row, ensure_ascii=False) + "\n"
            for number, row in enumerate(rows)
            if (number % HELD_OUT == 0) is is_held
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return len(rows)


def main(folder: Path) -> None:
    """Write everything into a folder, the same each time."""
    assets = package()
    make_base(assets, folder / "base")
    rows = write_verses(assets, folder)
    print(f"a transformer that writes N'Ko, and {rows:,} verses, in {folder}")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["out/nko"]))
