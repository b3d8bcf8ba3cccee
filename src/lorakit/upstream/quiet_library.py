"""Libraries without what they print: bitsandbytes' warning on import, transformers' progress bars.

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


@contextmanager
def without_bars() -> Iterator[None]:
    """Suppress the progress bars of transformers and the hub for as long as the context lasts."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def without_advice_on_processes() -> Iterator[None]:
    """Suppress transformers' advice on launching, for whoever joins the processes by himself."""
    logger = logging.getLogger("transformers.training_args")
    logger.addFilter(_is_no_advice)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "process group is initialized" not in record.getMessage()


def _is_of_use(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()
