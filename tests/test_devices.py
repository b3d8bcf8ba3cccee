"""What the verbs compute is on the device of their model, whichever that is."""

import json

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROGRAM = "from verbs_on_devices import main; main()"


def near(found, expected, place):
    """Compare what two devices gave: texts as they are, numbers to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            if key not in ("created", "id"):
                near(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            near(one, other, f"{place}.{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4), place
    else:
        assert found == expected, place


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("pretended", marks=pytest.mark.thorough),
        pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu]),
    ],
)
def test_verbs_give_on_a_gpu_what_they_give_on_the_cpu(
    device, forks, tiny_llama, tiny_bert, prompt_rows, tmp_path
):
    for library in ("bitsandbytes", "fastapi"):
        pytest.importorskip(library)
    arguments = (tiny_llama, tiny_bert, prompt_rows, tmp_path, device)
    told = json.loads(forks.run(PROGRAM, *map(str, arguments)).splitlines()[-1])
    assert told["devices"] == ["privateuseone" if device == "pretended" else "cuda"]
    assert told["mistakes"] == []
    near(told["gpu"], told["cpu"], "answers")
