"""inspect-ai: an evaluation with a solver and a scorer, and log-probabilities of a sample."""

import sys
import tempfile

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

url, key = sys.argv[1:]
config = GenerateConfig(temperature=0, max_tokens=6, logprobs=True, top_logprobs=2)
model = get_model("openai-api/lorakit/small", base_url=f"{url}/v1", api_key=key, config=config)
rows = [Sample(input="red cat", target=" "), Sample(input="old", target=" ")]
task = Task(dataset=rows, solver=generate(), scorer=includes())

with tempfile.TemporaryDirectory() as logs:
    (log,) = eval(task, model=model, log_dir=logs, display="none")
    # The samples are read when they are asked for.
    assert log.status == "success", log.error
    assert len(log.samples) == 2
    assert log.samples[0].output.completion
    assert log.samples[0].output.choices[0].logprobs.content
