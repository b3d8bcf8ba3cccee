"""Image classification from a folder of images: trained, scored again, mistakes told at once."""

import json

import pytest
import torch

import lorakit as lk
from lorakit.config.train import DataConfig
from lorakit.data.rows import read_rows
from lorakit.errors import DataError
from references import in_both
from tiny_models import build

Image = pytest.importorskip("PIL.Image")
COLOURS = {"green": (20, 200, 40), "red": (220, 30, 20)}


@pytest.fixture
def photos(tmp_path):
    """Images of two colours, each a little different, in a folder for each."""
    shades = torch.Generator().manual_seed(0)
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            moved = torch.randint(-20, 20, (3,), generator=shades).tolist()
            shade = tuple(max(0, value + by) for value, by in zip(colour, moved, strict=True))
            Image.new("RGB", (12, 10), shade).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def tiny_vit(tmp_path):
    """A tiny image classifier of three classes, with its processor."""
    folder = tmp_path / "vit"
    build("vit").save_pretrained(folder)
    size = {"height": 8, "width": 8}
    how = {"image_processor_type": "ViTImageProcessor", "size": size, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(how))
    return folder


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.thorough
def test_a_folder_of_images_is_learnt_and_scored_again(tiny_vit, photos, tmp_path):
    data = lk.DataConfig(train=str(photos), validation=str(photos))
    config = lk.TrainConfig(
        model=str(tiny_vit),
        out=tmp_path / "out",
        data=data,
        # Its head is for three classes.
        fresh_head=True,
        lora=lk.LoRAConfig(rank=4, targets=("q", "v")),
        dtype="float32",
        steps=12,
        warmup_steps=0,
        learning_rate=2e-2,
    )
    result = lk.train(config)
    assert result.last_loss < result.first_loss
    assert result.scores["accuracy"] == 1.0
    outputs = tmp_path / "outputs.jsonl"
    again = lk.evaluate(
        adapter=result.out, data=DataConfig(validation=str(photos)), outputs=outputs
    )
    assert again == pytest.approx(result.scores, abs=1e-5)
    torch.testing.assert_close(*in_both(result.out, {"pixel_values": torch.randn(2, 3, 8, 8)}))
    first = json.loads(outputs.read_text().splitlines()[0])
    assert first["references"] == "green"
    assert first["image"].endswith("green/0.png")


def test_a_folder_for_each_class_is_read_and_mistakes_are_told(photos):
    rows = read_rows(str(photos), DataConfig())
    assert (rows.task, rows.labels, len(rows)) == ("image-classification", ("green", "red"), 16)
    file = photos / "list.jsonl"
    some = [{"image": str(photos / "red" / "0.png"), "label": "red"}]
    some += [{"image": "nowhere.png", "label": "red"}, {"image": str(file)}]
    file.write_text("".join(json.dumps(row) + "\n" for row in some))
    with pytest.raises(DataError) as caught:
        read_rows(str(file), DataConfig())
    assert "line 2: there is no file nowhere.png" in str(caught.value)
    assert "line 3: the label is missing" in str(caught.value)
    (photos / "loose.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 images beside the folders of its classes, such as"):
        read_rows(str(photos), DataConfig())


def test_what_is_no_image_among_the_classes_is_told(photos):
    (photos / "red" / "photo.heic").write_bytes(b"")
    (photos / "red" / ".hidden").write_bytes(b"")
    (photos / "blue").mkdir()
    with pytest.raises(DataError) as caught:
        read_rows(str(photos), DataConfig())
    for part in ("(2 problems)", "blue: no image is in this folder", "red/photo.heic: is no image"):
        assert part in str(caught.value)


def test_a_file_that_is_no_image_is_named(photos, tiny_vit, tmp_path):
    (photos / "red" / "x.png").write_bytes(b"nothing")
    config = lk.TrainConfig(
        model=str(tiny_vit),
        out=tmp_path / "out",
        data=lk.DataConfig(train=str(photos)),
        fresh_head=True,
    )
    with pytest.raises(DataError, match=r"x\.png is no image that can be read"):
        lk.train(config)
