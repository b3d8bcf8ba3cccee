"""Embeddings of a real encoder, scored on STS-B before and after a short contrastive run."""

import json
from pathlib import Path

import pytest

import lorakit as lk

STSB = Path(__file__).parents[3] / "shared" / "data" / "stsb"
FIELDS = {"text": "sentence1", "text_pair": "sentence2"}


@pytest.mark.thorough
@pytest.mark.skipif(not STSB.is_dir(), reason="needs the data sets beside the repository")
def test_minilm_ranks_stsb_better_after_a_short_run(tmp_path):
    held = lk.DataConfig(
        validation=str(STSB / "validation.jsonl"), validation_rows=400, fields=FIELDS
    )
    before = lk.evaluate(model="minilm", task="embedding", data=held, batch_size=64)
    rows = map(json.loads, (STSB / "train.jsonl").read_text().splitlines())
    near = [{one: row[own] for one, own in FIELDS.items()} for row in rows if row["label"] >= 4]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, near)))
    result = lk.train(
        lk.TrainConfig(
            model="minilm",
            task="embedding",
            out=tmp_path / "out",
            data=lk.DataConfig(train=str(tmp_path / "pairs.jsonl"), max_length=64),
            lora=lk.LoRAConfig(targets=("attention", "mlp")),
            steps=20,
            batch_size=32,
            learning_rate=5e-4,
            warmup_steps=2,
            dtype="float32",
        )
    )
    after = lk.evaluate(adapter=result.out, data=held, batch_size=64)
    assert after["spearman"] > before["spearman"] > 0.8
