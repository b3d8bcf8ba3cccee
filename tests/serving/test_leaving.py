"""A client that leaves ends its answers at once."""

import asyncio
import gc

import pytest

pytest.importorskip("fastapi")

from lorakit.serving.api.answering import EventStream
from lorakit.serving.api.asking import Answering


class Ended(Answering):
    """Answers that know how often they were ended."""

    def __init__(self):
        self.times = 0

    def cancel(self):
        self.times += 1


async def leave_while_sent_to(answering):
    async def events():
        while True:
            yield "data: more\n\n"

    sending = asyncio.Event()

    async def send(message):
        if message["type"] == "http.response.body":
            sending.set()
            # The client reads nothing.
            await asyncio.Event().wait()

    async def receive():
        await sending.wait()
        return {"type": "http.disconnect"}

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    await EventStream(answering, events())(scope, receive, send)


def test_a_client_that_leaves_while_it_is_sent_to_ends_its_answers_without_a_collection():
    answering = Ended()
    gc.disable()
    try:
        asyncio.run(leave_while_sent_to(answering))
    finally:
        gc.enable()
    assert answering.times == 1
