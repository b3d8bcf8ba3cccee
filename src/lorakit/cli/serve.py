"""The verb serve: a server with one base and many adapters."""

from lorakit.cli.verbs import Result
from lorakit.config.serve import ServeConfig
from lorakit.serving.serve import say, serve_until_told


def run(settings: ServeConfig) -> Result:
    """Answer until the process is told to end."""
    return Result(text="", data={"url": serve_until_told(settings, note=say)})
