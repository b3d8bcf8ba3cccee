"""The wheel: built from the source archive, installed into an empty environment, and run there."""

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

import lorakit

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "adapters" / "llama-lora"
SOURCES = ("pyproject.toml", "README.md", "LICENSE")

OPTIONAL = (
    *("PIL", "bitsandbytes", "datasets", "fastapi", "gguf", "liger_kernel", "llguidance"),
    *("matplotlib", "nltk", "peft", "prometheus_client", "pyarrow", "pycocoevalcap", "ray"),
    *("rouge_score", "sacrebleu", "shtab", "sklearn", "tensorboard", "unidecode", "uvicorn"),
)
"""What the extras bring; what is left is there without any."""

WITHOUT = """
import contextlib, io, json, sys
optional, lines = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(optional))
from lorakit.cli.main import main
found = []
for line in lines:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(line)
    found.append([code, said.getvalue().strip().splitlines()[-1]])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The Python of an environment with the wheel, and with what this one has beside lorakit."""
    if find_spec("build") is None:
        pytest.skip("build is not installed")
    sources, made = (tmp_path_factory.mktemp(name) for name in ("sources", "made"))
    for name in SOURCES:
        shutil.copy(ROOT / name, sources)
    shutil.copytree(
        ROOT / "src", sources / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    _python("-m", "build", "--no-isolation", "--outdir", made, sources)
    assert {each.suffix for each in made.iterdir()} == {".gz", ".whl"}
    (wheel,) = made.glob("*.whl")
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=os.name != "nt")
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    _python("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (packages,) = place.rglob("site-packages")
    # Packages alone: the files by which an editable lorakit is found are not looked at there.
    others = [each for each in map(Path, sys.path) if each.name == "site-packages"]
    (packages / "others.pth").write_text("\n".join(map(str, others)))
    return python


def _python(*words, python=sys.executable):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [str(each) for each in (python, *words)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.thorough
def test_the_wheel_has_the_verbs_the_types_and_the_files_beside_the_source(environment):
    told = _python("-m", "lorakit", "--version", python=environment)
    assert told == f"lorakit {lorakit.__version__}\n"
    script = environment.with_name("lorakit")
    assert subprocess.check_output([script, "--version"], text=True) == told
    folder = _python("-c", "import lorakit; print(lorakit.__path__[0])", python=environment).strip()
    assert Path(folder).is_relative_to(environment.parents[1])
    kept = {".py", ".typed", ".html", ".css", ".js", ".yaml"}
    source = ROOT / "src" / "lorakit"
    ours, theirs = (
        {file.relative_to(top) for file in Path(top).rglob("*") if file.suffix in kept}
        for top in (source, folder)
    )
    assert theirs == ours


@pytest.mark.thorough
def test_what_needs_an_extra_says_in_one_line_which(environment, tiny_llama, tmp_path):
    rows = tmp_path / "rows.parquet"
    rows.write_bytes(b"PAR1")
    for name in ("red", "blue"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").write_bytes(b"")
    images = ["--data.train", str(tmp_path / "images"), "--task", "image-classification"]
    trials = ["--data.train", "builtin:places", "--sweep", "{lora.rank: [1, 2]}"]
    texts = tmp_path / "outputs", tmp_path / "references"
    texts[0].write_text("red\n")
    texts[1].write_text('[["red"]]')
    run = ["--model", str(tiny_llama), "--out", str(tmp_path / "run")]
    lines = {
        "bench": ["bench", "switch", "--model", str(tiny_llama)],
        "completion": ["completion", "bash"],
        "data": ["train", *run, "--data.train", str(rows)],
        "gguf": ["convert", str(GOLDEN), str(tmp_path / "mine.gguf"), "--to", "gguf"],
        "images": ["train", *run, *images],
        "metrics": ["score", *map(str, texts), "--task", "e2e"],
        "plots": ["inspect", str(GOLDEN), "--figures", str(tmp_path / "figures")],
        "quantized": ["train", *run, "--data.train", "builtin:places", "--quantize", "4bit"],
        "ray": ["train", *run, *trials, "--ray", "local"],
        "serve": ["serve", "--model", str(tiny_llama)],
    }
    told = _python("-c", WITHOUT, json.dumps([OPTIONAL, [*lines.values()]]), python=environment)
    for extra, (code, message) in zip(lines, json.loads(told), strict=True):
        assert code == 2, (extra, message)
        assert message.startswith("error: "), message
        assert message.endswith(f" needs an optional library: pip install 'lorakit[{extra}]'")
