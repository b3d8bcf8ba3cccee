"""Virtual tokens of encoder-decoders: in what the encoder reads, also where `generate` calls it."""

import copy
from contextlib import ExitStack

import pytest
import torch
import transformers

import lorakit as lk
from lorakit.config.methods import PrefixConfig
from lorakit.errors import RouteError, TargetError
from references import randomise
from tiny_models import bart, build

FAMILIES = ("t5", "bart")
PREFIX, INFIX = 2, 3
LENGTHS = (7, 4, 6)

pytestmark = pytest.mark.parametrize("every_layer", [False, True], ids=["embedding", "layer"])


def adapted(family, *, every_layer):
    """A model with virtual tokens, its base, and the vectors by path."""
    base = (bart() if family == "bart" else build(family)).double().eval()
    torch.manual_seed(1)
    for weight in base.parameters():
        if weight.dim() == 2:
            # Large enough for answers to depend on what is read.
            weight.data.normal_(0, 0.5)
    model = copy.deepcopy(base)
    config = PrefixConfig(every_layer=every_layer, prefix=PREFIX, infix=INFIX)
    lk.attach(model, config)
    randomise(model)
    tensors = lk.extract(model).tensors
    return model, base, {key.removesuffix(".prompt"): v.double() for key, v in tensors.items()}


def rows(side):
    """Rows of several lengths, and the batch that pads them."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 40, (n,), generator=generator) for n in LENGTHS]
    ids = torch.zeros(len(texts), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        at = slice(0, len(text)) if side == "right" else slice(-len(text), None)
        ids[row, at], mask[row, at] = text, 1
    return texts, {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def expected(base, vectors, text, answer):
    """The logits of one answer by the base alone, whose encoder gets vectors in front and behind.

    Behind a block its output at their places is replaced too, where there are vectors for it.
    """
    places = [*range(PREFIX), *range(PREFIX + len(text), PREFIX + len(text) + INFIX)]

    def replace(own):
        def hook(_module, _args, output):
            states = output[0] if isinstance(output, tuple) else output
            states = states.clone()
            states[:, places] = own
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    embedding = base.get_encoder().get_input_embeddings()
    filler = text.new_zeros(1)
    ids = torch.cat([filler.expand(PREFIX), text, filler.expand(INFIX)])[None]
    with ExitStack() as stack:
        for path, own in vectors.items():
            module = base.get_submodule(path)
            assert (module is embedding) == path.endswith("embed_tokens")
            handle = module.register_forward_hook(replace(own))
            stack.callback(handle.remove)
        return base(input_ids=ids, decoder_input_ids=answer[None]).logits[0]


@pytest.mark.parametrize(
    ("family", "side"),
    # BART's own positions count padding on the left.
    [("t5", "left"), ("t5", "right"), ("bart", "right")],
)
def test_logits_are_those_of_rows_with_vectors_around_them(family, side, every_layer):
    model, base, vectors = adapted(family, every_layer=every_layer)
    blocks = [path for path in vectors if not path.endswith("embed_tokens")]
    assert len(blocks) == every_layer * (base.config.num_hidden_layers - 1)
    texts, batch = rows(side)
    answers = torch.tensor([[2, 5, 6], [2, 7, 8], [2, 9, 4]])
    with torch.no_grad():
        found = model(**batch, decoder_input_ids=answers, output_hidden_states=True)
    for text, answer, logits in zip(texts, answers, found.logits, strict=True):
        torch.testing.assert_close(logits, expected(base, vectors, text, answer))
    # The caller knows of its own tokens alone.
    assert found.encoder_last_hidden_state.shape[1] == max(LENGTHS)
    assert {each.shape[1] for each in found.encoder_hidden_states} == {max(LENGTHS)}


def greedy(base, vectors, text, steps):
    """The tokens that the base writes one after the other, with vectors around the text."""
    answer = torch.tensor([base.config.decoder_start_token_id])
    for _ in range(steps):
        likeliest = expected(base, vectors, text, answer)[-1].argmax()
        answer = torch.cat([answer, likeliest[None]])
    return answer.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_reads_the_rows_with_their_tokens(family, every_layer):
    model, base, vectors = adapted(family, every_layer=every_layer)
    texts, batch = rows("right")
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = [greedy(base, vectors, text, 4) for text in texts]
    assert model.generate(**batch, **how).tolist() == wanted
    # Of a route's rows each has its own: here the second none.
    plain = base.generate(**batch, **how).tolist()
    with lk.route(model, ["default", None, "default"]):
        mixed = model.generate(**batch, **how).tolist()
    assert mixed == [wanted[0], plain[1], wanted[2]]
    assert wanted[1] != plain[1]
    # Several answers to each row.
    drawn = how | {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    assert model.generate(**batch, **drawn).tolist() == [each for each in wanted for _ in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_would_be_left_out_is_an_error(family, every_layer):
    model, base, _ = adapted(family, every_layer=every_layer)
    _, batch = rows("right")
    answers = torch.full((3, 2), 2)
    with pytest.raises(RouteError, match="made without the virtual tokens"):
        model(encoder_outputs=base.get_encoder()(**batch), decoder_input_ids=answers, **batch)
    own = model.get_encoder()(**batch)
    with torch.no_grad():
        one = model(encoder_outputs=own, decoder_input_ids=answers).logits
        two = model(**batch, decoder_input_ids=answers).logits
    torch.testing.assert_close(one, two)
    with pytest.raises(RouteError, match="give decoder_input_ids or labels"):
        model(**batch)
    with pytest.raises(RouteError, match="return_dict=True"):
        model.get_encoder()(**batch, return_dict=False)
    # After an error nothing of the call is left behind.
    torch.testing.assert_close(model(**batch, decoder_input_ids=answers).logits, two)
    lk.detach(model)
    assert not model.get_encoder()._forward_pre_hooks
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch, decoder_input_ids=answers).logits,
            base(**batch, decoder_input_ids=answers).logits,
        )


def test_a_decoder_that_reads_the_same_row_has_none(every_layer):
    config = bart().config
    model = transformers.BartForSequenceClassification(config)
    with pytest.raises(TargetError, match="none of the decoder's"):
        lk.attach(model, PrefixConfig(every_layer=every_layer))
