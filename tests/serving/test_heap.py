"""Threads of a server take their memory from few heaps."""

import re
import subprocess
import sys

import pytest

GROWN = """
import ctypes, sys, threading
from lorakit.serving.heap import share_heap

if sys.argv[1] == "few":
    print(share_heap())
together = threading.Barrier(9)

def work():
    kept = [bytearray(1000) for _ in range(100)]
    together.wait()
    together.wait()

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
together.wait()
ctypes.CDLL(None).malloc_stats()
together.wait()
"""


def arenas(how):
    told = subprocess.run(
        [sys.executable, "-c", GROWN, how], capture_output=True, text=True, check=True
    )
    return told.stdout.strip(), len(re.findall(r"^Arena \d+:", told.stderr, flags=re.MULTILINE))


def is_glibc():
    import platform

    return platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(not is_glibc(), reason="counts the heaps of glibc")
def test_eight_threads_share_two_heaps():
    assert arenas("few") == ("True", 2)
    assert arenas("as it comes")[1] > 4


FREED = """
import ctypes
from lorakit.serving.heap import give_back

def resident():
    line = next(each for each in open("/proc/self/status") if each.startswith("VmRSS"))
    return int(line.split()[1])

kept, freed = [], []
for _ in range(2000):
    freed.append(bytearray(50_000))
    kept.append(bytearray(600))
before = resident()
freed.clear()
between = resident()
print(give_back(), before - between, between - resident())
"""


@pytest.mark.skipif(not is_glibc(), reason="another C library has no heaps of this kind")
def test_what_is_free_between_what_is_in_use_is_given_back():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    gave, by_itself, then = done.stdout.split()
    assert gave == "True"
    assert int(then) > 80_000 > int(by_itself)  # of 100 MB, in kB
