"""Writing a folder: whatever stops it, the folder holds the old adapter or the new one, whole."""

import errno
import functools
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter.handmade import linear, patterns, slices
from lorakit.adapter import atomic_write as storage
from lorakit.adapter.adapter import Adapter
from lorakit.errors import OutputError

OLD, NEW = linear().content_hash(), slices().content_hash()
STEPS = ("mkdir", "rename", "replace", "rmdir")
can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def held(folder: Path) -> str:
    return Adapter.load(folder).content_hash()


def in_child(work: Callable[[], object]) -> int:
    """The process id of a copy of this process that does the work and then ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking while other threads exist
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def save_until(step: int, folder: Path) -> None:
    """Overwrite a folder, and end the process like a kill before the step of that number."""
    done = 0

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def stop_or_go(*arguments: object, **keywords: object) -> object:
            nonlocal done
            if done == step:
                os._exit(9)
            done += 1
            return original(*arguments, **keywords)

        return stop_or_go

    for owner, name in [*((Path, name) for name in STEPS), (os, "fsync")]:
        setattr(owner, name, counted(getattr(owner, name)))
    slices().save(folder, overwrite=True)


@can_fork
def test_a_kill_at_any_step_leaves_the_old_adapter_or_the_new_one(tmp_path: Path) -> None:
    seen = []
    for step in range(100):
        folder = linear().save(tmp_path / str(step))
        (folder / "log.jsonl").write_text("kept")
        child = in_child(functools.partial(save_until, step, folder))
        _, status = os.waitpid(child, 0)
        seen.append(held(folder))
        assert (folder / "log.jsonl").read_text() == "kept"
        assert held(patterns().save(folder, overwrite=True)) == patterns().content_hash()
        assert not (folder / storage.PENDING).exists()
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert 8 < len(seen) < 100
    switch = seen.index(NEW)
    assert switch > 0
    assert seen == [OLD] * switch + [NEW] * (len(seen) - switch)


@can_fork
def test_a_kill_at_any_step_leaves_no_half_of_a_new_folder(tmp_path: Path) -> None:
    for step in range(100):
        folder = tmp_path / f"{step}" / "new"
        child = in_child(functools.partial(save_until, step, folder))
        _, status = os.waitpid(child, 0)
        if folder.exists():
            assert held(folder) == NEW
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert held(folder) == NEW
    assert 5 < step < 100


@pytest.mark.thorough
@can_fork
def test_a_kill_at_a_random_moment_loses_nothing(tmp_path: Path) -> None:
    folder = linear().save(tmp_path / "a")

    def save_for_ever() -> None:
        while True:
            slices().save(folder, overwrite=True)
            linear().save(folder, overwrite=True)

    clock = random.Random(0)
    for _ in range(12):
        child = in_child(save_for_ever)
        time.sleep(clock.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert held(folder) in (OLD, NEW)


@pytest.mark.parametrize(
    ("existing", "failing", "counts"),
    [
        (False, 0, False),
        (False, 4, False),
        (False, 5, True),
        (True, 0, False),
        (True, 4, False),
        (True, 5, True),
        (True, 6, True),
    ],
)
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, failing: int, counts: bool
) -> None:
    folder = tmp_path / "a"
    if existing:
        linear().save(folder)
    before = sorted(tmp_path.rglob("*"))
    calls = iter(range(100))
    sync = os.fsync

    def fsync(handle: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match=r"bytes could not be written to .*: No space left"):
        slices().save(folder, overwrite=True)
    monkeypatch.undo()
    if counts:  # the new files were in the folder; only the last sync was missing
        assert held(folder) == NEW
    else:
        assert sorted(tmp_path.rglob("*")) == before
        assert not existing or held(folder) == OLD


def test_what_does_not_read_back_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = linear().save(tmp_path / "a")
    honest = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: honest(path)[:-1])
    with pytest.raises(OutputError, match="reads back differently from what was written"):
        slices().save(folder, overwrite=True)
    monkeypatch.undo()
    assert held(folder) == OLD


def test_the_leftovers_of_a_killed_process_do_no_harm(tmp_path: Path) -> None:
    folder = linear().save(tmp_path / "a")
    (tmp_path / ".a.tmp-1-dead").mkdir()
    (folder / f"{storage.PENDING}-1-dead").mkdir()
    (folder / f"{storage.PENDING}-1-dead" / "lorakit.json").write_text("half")
    assert held(folder) == OLD
    assert held(slices().save(folder, overwrite=True)) == NEW


def test_a_folder_that_cannot_be_written_to_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="could not be written to"):
        linear().save(tmp_path / "file" / "a")


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    for name in ("a", "inner/b"):
        (folder / name).write_text(name)


def test_a_folder_filled_by_other_code_is_synced_checked_and_then_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int | str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(handle: int) -> None:
        done.append(os.fstat(handle).st_ino)
        sync(handle)

    def renamed(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    target = tmp_path / "new" / "folder"
    storage.write_new_folder(target, fill=fill, check=lambda folder: done.append("check"))
    assert (target / "inner" / "b").read_text() == "inner/b"
    inside = {path.stat().st_ino for path in target.rglob("*")}
    assert set(done[:3]) == inside
    assert done[3:] == ["check", target.stat().st_ino, "rename", target.parent.stat().st_ino]


def test_a_folder_that_does_not_pass_its_check_is_gone(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        raise OutputError(f"{(folder / 'a').read_text()} is wrong")

    with pytest.raises(OutputError, match=r"^a is wrong$"):
        storage.write_new_folder(tmp_path / "folder", fill=fill, check=check)
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="exists: choose another folder"):
        storage.write_new_folder(tmp_path / "folder", fill=fill, check=check)
