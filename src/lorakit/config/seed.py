"""Seeds of any size, and the one that every generator of random numbers can take."""

import hashlib
from typing import Annotated

from pydantic import Field

LARGEST = 2**32 - 1
"""The largest seed of numpy's generator, which transformers sets beside torch's."""

Seed = Annotated[int, Field(ge=0)]


def generator_seed(seed: int) -> int:
    """The seed for generators: the seed itself, and for one beyond 32 bits a hash of it."""
    if seed <= LARGEST:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
