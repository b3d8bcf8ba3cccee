"""llama-index's OpenAILike: chat, a stream, and texts."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

url, key = sys.argv[1:]
how = {"api_base": f"{url}/v1", "api_key": key, "temperature": 0, "max_tokens": 6}
chat = OpenAILike(model="small", is_chat_model=True, context_window=512, **how)
messages = [ChatMessage(role="user", content="red cat")]

answer = chat.chat(messages)
assert answer.message.content
assert "".join(part.delta or "" for part in chat.stream_chat(messages)) == answer.message.content
assert OpenAILike(model="small", context_window=512, **how).complete("red cat").text
