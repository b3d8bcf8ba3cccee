"""The queue: clients and adapters take turns, and a full one tells when there is room."""

import pytest

from lorakit.serving.admission import LONGEST_WAIT_S, Queue, QueueFullError
from lorakit.serving.requests import Request, Use


def request(client="", key="", tokens=4):
    """A request with no more than a queue looks at."""
    use = Use()
    vars(use)["key"] = key
    made = object.__new__(Request)
    vars(made).update(client=client, use=use, prompt=[1] * (tokens - 1), max_tokens=1)
    return made


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def left(queue):
    return [(each.client, each.use.key) for each in iter(queue.take, None)]


def test_clients_take_turns_and_adapters_within_each():
    queue = Queue(100, 10_000)
    for key in "aaab":
        queue.put([request("busy", key)])
    for key in "ac":
        queue.put([request("rare", key)])
    assert left(queue) == [
        ("busy", "a"),
        ("rare", "a"),
        ("busy", "b"),
        ("rare", "c"),
        ("busy", "a"),
        ("busy", "a"),
    ]


def test_what_is_removed_takes_no_turn():
    queue = Queue(100, 10_000)
    gone, stays = request("one"), request("two", "b")
    queue.put([gone, stays])
    queue.remove([gone])
    assert len(queue) == 1
    assert left(queue) == [("two", "b")]
    queue.put([request(tokens=10_000)])


def test_places_are_kept_for_requests_that_are_being_prepared():
    queue = Queue(3, 1000)
    queue.put([request()])
    with queue.reserved(2), pytest.raises(QueueFullError, match="3 requests are waiting"):
        queue.check_room()
    with pytest.raises(QueueFullError), queue.reserved(3):
        pass
    queue.put([request()] * 2)


def test_a_full_queue_tells_when_there_is_room_by_how_fast_requests_left_it():
    clock = Clock()
    queue = Queue(8, 1000, clock=clock)
    with pytest.raises(QueueFullError) as told:
        queue.put([request()] * 9)
    assert told.value.retry_after_s == 1
    queue.put([request() for _ in range(8)])
    for _ in range(4):
        clock.now += 3.0
        queue.take()
        queue.put([request()])
    clock.now += 3.0
    with pytest.raises(QueueFullError) as told:
        queue.put([request(), request()])
    assert told.value.retry_after_s == 6
    with pytest.raises(QueueFullError) as told:
        queue.put([request()])
    assert told.value.retry_after_s == 3
    clock.now += 10_000.0
    with pytest.raises(QueueFullError) as told:
        queue.put([request()])
    assert told.value.retry_after_s == LONGEST_WAIT_S


def test_a_queue_full_of_tokens_tells_so_too():
    clock = Clock()
    queue = Queue(100, 40, clock=clock)
    queue.put([request(tokens=10) for _ in range(5)])
    clock.now += 2.0
    queue.take()
    clock.now += 2.0
    with pytest.raises(QueueFullError, match="no more than 40") as told:
        queue.put([request(tokens=20)])
    # 20 tokens beyond are two of the requests that wait.
    assert told.value.retry_after_s == 4
