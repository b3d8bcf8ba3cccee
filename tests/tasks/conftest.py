import pytest
from tiny_tokenizers import build_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that adds nothing to a text."""
    return build_tokenizer()
