"""pydantic-ai: an agent's answer, whole and streamed."""

import asyncio
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, key = sys.argv[1:]
model = OpenAIChatModel("small", provider=OpenAIProvider(base_url=f"{url}/v1", api_key=key))
agent = Agent(model, model_settings={"temperature": 0, "max_tokens": 6})

whole = agent.run_sync("red cat")
assert whole.output
assert whole.usage.output_tokens <= 6


async def streamed():
    """The text of a stream."""
    async with agent.run_stream("red cat") as answer:
        return [text async for text in answer.stream_text(debounce_by=None)][-1]


assert asyncio.run(streamed()) == whole.output
