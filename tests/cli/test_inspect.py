"""The verb inspect: what an adapter is, whoever made it."""

from lorakit.cli.main import main


def test_an_adapter_of_lorakit_and_of_peft_is_described(
    tiny_llama, prompt_rows, tmp_path, run, capsys
):
    words = ["--model", tiny_llama, "--data.train", prompt_rows, "--lora.alpha", 4]
    out = tmp_path / "words"
    assert run("train", *words, "--out", out, "--steps", 4, "--warmup-steps", 1)[0] == 0
    assert run("convert", out, tmp_path / "peft", "--to", "peft")[0] == 0
    assert main(["inspect", str(out)]) == 0
    ours = capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "peft")]) == 0
    theirs = capsys.readouterr().out
    assert ours.startswith("Adapter(lora r 8, 4 updates, ")
    assert ours.splitlines()[1:3] == [
        "  q_proj 32×32, r 8, scale 0.5: 2 updates",
        "  v_proj 16×32, r 8, scale 0.5: 2 updates",
    ]
    assert "\nsize: " in ours
    assert f"base: {tiny_llama}" in ours
    assert f"trained: 4 steps on prompt rows of {prompt_rows}" in ours
    assert "not verified" not in ours
    assert "  q_proj 32×32, r 8, scale 0.5: 2 updates" in theirs
    assert "not verified: the scales" in theirs
    code, facts = run("inspect", out)
    assert code == 0
    assert facts["method"] == "lora"
    assert len(facts["sites"]) == 4
    assert facts["content_hash"][:16] in ours


def test_a_damaged_adapter_is_an_error_that_says_so(tmp_path, run):
    code, result = run("inspect", tmp_path / "none")
    assert code == 2
    assert "there is no adapter folder" in result["error"]["message"]
