"""A T5 with random weights, and dates in two forms to teach it: examples/dates.yaml.

python examples/bases/dates.py [FOLDER]      (out/dates; a few seconds)

No package has a small T5. A random one shows how such a run is set up, and learns this task all the
same; of a trained encoder-decoder examples/nko.yaml is one.
"""

import calendar
import json
import random
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

CHARACTERS = "abcdefghijklmnopqrstuvwxyzADFJMNOS0123456789 -"
SPECIAL = ["<pad>", "</s>", "<unk>"]


def make_t5(folder: Path) -> None:
    """An encoder-decoder whose tokens are characters."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokens.decoder = decoders.Fuse()
    tokens.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = transformers.T5Config(
        vocab_size=len(vocabulary),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def write_dates(file: Path, *, rows: int, draw: random.Random) -> None:
    """Rows of a date in words and in figures."""
    lines = []
    for _ in range(rows):
        year, month = draw.randint(1990, 2029), draw.randint(1, 12)
        day = draw.randint(1, calendar.monthrange(year, month)[1])
        words, figures = f"{day} {calendar.month_name[month]} {year}", f"{year}-{month:02}-{day:02}"
        lines.append(json.dumps({"prompt": words, "completion": figures}) + "\n")
    file.write_text("".join(lines))


def main(folder: Path) -> None:
    """Write everything into a folder, the same each time."""
    draw = random.Random(0)
    torch.manual_seed(0)
    make_t5(folder / "base")
    for name, rows in (("train", 2000), ("validation", 100)):
        write_dates(folder / f"{name}.jsonl", rows=rows, draw=draw)
    print(f"a T5, and dates, in {folder}")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["out/dates"]))
