"""lm-eval: a task of choices over /v1/completions; writes the scores that it got to scores.json."""

import json
import os
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

url, key = sys.argv[1:]
os.environ["OPENAI_API_KEY"] = key
ROWS = [
    {"question": "red cat", "choices": ["old dog", "new"], "answer": 0},
    {"question": "the old house is", "choices": ["blue", "very small", "n"], "answer": 2},
]
Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
Path("pets.yaml").write_text(
    f"""
task: pets
dataset_path: json
dataset_kwargs:
  data_files:
    test: {Path("rows.jsonl").absolute()}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
)
results = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={
        "model": "wide",
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "remote",
        "auth_token": key,
        "max_length": 512,
    },
    tasks=["pets"],
    task_manager=TaskManager(include_path=str(Path.cwd()), include_defaults=False),
    bootstrap_iters=0,
)
assert "acc,none" in results["results"]["pets"]
scores = [
    {"context": context, "continuation": continuation, "score": float(score)}
    for sample in results["samples"]["pets"]
    for (context, continuation), (score, _) in zip(
        sample["arguments"], sample["filtered_resps"], strict=True
    )
]
Path("scores.json").write_text(json.dumps(scores))
