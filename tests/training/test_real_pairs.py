"""Embeddings of a real encoder, scored on STS-B before and after a short run."""

from pathlib import Path

import pytest

import lorakit as lk

STSB = Path(__file__).parents[3] / "shared" / "data" / "stsb"
FIELDS = {"text": "sentence1", "text_pair": "sentence2"}


@pytest.mark.thorough
@pytest.mark.skipif(not STSB.is_dir(), reason="needs the data sets beside the repository")
def test_minilm_keeps_its_ranks_of_stsb_and_lowers_their_loss(tmp_path):
    # Trained for embeddings, it ranks the pairs with 0.867 already.
    held = lk.DataConfig(
        validation=str(STSB / "validation.jsonl"), validation_every=5, fields=FIELDS
    )
    with pytest.warns(UserWarning, match="columns that are not read: idx"):
        before = lk.evaluate(model="minilm", task="embedding", data=held, batch_size=64)
    assert before["spearman"] > 0.8
    result = lk.train(
        lk.TrainConfig(
            model="minilm",
            task="embedding",
            out=tmp_path / "out",
            data=lk.DataConfig(train=str(STSB / "train.jsonl"), fields=FIELDS, max_length=64),
            lora=lk.LoRAConfig(targets=("attention", "mlp")),
            steps=25,
            batch_size=16,
            learning_rate=1e-3,
            warmup_steps=3,
            dtype="float32",
        )
    )
    with pytest.warns(UserWarning, match="columns that are not read: idx"):
        after = lk.evaluate(adapter=result.out, data=held, batch_size=64)
    assert after["loss"] < before["loss"]
    assert after["spearman"] > before["spearman"] - 0.01
