"""A tiny model that calls tools: its next token follows from the last one alone."""

import torch

from tiny_models import build
from tiny_tokenizers import CHAT, build_tokenizer

TEMPLATE = (
    "{% if tools %}tools:{% for tool in tools %} {{ tool.function | tojson }}{% endfor %}\n"
    "{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
    '{% for c in m.tool_calls or [] %}<call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</call>"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% if messages[-1].role == 'tool' %}!{% else %}?{% endif %}{% endif %}"
)
"""A chat template that writes tools and calls; the answer to a tool's turn begins otherwise."""
STEPS = {"?": "<call>", ">": "</s>", "}": "</s>", "!": "o", "o": "k", "k": "</s>"}
"""What the model writes after a token. After a tool's turn it answers ok, else it calls one."""
# The end of a text, and of the arguments, where a schema lets more of them follow.
STEPS |= {'"': "}"}
STEPS |= {"<|assistant|>": '{"name": "'}
"""The same under a chat template that writes no calls, in the server's own form."""


def calling_tokenizer(chat_template=TEMPLATE):
    """Bytes, and the beginnings of calls as tokens."""
    tokenizer = build_tokenizer(merges=('{"', '":'), chat_template=chat_template)
    tokenizer.add_tokens(["<call>", '{"name": "'])
    return tokenizer


def save_calling_model(place, **config):
    """Save the model in a folder, with its tokenizer."""
    tokenizer = calling_tokenizer()
    end = tokenizer.eos_token_id
    more = {"max_position_embeddings": 2048, "eos_token_id": end, "pad_token_id": None} | config
    model = build("llama", vocab_size=len(tokenizer), hidden_size=64, **more)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
        # A token that is listed has a dimension of its own, the others share the rest.
        embedding[:, : len(STEPS)] = 0
        for dimension, (last, following) in enumerate(STEPS.items()):
            before, after = map(tokenizer.convert_tokens_to_ids, (last, following))
            embedding[before] = 0
            embedding[before, dimension] = 1
            head[:, dimension] = 0
            head[after, dimension] = 5
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


PLAIN = CHAT
"""A chat template that writes neither tools nor calls."""
