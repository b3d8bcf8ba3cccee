"""Values of a wrong type, where shapes and types are not checked: each is an error of lorakit's."""

import json

import pytest

PROGRAM = """
import json, sys
import lorakit as lk
from lorakit.attachment.attach import attach
model, tokenizer = lk.load_model(sys.argv[1])
bank = lk.AdapterBank(model)
calls = {
    "attach a number": lambda: lk.attach(model, 8),
    "attach to a pair": lambda: lk.attach((model, tokenizer), lk.LoRAConfig()),
    "attach a class": lambda: lk.attach(model, lk.LoRAConfig),
    "plan for a name": lambda: lk.plan("smollm2", lk.LoRAConfig()),
    "load nothing": lambda: lk.Adapter.load(None),
    "load into a bank": lambda: bank.load("one", 5),
    "bank of a name": lambda: lk.AdapterBank("smollm2"),
    "merge a name": lambda: lk.merge("smollm2"),
    "extract from None": lambda: lk.extract(None),
    "train a dictionary": lambda: lk.train({"out": "out"}),
    "sweep a file": lambda: lk.sweep("sweep.yaml"),
    "generate on a pair": lambda: lk.generate("a", model=(model, tokenizer), tokenizer=tokenizer),
    "generate after a number": lambda: lk.generate(7, model=model, tokenizer=tokenizer),
    "switch to a number": lambda: lk.switch(model, 7),
    "switch a bank to a number": lambda: bank.switch(7),
    "route a number": lambda: lk.route(model, 7).__enter__(),
    "spectrum of a number": lambda: lk.analysis.spectrum(5),
    "serve a number": lambda: lk.serve(5),
    "score a number": lambda: lk.score(5, [1], [1]),
    "evaluate a number": lambda: lk.evaluate(adapter=5, data=lk.DataConfig(validation="x")),
    "a bare rank": lambda: lk.LoRAConfig(8),
    "a wrong rank": lambda: lk.LoRAConfig(rnak=8, alpha="two"),
}
lk.attach(model, lk.LoRAConfig(targets="q"))
told = {}
for name, call in calls.items():
    try:
        call()
    except lk.LorakitError as error:
        told[name] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""

EXPECTED = {
    "attach a number": "AttachError: what is attached are settings such as lk.LoRAConfig(rank=8)",
    "attach to a pair": "AttachError: a model is a torch.nn.Module, as in model, tokenizer = lk.lo",
    "attach a class": "AttachError: what is attached are settings",
    "plan for a name": "AttachError: a model is a torch.nn.Module",
    "load nothing": "AdapterFileError: an adapter is given by its folder, by a hub id or as an Ada",
    "load into a bank": "AdapterFileError: an adapter is given by its folder",
    "bank of a name": "AttachError: a model is a torch.nn.Module",
    "merge a name": "AttachError: a model is a torch.nn.Module",
    "extract from None": "AttachError: a model is a torch.nn.Module",
    "train a dictionary": "ConfigError: a run is described by lk.TrainConfig(",
    "sweep a file": "ConfigError: a run is described by lk.TrainConfig(",
    "generate on a pair": "ModelError: a model is given by name or as a loaded model",
    "generate after a number": "ConfigError: prompts are a text or a list of texts; found 7",
    "switch to a number": "AttachError: no adapter called 7 is attached",
    "switch a bank to a number": "BankError: the bank has no adapter 7",
    "route a number": "RouteError: row 0 asks for 7: give a name, None for the base",
    "spectrum of a number": "AdapterFileError: an adapter is given by its folder",
    "serve a number": "ConfigError: ServeConfig has settings that cannot be used",
    "score a number": "ConfigError: no scorer knows the task 5; there are e2e",
    "evaluate a number": "AdapterFileError: an adapter is given by its folder",
    "a bare rank": "ConfigError: LoRAConfig takes its settings by name; 8 was given without",
    "a wrong rank": "ConfigError: LoRAConfig has settings that cannot be used (2 problems):",
}


@pytest.mark.thorough
def test_a_wrong_type_is_an_error_of_lorakit(forks, tiny_llama):
    told = json.loads(forks.run(PROGRAM, str(tiny_llama)))
    assert told.keys() == EXPECTED.keys()
    wrong = {name: told[name] for name, text in EXPECTED.items() if not told[name].startswith(text)}
    assert not wrong
