"""Sites by layer and module."""

from lorakit.analysis.by_layer import ByLayer


def test_sites_are_put_by_layer_and_the_end_of_their_path():
    sites = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(3) for p in "qv"]
    found = ByLayer.of(sites)
    assert found.layers == ["0", "1", "2"]
    assert found.modules == ["q_proj", "v_proj"]
    assert found.middle == "1"
    assert found.sites_of("v_proj")["2"] == "model.layers.2.self_attn.v_proj"
    values = dict(zip(sites, range(6), strict=True))
    assert found.grid(values, float) == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


def test_equal_ends_stacks_slices_and_what_is_in_no_layer_are_told_apart():
    found = ByLayer.of(
        [
            "encoder.block.0.attention.out",
            "encoder.block.0.mlp.out",
            "decoder.block.0.attention.out",
            "decoder.block.0.qkv[q]",
            "head",
        ]
    )
    assert found.layers == ["encoder.block 0", "decoder.block 0", ""]
    assert found.modules == ["attention.out", "mlp.out", "qkv[q]", "head"]
    ones = dict.fromkeys(found.places, 1.0)
    assert found.grid(ones, float) == [
        [1.0, 1.0, None, None],
        [1.0, None, 1.0, None],
        [None, None, None, 1.0],
    ]
