"""LangChain: an answer, a stream, a batch, log-probabilities, and an agent with a tool."""

import sys
from typing import Literal

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

url, key = sys.argv[1:]
how = {"base_url": f"{url}/v1", "api_key": key, "temperature": 0, "max_tokens": 6}
chat = ChatOpenAI(model="small", **how)

answer = chat.invoke("red cat")
assert answer.content
assert answer.response_metadata["system_fingerprint"].startswith("fp_")
assert answer.usage_metadata["output_tokens"] <= 6
assert "".join(part.content for part in chat.stream("red cat")) == answer.content
assert [each.content for each in chat.batch(["red cat", "red cat"])] == [answer.content] * 2

told = ChatOpenAI(model="small", logprobs=True, top_logprobs=2, **how).invoke("red cat")
assert len(told.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
assert OpenAI(model="small", **how).invoke("red cat")


@tool  # type: ignore[untyped-decorator]
def weather(unit: Literal["C", "F"]) -> str:
    """The weather now."""
    return f"11 {unit}"


agent = create_agent(ChatOpenAI(model="tiny", **how | {"max_tokens": 300}), tools=[weather])
turns = agent.invoke({"messages": [("user", "red cat")]})["messages"]
assert [turn.type for turn in turns] == ["human", "ai", "tool", "ai"], turns
assert turns[2].content in ("11 C", "11 F")
assert turns[3].content == "ok"
