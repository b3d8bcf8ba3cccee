import pytest
from transformers import PreTrainedTokenizerFast

from tiny_tokenizers import build_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that adds nothing to a text."""
    return build_tokenizer()
