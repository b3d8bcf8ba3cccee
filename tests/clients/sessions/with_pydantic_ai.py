"""pydantic-ai: an agent's answer, whole and streamed, and one that calls a tool."""

import asyncio
import sys
from typing import Literal

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, key = sys.argv[1:]
provider = OpenAIProvider(base_url=f"{url}/v1", api_key=key)
model = OpenAIChatModel("small", provider=provider)
agent = Agent(model, model_settings={"temperature": 0, "max_tokens": 6})

whole = agent.run_sync("red cat")
assert whole.output
assert whole.usage.output_tokens <= 6


async def streamed():
    """The text of a stream."""
    async with agent.run_stream("red cat") as answer:
        return [text async for text in answer.stream_text(debounce_by=None)][-1]


assert asyncio.run(streamed()) == whole.output

calling = Agent(
    OpenAIChatModel("tiny", provider=provider),
    model_settings={"temperature": 0, "max_tokens": 300},
)
asked: list[str] = []


@calling.tool_plain  # type: ignore[untyped-decorator]
def weather(unit: Literal["C", "F"]) -> str:
    """The weather now."""
    asked.append(unit)
    return f"11 {unit}"


assert calling.run_sync("red cat").output == "ok"
assert len(asked) == 1
