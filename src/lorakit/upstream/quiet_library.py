"""bitsandbytes without its warning, on import, about a kernel of the hub that lorakit omits.

Importing this module imports neither torch nor bitsandbytes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_library() -> Iterator[None]:
    """Suppress bitsandbytes' warning for as long as the context lasts."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_is_of_use)
    try:
        yield
    finally:
        logger.removeFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()
