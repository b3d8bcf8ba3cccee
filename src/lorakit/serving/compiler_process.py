"""A process that compiles one graph: `python -m lorakit.serving.compiler_process GRAPH CODE`.

The compiler replaces methods of all modules while it works, in every thread of its process: a
thread that calls a model meanwhile fails. And it would keep the interpreter from that thread.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from lorakit.errors import ModelError
from lorakit.upstream.private_names import compile_to_file, load_code

POLL_S = 0.05
"""How often it is looked whether the compiler is still wanted."""
NICE = 5
"""How far the process goes back behind others."""


def compiled_apart(
    graph: GraphModule, inputs: Sequence[Tensor], *, stop: threading.Event
) -> Callable[..., Any]:
    """A graph as compiled code, made by another process.

    Args:
        graph: of tensors alone.
        inputs: like its own; their values do not matter.
        stop: ends the process.

    Raises:
        ModelError: it cannot be compiled, or was stopped.
    """
    with tempfile.TemporaryDirectory(prefix="lorakit-") as folder:
        source, target = Path(folder, "graph"), Path(folder, "code")
        plain, constants = _plain(graph)
        every = [*inputs, *constants]
        kinds = [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in every]
        source.write_bytes(pickle.dumps((plain, kinds)))
        words = [sys.executable, "-m", __name__, str(source), str(target)]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            killer = threading.Thread(target=_kill_if, args=(process, stop), daemon=True)
            killer.start()
            _, said = process.communicate()
        if not target.exists():
            lines = said.strip().splitlines() or ["it was stopped"]
            raise ModelError(f"the compiler failed: {lines[-1]}")
        code = load_code(target)
    return lambda *own: code(*own, *constants)


def _kill_if(process: subprocess.Popen[str], stop: threading.Event) -> None:
    while process.poll() is None:
        if stop.wait(POLL_S):
            process.kill()
            return


def _plain(graph: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """The graph without the tensors that it held before, and without its tracer.

    What it makes of nothing, such as a number as a tensor, becomes its last inputs: reading a graph
    from a file runs it, and such a tensor would then be one that the graph holds.

    Returns:
        The graph, and the values of those inputs.
    """
    made, constants = Graph(), list[Tensor]()
    made.output(made.graph_copy(graph.graph, {}))
    last = [node for node in made.nodes if node.op == "placeholder"][-1]
    for node in list(made.nodes):
        if node.op != "call_function" or node.all_input_nodes:
            continue
        constants.append(cast(Callable[..., Tensor], node.target)(*node.args, **node.kwargs))
        with made.inserting_after(last):
            last = made.placeholder(f"made_{len(constants)}")
        node.replace_all_uses_with(last)
        made.erase_node(node)
    return GraphModule(torch.nn.Module(), made), constants


def main(source: str, target: str) -> None:
    """Compile the graph of one file into another."""
    os.nice(NICE)
    graph, kinds = pickle.loads(Path(source).read_bytes())
    inputs = [
        torch.empty_strided(shape, stride, dtype=dtype, device=device)
        for shape, stride, dtype, device in kinds
    ]
    with torch.no_grad():
        compile_to_file(graph, inputs, Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
