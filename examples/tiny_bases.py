"""Tiny bases and data for examples/images.yaml and examples/dates.yaml: nothing is downloaded.

python examples/tiny_bases.py [FOLDER]      (out/tiny; a few seconds)

They are a ViT and a T5 with random weights, images of discs in three colours, and dates in two
forms. Random bases show how these runs are set up, not how good they get: name a trained one in
`model` for that.
"""

import calendar
import json
import random
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

COLOURS = {"blue": (40, 60, 220), "green": (30, 190, 60), "red": (220, 40, 30)}
SIZE = 32
"""Pixels along a side of an image."""
CHARACTERS = "abcdefghijklmnopqrstuvwxyzADFJMNOS0123456789 -"
SPECIAL = ["<pad>", "</s>", "<unk>"]


def make_vit(folder: Path) -> None:
    """A classifier of images with the processor that makes them ready."""
    config = transformers.ViTConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        num_labels=10,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    processor = {"image_processor_type": "ViTImageProcessor", "size": size, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def draw_discs(folder: Path, *, of_each: int, draw: random.Random) -> None:
    """Images of a disc on a grey ground, in a folder for each colour of the disc."""
    from PIL import Image, ImageDraw

    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(of_each):
            image = Image.new("RGB", (SIZE, SIZE), (draw.randint(60, 200),) * 3)
            x, y, radius = draw.randint(8, 24), draw.randint(8, 24), draw.randint(5, 9)
            shade = tuple(max(0, min(255, value + draw.randint(-30, 30))) for value in colour)
            ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), shade)
            image.save(folder / name / f"{number}.png")


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
    make_vit(folder / "vit")
    make_t5(folder / "t5")
    for name, images, dates in (("train", 40, 2000), ("validation", 10, 100)):
        draw_discs(folder / "discs" / name, of_each=images, draw=draw)
        write_dates(folder / f"dates_{name}.jsonl", rows=dates, draw=draw)
    print(f"bases and data are in {folder}")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["out/tiny"]))
