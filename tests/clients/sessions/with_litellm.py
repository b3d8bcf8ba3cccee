"""litellm: an answer, a stream, texts, a tool's call, and the server's errors as its kinds."""

import sys

import litellm

url, key = sys.argv[1:]
litellm.telemetry = False
how = {"api_base": f"{url}/v1", "api_key": key, "temperature": 0, "max_tokens": 6}
messages = [{"role": "user", "content": "red cat"}]

whole = litellm.completion(model="openai/small", messages=messages, **how)
text = whole.choices[0].message.content
assert text
assert whole.usage.completion_tokens <= 6

chunks = litellm.completion(model="openai/small", messages=messages, stream=True, **how)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text

written = litellm.text_completion(model="text-completion-openai/small", prompt="red cat", **how)
assert written.choices[0].text

unit = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
tools = [{"type": "function", "function": {"name": "weather", "parameters": unit}}]
asked = how | {"max_tokens": 300, "tools": tools}
called = litellm.completion(model="openai/tiny", messages=messages, **asked).choices[0]
assert called.finish_reason == "tool_calls"
assert called.message.tool_calls[0].function.name == "weather"
parts = list(litellm.completion(model="openai/tiny", messages=messages, stream=True, **asked))
rebuilt = litellm.stream_chunk_builder(parts).choices[0].message.tool_calls[0].function
assert rebuilt.arguments == called.message.tool_calls[0].function.arguments

for kind, change in (
    (litellm.NotFoundError, {"model": "openai/nobody"}),
    (litellm.AuthenticationError, {"api_key": "wrong"}),
):
    try:
        litellm.completion(**{"model": "openai/small", "messages": messages, **how, **change})
    except kind:
        continue
    raise AssertionError(f"no {kind.__name__}")
