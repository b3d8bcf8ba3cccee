"""Only the engine's thread keeps a team of threads that compute."""

import os
import subprocess
import sys
import threading

import pytest

import lorakit as lk
from lorakit.serving.thread_teams import without_team
from references import attach_random

COUNTED = """
import os, sys, threading, time
import torch
from lorakit.config.serve import ServeConfig
from lorakit.serving.serve import prepared

def beside():
    # A team ends a little later than its thread.
    time.sleep(0.3)
    return len(os.listdir("/proc/self/task")) - threading.active_count()

before = beside()
folder, budget = sys.argv[1:]
how = {"adapters": folder, "model": "smollm2", "budget_bytes": budget}
_, catalog = prepared(ServeConfig(**how))
catalog.load("again", "first")
catalog.held("second")
catalog.choose("first")
print(beside() - before)
torch.ones(1 << 20).sum()
print(beside() - before)
"""


def test_work_is_done_elsewhere_and_its_thread_has_ended():
    done = without_team(threading.current_thread)
    assert done is not threading.current_thread()
    assert not done.is_alive()


def test_what_work_raises_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        without_team(lambda: 1 // 0)


@pytest.mark.thorough
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts the threads of Linux")
def test_loads_leave_no_threads_that_compute(tmp_path):
    model, _ = lk.load_model("smollm2")
    for seed, name in enumerate(("first", "second")):
        attach_random(model, seed=seed, targets=("all-linear",))
        lk.extract(model).save(tmp_path / name)
        lk.detach(model)
    one = sum(file.stat().st_size for file in (tmp_path / "first").iterdir())
    program = [sys.executable, "-c", COUNTED, str(tmp_path), str(int(1.5 * one))]
    others = {"OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    variables = os.environ | {"OMP_NUM_THREADS": "2"} | others
    told = subprocess.run(program, env=variables, capture_output=True, text=True, check=True)
    # The second number shows that what computes in a thread that stays would be counted.
    assert told.stdout.split() == ["0", "1"]
