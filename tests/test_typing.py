"""What people write passes a strict type checker: the Python of README and docs, and more."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

OPTIONS = """
[mypy]
strict = true
# Only lorakit's own types are looked at, by a checker without plugins.
[mypy-torch.*,transformers.*,numpy.*,huggingface_hub.*,accelerate.*,safetensors.*,jaxtyping.*]
follow_imports = skip
[mypy-tqdm.*,yaml.*,datasets.*,gguf.*,sacrebleu.*,matplotlib.*,triton.*,peft.*,liger_kernel.*]
follow_imports = skip
[mypy-lorakit.*]
follow_imports = silent
"""

WRITTEN = """
from pathlib import Path

import lorakit as lk

lk.LoRAConfig(rank=8, alpha=16, targets=["q", "v"], rank_pattern={"*.0.*": 4})
lk.LoRAConfig(targets="all-linear", exclude=("head",), dropout=0.1, dtype="bfloat16")
data = lk.DataConfig(train="rows.jsonl", fields={"prompt": "question"}, labels=["no", "yes"])
config = lk.TrainConfig(out="out/a", method="lora", data=data, sweep={"lora.rank": [1, 8]})
lk.TrainConfig(out=Path("out/a"), method=["lora", "prefix-layer"], init_from="owner/name", steps=3)
folder: Path = config.out / "last"

model, tokenizer = lk.load_model("smollm2")
plan: lk.Plan = lk.attach(model, Path("out/a"))
lk.attach(model, lk.Adapter.load("owner/name", revision="main"), name="other")
with lk.attached(model, [lk.LoRAConfig(), lk.PrefixConfig()]) as plan:
    print(plan.parameters, [site.rank for site in plan.sites])
with lk.attached(model, "owner/name"), lk.merged(model) as report:
    print(report.worst, report)
with lk.route(model, ["default", None, {"default": 0.5, "other": 0.5}]):
    pass

result = lk.train(config, model=model, tokenizer=tokenizer)
lk.attach(model, result.adapter)
base, _ = result.adapter.load_base(dtype="bfloat16")
lk.detach(base)
ranks: list[int] = [trial.adapter.sites[0].rank for trial in lk.sweep(config).trials]
texts: list[str] = lk.generate(["a", "b"], adapter=result.adapter, max_new_tokens=4)
scores: dict[str, float] = lk.evaluate(adapter=folder, data=data, metrics="loss")

bank = lk.AdapterBank(model, budget_bytes=10**9)
bank.load("a", "owner/name", revision="main")
bank.load("b", result.adapter)
with bank.route("a"):
    name: str | None = bank.active
try:
    lk.attach(model, lk.LoRAConfig(targets=("value",)))
except (lk.errors.TargetError, lk.LorakitError) as error:
    print(error)
"""

WRONG = """
import lorakit as lk

lk.LoRAConfig(rnak=8)
lk.LoRAConfig(rank="eight")
model, _ = lk.load_model("smollm2")
lk.attach(model, 8)
lk.AdapterBank(model).load("a", 5)
"""


def check(folder: Path, programs: dict[str, str]) -> str:
    """What the type checker says of some programs."""
    (folder / "options.ini").write_text(OPTIONS)
    for name, program in programs.items():
        (folder / f"{name}.py").write_text(program, encoding="utf-8")
    cache = ROOT / ".mypy_cache" / "written"
    command = [sys.executable, "-m", "mypy", "--config-file", "options.ini"]
    done = subprocess.run(
        [*command, "--cache-dir", str(cache), *(f"{name}.py" for name in programs)],
        cwd=folder,
        env=os.environ | {"MYPYPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.thorough
def test_what_people_write_passes_and_what_is_wrong_does_not(tmp_path):
    programs = {"written": WRITTEN, "wrong": WRONG}
    for page in PAGES:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)
        if blocks:
            programs[f"page_{page.stem}".replace("-", "_")] = "\n".join(blocks)
    assert "page_README" in programs
    told = check(tmp_path, programs).splitlines()
    assert [line for line in told[:-1] if not line.startswith("wrong.py")] == []
    lines = [int(line.split(":")[1]) for line in told if line.startswith("wrong.py")]
    assert sorted(set(lines)) == [4, 5, 7, 8]
