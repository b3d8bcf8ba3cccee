"""Runs programs in processes of their own, forked from one that has imported what they need.

A new Python spends more time on importing torch, transformers and lorakit than most programs need.
The process they are forked from has none of the checks of shapes that tests run with.
"""

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

IMPORTED = ("torch._dynamo", "transformers.trainer", "lorakit.bank", "lorakit.training.run")
IGNORE = ("-W", "ignore")
FORKS = sys.platform == "linux"
"""Elsewhere a fork of a process that has imported torch can hang."""


@dataclass(frozen=True)
class Started:
    """A program that runs in a process of its own."""

    pid: int
    finish: Callable[[], tuple[int, str, str]]
    """Waits for its end, and gives its exit code, what it printed and its messages."""

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


class Forks:
    """The process that others are forked from; it starts with the first program."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parent: subprocess.Popen[str] | None = None

    def run(self, program: str, *arguments: str, **environment: str) -> str:
        """Run a program and return what it printed; the arguments are those of `start`."""
        code, printed, problem = self.start(program, *arguments, **environment).finish()
        assert code == 0, problem[-3000:]
        return printed

    def start(self, program: str, *arguments: str, **environment: str) -> Started:
        """Start a program, of which one runs at a time.

        Args:
            program: Python, without `from __future__`.
            arguments: Its `sys.argv` from the second word on.
            environment: Variables beside those of this process.
        """
        own = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        if FORKS:
            return self._fork(program, arguments, own, own | environment)
        process = subprocess.Popen(
            [sys.executable, *IGNORE, "-c", program, *arguments],
            env=own | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        def finish() -> tuple[int, str, str]:
            printed, problem = process.communicate()
            return process.returncode, printed, problem

        return Started(process.pid, finish)

    def close(self) -> None:
        """End the process."""
        if self._parent:
            self._parent.communicate()
            self._parent = None

    def _fork(
        self, program: str, arguments: Sequence[str], own: dict[str, str], given: dict[str, str]
    ) -> Started:
        if self._parent is None:
            command = [sys.executable, *IGNORE, __file__]
            self._parent = subprocess.Popen(
                command, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        pipe = self._parent.stdout
        assert pipe is not None
        files = [str(self._folder / name) for name in ("stdout", "stderr")]
        asked = json.dumps([program, arguments, given, files])
        print(asked, file=self._parent.stdin, flush=True)
        pid = int(pipe.readline())

        def finish() -> tuple[int, str, str]:
            code = int(pipe.readline())
            printed, problem = (Path(file).read_text(encoding="utf-8") for file in files)
            return code, printed, problem

        return Started(pid, finish)


def serve() -> None:
    """Fork a process for each program that is asked for, and print its number and exit code."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(execute(*json.loads(line)))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def execute(
    program: str, arguments: list[str], environment: dict[str, str], files: list[str]
) -> int:
    """Run a program as `python -c` would, with its output in files, and return its exit code."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = environment["PYTHONPATH"].split(os.pathsep)
    sys.argv = ["-c", *arguments]
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    code = 0
    try:
        exec(compile(program, "<program>", "exec"), main.__dict__)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    # A child shares the memory of what is imported, as long as no collector goes over it.
    gc.disable()
    for name in IMPORTED:
        __import__(name)
    gc.freeze()
    gc.enable()
    serve()
