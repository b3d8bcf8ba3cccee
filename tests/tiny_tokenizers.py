"""Tokenizers small enough to read: a token is a byte, a merge or a special token."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def build_tokenizer(
    *,
    starts: bool = False,
    ends: bool = False,
    merges: tuple[str, ...] = (),
    **settings: str | None,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer.

    Args:
        starts: write <s> before a text.
        ends: write </s> after a text.
        merges: pairs of characters that are one token.
        settings: further settings, such as chat_template.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(pair[0], pair[1]) for pair in merges]
    vocabulary = [*alphabet, *(first + second for first, second in pairs)]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=pairs)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    before, after = "<s> " if starts else "", " </s>" if ends else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}",
        pair=f"{before}$A $B:1{after}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    known = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT} | settings
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **known)
