"""The verb push: an adapter verified, and sent to the Hugging Face hub with a model card."""

from __future__ import annotations

from lorakit.adapter.adapter import Adapter
from lorakit.cli.verbs import Result
from lorakit.config.verbs import PushConfig


def run(settings: PushConfig) -> Result:
    """Send the adapter; the result has the address of the commit."""
    adapter = Adapter.load(settings.adapter)
    address = adapter.push_to_hub(
        settings.repository,
        private=settings.private,
        revision=settings.revision,
        message=settings.message,
    )
    return Result(
        text=f"sent to {settings.repository}: {address}",
        data={
            "repository": settings.repository,
            "commit": address,
            "content_hash": adapter.content_hash(),
        },
    )
