"""Which kind of decode steps an engine has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from lorakit.errors import ModelError
from lorakit.serving.compiled_steps import CompiledSteps
from lorakit.serving.compiler_process import compiled_apart
from lorakit.serving.decoder import Decoder
from lorakit.serving.graphed_steps import GraphedSteps
from lorakit.serving.held_slots import HeldSlots
from lorakit.serving.kv_slots import KeyValueSlots
from lorakit.serving.steps import Steps


def steps_of(
    decoder: Decoder,
    slots: HeldSlots,
    keys_and_values: KeyValueSlots,
    *,
    compiles: bool,
    note: Callable[[str], None],
) -> Steps:
    """The steps of an engine: recorded on a GPU, else compiled; eager where neither can be."""
    if compiles:
        try:
            if decoder.model.device.type == "cuda":
                return GraphedSteps(decoder, slots, keys_and_values, note=note)
            stop = threading.Event()
            compile_one = partial(compiled_apart, stop=stop)
            return CompiledSteps(
                decoder, slots, keys_and_values, note=note, compile_one=compile_one, stop=stop
            )
        except ModelError as error:
            note(f"decode steps are not compiled: {error}")
    return Steps(decoder, slots, keys_and_values)
