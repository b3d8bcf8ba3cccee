"""Tasks with labels, from settings to a file that PEFT loads with the same outputs."""

import json
import random

import pytest
import torch

import lorakit as lk
from references import in_both

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

ANIMALS = ("cat", "dog", "bird", "fish")
WORDS = ("red", "green", "big", "small", *ANIMALS)


def tagged(words):
    return {"words": words, "tags": ["B-ANIMAL" if each in ANIMALS else "O" for each in words]}


def of_classes(words):
    return {"text": " ".join(words), "labels": [one for one in ("cat", "dog") if one in words]}


def question(words):
    context = " ".join([*words, "cat"])
    return {"question": "big cat", "context": context, "answers": ["cat"]}


def pair(words):
    other = words[::-1] if words[0] in ANIMALS else ["red"]
    label = float(words[0] in ANIMALS)
    return {"text": " ".join(words), "text_pair": " ".join(other), "label": label}


ROWS = {
    "token-classification": tagged,
    "multi-label": of_classes,
    "question-answering": question,
    "embedding": pair,
}
LABELS = {
    "token-classification": "tags",
    "multi-label": "labels",
    "question-answering": "answers",
    "embedding": "label",
}
SCORES = {
    "token-classification": ["loss", "accuracy", "precision", "recall", "f1"],
    "multi-label": ["loss", "f1_micro", "f1_macro", "accuracy"],
    "question-answering": ["loss", "exact_match", "f1"],
    "embedding": ["loss", "spearman", "pearson"],
}


def trained(task, model, folder, *, steps):
    draw = random.Random(0)
    rows = [ROWS[task](draw.choices(WORDS, k=draw.randint(2, 5))) for _ in range(32)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = lk.DataConfig(train=str(file), validation=str(file))
    lora = lk.LoRAConfig(rank=4, targets=("q", "v"))
    how = {"steps": steps, "warmup_steps": 0, "learning_rate": 2e-2, "dtype": "float32"}
    how |= {"task": task, "model": str(model), "out": folder / "out", "data": data, "lora": lora}
    return lk.train(lk.TrainConfig(**how))


LONGER = ("multi-label", "embedding")


@pytest.mark.parametrize(
    "task", [pytest.param(t, marks=pytest.mark.thorough if t in LONGER else ()) for t in ROWS]
)
def test_a_task_is_learnt_saved_and_scored_again(task, tiny_bert, tmp_path):
    result = trained(task, tiny_bert, tmp_path, steps=12)
    assert result.last_loss < result.first_loss
    outputs = tmp_path / "outputs.jsonl"
    data = lk.DataConfig(validation=str(tmp_path / "rows.jsonl"))
    # In batches as those of the run: others have other negatives.
    again = lk.evaluate(adapter=result.out, data=data, outputs=outputs, batch_size=32)
    assert list(again) == SCORES[task]
    assert again == pytest.approx(result.scores, abs=1e-5)
    first = json.loads(outputs.read_text().splitlines()[0])
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert first["references"] == row[LABELS[task]]
    torch.testing.assert_close(*in_both(result.out, {"input_ids": torch.tensor([[5, 11, 6, 12]])}))


def test_a_batch_of_one_pair_has_nothing_to_compare(tiny_bert, tmp_path):
    def refused(*rows, **settings):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = lk.DataConfig(train=str(file))
        with pytest.raises(lk.LorakitError) as caught:
            lk.train(
                lk.TrainConfig(model=str(tiny_bert), out=tmp_path / "out", data=data, **settings)
            )
        return str(caught.value)

    two = [{"text": "red", "text_pair": "cat"}, {"text": "dog", "text_pair": "big"}]
    assert "batch_size is 1, and the loss of embedding compares" in refused(*two, batch_size=1)
    assert "rows.jsonl has one row, and the loss of embedding compares" in refused(two[0])
