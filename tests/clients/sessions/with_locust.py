"""locust: eight users who ask without pause for a few seconds, none of whom is refused."""

import sys

import gevent
from locust import HttpUser, constant, task
from locust.env import Environment

url, key = sys.argv[1:]
SECONDS = 5


class Asker(HttpUser):
    """A user who asks adapters in turn."""

    host = url
    wait_time = constant(0)

    @task
    def ask(self):
        """Ask each adapter once."""
        for model in ("small", "wide"):
            body = {"model": model, "prompt": "red cat", "max_tokens": 4, "ignore_eos": True}
            self.client.post(
                "/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}
            )


environment = Environment(user_classes=[Asker])
runner = environment.create_local_runner()
runner.start(8, spawn_rate=8)
gevent.spawn_later(SECONDS, runner.quit)
runner.greenlet.join()
total = environment.stats.total
assert total.num_requests > 20
assert total.num_failures == 0, environment.stats.errors
