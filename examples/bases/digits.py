"""A ViT that reads digits from 0 to 4, and images of the others to teach it: examples/digits.yaml.

pip install scikit-learn
python examples/bases/digits.py [FOLDER]      (out/digits; a minute)

The digits are real, written by 43 people (E. Alpaydin and C. Kaynak, UCI, 1998); scikit-learn
carries them. No package has a small ViT, so one is trained here on a half of them.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 8
"""Pixels along a side of an image."""
KNOWN = range(5)
"""The digits that the base is trained on."""
STEPS, BATCH, RATE = 400, 64, 2e-3
HELD_OUT = 4
"""Of each this many images one is kept for validation."""


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """The images, (images, 3, 8, 8) from -1 to 1, and their digits, (images,)."""
    read = load_digits()
    grey = torch.tensor(read.images, dtype=torch.float32)[:, None] / 8 - 1
    return grey.expand(-1, 3, -1, -1), torch.tensor(read.target)


def make_base(folder: Path) -> float:
    """Train a ViT on the known digits and save it; returns its accuracy on images held out."""
    config = transformers.ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=2,
        num_labels=len(KNOWN),
    )
    model = transformers.ViTForImageClassification(config)
    pixels, digits = images()
    known = digits < len(KNOWN)
    pixels, digits = pixels[known], digits[known]
    held = torch.arange(len(digits)) % HELD_OUT == 0
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(int((~held).sum()), (BATCH,))
        logits = model(pixels[~held][rows]).logits
        F.cross_entropy(logits, digits[~held][rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    processor = {"image_processor_type": "ViTImageProcessor", "size": size, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    model.eval()
    with torch.no_grad():
        found = model(pixels[held]).logits.argmax(-1)
    return float((found == digits[held]).float().mean())


def write_images(folder: Path) -> None:
    """The images of the other digits, in a folder for each, for training and for validation."""
    pixels, digits = images()
    for number, (image, digit) in enumerate(zip(pixels, digits.tolist(), strict=True)):
        if digit in KNOWN:
            continue
        place = folder / ("validation" if number % HELD_OUT == 0 else "train") / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        grey = ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()
        Image.fromarray(grey).save(place / f"{number}.png")


def main(folder: Path) -> None:
    """Write everything into a folder, the same each time."""
    torch.manual_seed(0)
    accuracy = make_base(folder / "base")
    write_images(folder)
    print(f"a ViT that has {accuracy:.1%} of the digits 0 to 4, and images of 5 to 9, in {folder}")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["out/digits"]))
