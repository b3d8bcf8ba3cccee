"""AdapterBank and threads: adapters come and go in one while another runs forward passes."""

import threading

import pytest
import torch

import lorakit as lk
from lorakit.attachment.state import active_name
from references import attach_random, outputs
from tiny_models import build, example_inputs

NAMES = ("one", "two", "three", "four")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, name in enumerate(NAMES):
        model = build("llama")
        targets = ("embed", "q") if name == "four" else ("q", "v", "down")[: seed + 1]
        attach_random(model, seed=seed, rank=seed + 1, targets=targets)
        found[name] = lk.extract(model).save(root / name)
    return found


def together(*actions) -> None:
    """Run actions in threads of their own, and raise what one of them raised."""
    errors: list[BaseException] = []

    def run(action):
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(a,), daemon=True) for a in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_two_threads_that_load_one_name_wait_for_each_other(folders):
    bank = lk.AdapterBank(build("llama"))
    together(*[lambda: bank.load("name", folders["one"])] * 2)
    assert bank.names == ("name",)
    assert sum("@name" in path for path, _ in bank.model.named_modules()) > 0
    together(*[lambda n=n: bank.load(n, folders[n]) for n in NAMES])
    assert set(bank.names) == {"name", *NAMES}


@pytest.mark.parametrize(
    "limited",
    [pytest.param(False, marks=pytest.mark.thorough), True],
    ids=["unlimited", "evicting"],
)
def test_forward_passes_notice_nothing_of_what_comes_and_goes(folders, limited):
    model = build("llama")
    size = max(lk.Adapter.load(folder).size_bytes for folder in folders.values())
    bank = lk.AdapterBank(model, budget_bytes=3 * size if limited else None)
    for name in ("one", "two"):
        bank.load(name, folders[name])
    inputs = example_inputs(model, rows=3)
    choices = (["one", None, "two"], "two", ["two", "one", "two"], None)

    def answer(names):
        with bank.route(names):
            return outputs(model, inputs)

    expected = [answer(names) for names in choices]
    done = threading.Event()

    def serve():
        try:
            for turn in range(60):
                at = turn % len(choices)
                assert torch.equal(answer(choices[at]), expected[at]), f"turn {turn}"
        finally:
            done.set()

    def come_and_go():
        while not done.is_set():
            for name in ("three", "four"):
                bank.load(name, folders[name])
            for name in ("four", "three"):
                bank.unload(name)

    together(serve, come_and_go)


def test_a_switch_and_a_merge_wait_for_the_end_of_a_route(folders):
    bank = lk.AdapterBank(build("llama"))
    for name in NAMES:
        bank.load(name, folders[name])
    inputs = example_inputs(bank.model, rows=2)
    order = []

    def adapt():
        order.append("asks")
        bank.switch("two")
        order.append("switched")
        bank.merge("one")
        order.append("merged")

    with bank.route(["one", None]):
        before = outputs(bank.model, inputs)
        thread = threading.Thread(target=adapt, daemon=True)
        thread.start()
        thread.join(0.2)
        assert order == ["asks"]
        assert torch.equal(outputs(bank.model, inputs), before)
    thread.join(20)
    assert order == ["asks", "switched", "merged"]
    assert active_name(bank.model) == "one"


@pytest.mark.thorough
def test_routes_of_many_threads_and_replacements_answer_as_one_of_the_contents(folders):
    bank = lk.AdapterBank(build("llama"))
    inputs = example_inputs(bank.model, rows=2)
    allowed = []
    for name in ("one", "three"):
        bank.load("name", folders[name])
        with bank.route(["name", None]):
            allowed.append(outputs(bank.model, inputs))
    bank.switch("name")

    def serve():
        for _ in range(40):
            with bank.route(["name", None]):
                found = outputs(bank.model, inputs)
                assert any(torch.equal(found, one) for one in allowed)

    def replace():
        for turn in range(40):
            bank.load("name", folders[("one", "three")[turn % 2]])

    together(serve, serve, replace)
    single = build("llama")
    lk.attach(single, lk.Adapter.load(folders["three"]))
    # What answers outside of routes is the latest content, too.
    assert torch.equal(outputs(bank.model, inputs), outputs(single, inputs))


def test_many_who_hold_at_once_leave_each_other_room(folders):
    size = max(lk.Adapter.load(folder).size_bytes for folder in folders.values())
    bank = lk.AdapterBank(build("llama"), budget_bytes=size)
    for name in NAMES:
        bank.load(name, folders[name])

    def hold(first):
        for turn in range(10):
            name = NAMES[(first + turn) % len(NAMES)]
            assert bank.hold(name).content_hash == lk.Adapter.load(folders[name]).content_hash()

    together(*[lambda first=first: hold(first) for first in range(len(NAMES))])
    assert 0 < bank.resident_bytes <= size
