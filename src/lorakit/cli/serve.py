"""The verb serve: a server with one base and many adapters."""

import sys

from lorakit.cli.verbs import Result
from lorakit.config.verbs import ServeConfig
from lorakit.serving.serve import serve


def run(settings: ServeConfig) -> Result:
    """Answer until the process is told to end."""
    served = serve(settings, note=lambda text: print(text, file=sys.stderr, flush=True))
    return Result(text="", data={"url": served})
