"""OpenAI's client: answers, streams, log-probabilities, adapters, tools, and errors."""

import json
import sys

from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI

url, key = sys.argv[1:]
client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
messages = [{"role": "user", "content": "red cat"}]

assert [model.id for model in client.models.list()] == ["tiny", "small", "wide"]
assert client.models.retrieve("small").id == "small"

how = {"model": "small", "messages": messages, "temperature": 0, "max_tokens": 6}
whole = client.chat.completions.create(**how, logprobs=True, top_logprobs=3)
text = whole.choices[0].message.content
assert text
assert whole.model == "small"
assert whole.system_fingerprint.startswith("fp_")
assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3

chunks = list(
    client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
)
told = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
assert "".join(told) == text
assert chunks[-1].usage == whole.usage
assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}

terms = {"adapters": [{"name": "small", "weight": 0.5}, {"name": "wide", "weight": 0.5}]}
mixed = client.chat.completions.create(**how | {"model": "tiny"}, extra_body=terms)
assert mixed.system_fingerprint != whole.system_fingerprint

written = client.completions.create(
    model="wide", prompt=["red cat", "old"], max_tokens=4, temperature=0, logprobs=2, echo=True
)
assert len(written.choices) == 2
assert written.choices[0].text.startswith("red cat")
assert written.choices[0].logprobs.token_logprobs[0] is None
parts = client.completions.create(model="wide", prompt="red cat", max_tokens=4, stream=True, seed=3)
assert [part.choices[0].finish_reason for part in parts][-1] in ("length", "stop")


unit = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
tools = [{"type": "function", "function": {"name": "weather", "parameters": unit}}]
asked = {"model": "tiny", "temperature": 0, "tools": tools}
called = client.chat.completions.create(messages=messages, **asked).choices[0]
assert called.finish_reason == "tool_calls"
(call,) = called.message.tool_calls
assert call.function.name == "weather"
assert json.loads(call.function.arguments)["unit"] in "CF"
with client.chat.completions.stream(messages=messages, **asked) as stream:
    streamed = stream.get_final_completion().choices[0].message.tool_calls[0].function
assert (streamed.name, streamed.arguments) == ("weather", call.function.arguments)
told = {"role": "tool", "tool_call_id": call.id, "content": "11"}
turns = [*messages, called.message, told]
ended = client.chat.completions.create(messages=turns, **asked).choices[0]
assert (ended.finish_reason, ended.message.content) == ("stop", "ok")


def refused(kind, act):
    """The error's text, which has to be of a kind."""
    try:
        act()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


other = {**how, "model": "smal"}
assert "did you mean 'small'" in refused(
    NotFoundError, lambda: client.chat.completions.create(**other)
)
wrong = {**how, "temperature": -1}
assert "temperature" in refused(BadRequestError, lambda: client.chat.completions.create(**wrong))
stranger = OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
refused(AuthenticationError, stranger.models.list)
