"""Tools: called because they must be or because the model wants to, in the model's own form."""

import json

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
from starlette.testclient import TestClient

from lorakit.data.chat import with_template
from lorakit.models.load import load_model
from lorakit.serving.api.app import build_app
from lorakit.serving.api.bodies import ChatBody
from lorakit.serving.api.own_engine import OwnEngine
from lorakit.serving.api.tool_calls import Calling, CallReader, Tools
from lorakit.serving.call_forms import OURS, CallForm, CallForms
from lorakit.serving.catalog import Catalog
from lorakit.serving.engine import Engine
from lorakit.serving.grammars import GrammarError, Grammars
from lorakit.serving.worker import Limits
from serving.calling import PLAIN, calling_tokenizer, save_calling_model


def tool(name, **properties):
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    parameters = schema | {"additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = tool("weather", unit={"enum": ["C", "F"]})
AGE = tool("set_age", age={"type": "integer", "minimum": 1, "maximum": 99})


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "calling"
    save_calling_model(place)
    model, _ = load_model(place)
    made = Engine(model, Limits(slots=4))
    made.start()
    yield made
    made.close(drain=False)


@pytest.fixture(
    scope="module", params=["of the template", pytest.param("ours", marks=pytest.mark.thorough)]
)
def post(engine, request):
    tokenizer = calling_tokenizer()
    if request.param == "ours":
        tokenizer = with_template(tokenizer, PLAIN)
    app = build_app(OwnEngine(engine, Catalog(engine.model, tokenizer, "calling")))
    client = TestClient(app, raise_server_exceptions=False)

    def send(**body):
        if body.pop("writes_text", False):
            barred = map(tokenizer.convert_tokens_to_ids, ("<call>", '{"name": "'))
            body["logit_bias"] = dict.fromkeys(map(str, barred), -100)
        usual = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 300}
        return client.post("/v1/chat/completions", json=usual | {"temperature": 0} | body)

    return send


def parts_of(response):
    lines = response.text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks]
    calls: dict[int, dict[str, str]] = {}
    for part in (part for each in choices for part in each["delta"].get("tool_calls", ())):
        if "id" in part:
            calls[part["index"]] = {"name": part["function"]["name"], "arguments": ""}
        calls[part["index"]]["arguments"] += part["function"]["arguments"]
    content = "".join(each["delta"].get("content") or "" for each in choices)
    return content, list(calls.values()), choices[-1]["finish_reason"]


@pytest.mark.parametrize("choice", [None, "auto"])
def test_a_model_that_begins_a_call_ends_it_as_the_schema_says(post, choice):
    body = {"tools": [WEATHER, AGE], **({"tool_choice": choice} if choice else {})}
    found = post(**body).json()["choices"][0]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] is None
    (call,) = found["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert arguments in ({"unit": "C"}, {"unit": "F"}, {"age": arguments.get("age")})
    streamed = parts_of(post(**body, stream=True))
    assert streamed == ("", [call["function"]], "tool_calls")


def test_a_model_that_begins_none_writes_text(post):
    body = {"tools": [WEATHER], "max_tokens": 5, "writes_text": True}
    free = post(**body, tool_choice="none").json()["choices"][0]
    found = post(**body).json()["choices"][0]
    assert found["message"] == free["message"]
    assert found["message"]["content"]
    assert "tool_calls" not in found["message"]
    assert found["finish_reason"] == free["finish_reason"] != "tool_calls"
    streamed = parts_of(post(**body, stream=True))
    assert streamed == (found["message"]["content"], [], found["finish_reason"])


def test_a_tool_that_must_be_called_is(post):
    named = {"type": "function", "function": {"name": "set_age"}}
    for choice, names in ((named, {"set_age"}), ("required", {"set_age", "weather"})):
        body = {"tools": [WEATHER, AGE], "tool_choice": choice, "temperature": 1.0, "seed": 3}
        found = post(**body, n=3, writes_text=True).json()
        for each in found["choices"]:
            assert each["finish_reason"] == "tool_calls"
            assert each["message"]["content"] is None
            for call in each["message"]["tool_calls"]:
                assert call["function"]["name"] in names
                keys = json.loads(call["function"]["arguments"]).keys()
                assert keys == {"age" if call["function"]["name"] == "set_age" else "unit"}


def test_several_calls_are_one_where_they_may_not_be_parallel(post):
    # At this bias the end is not what the model wants after a call.
    body = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 130}
    body["logit_bias"] = {str(calling_tokenizer().eos_token_id): -100}
    several = parts_of(post(**body, stream=True))[1]
    assert len(several) > 1
    assert {call["name"] for call in several} == {"weather"}
    one = post(**body, parallel_tool_calls=False).json()["choices"][0]
    assert len(one["message"]["tool_calls"]) == 1
    assert one["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_is_given_as_far_as_it_came(post):
    found = post(tools=[WEATHER], tool_choice="required", max_tokens=30).json()["choices"][0]
    assert found["finish_reason"] == "length"
    (call,) = found["message"]["tool_calls"]
    assert '{"unit": '.startswith(call["function"]["arguments"])


def test_the_answer_to_a_call_goes_back(post):
    call = post(tools=[WEATHER]).json()["choices"][0]["message"]
    asked = [{"role": "user", "content": "hi"}, call]
    turns = [
        {"role": "tool", "tool_call_id": each["id"], "content": "11 C"}
        for each in call["tool_calls"]
    ]
    response = post(messages=[*asked, *turns], tools=[WEATHER])
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        (
            {"tools": [AGE], "tool_choice": {"type": "function", "function": {"name": "age"}}},
            "the tools are: set_age",
        ),
        ({"tools": [AGE], "response_format": {"type": "json_object"}}, "give one"),
        ({"tools": [tool("bad", x={"type": "wrong"})]}, "cannot be compiled"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(post, body, message):
    response = post(**body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


TAGS = CallForm(
    opening='<call>\n{"name": "',
    middle='", "arguments": ',
    closing="}\n</call>",
    between='}\n</call>\n<call>\n{"name": "',
    special={"<call>": calling_tokenizer().convert_tokens_to_ids("<call>")},
)
PLAIN_TAGS = CallForm(
    opening='CALL\n{"name": "', middle='", "arguments": ', closing="}", between=None
)
"""Of a tag that is text like any other."""
TEMPLATES = {
    "tags": (TAGS, calling_tokenizer().chat_template),
    "none": (OURS, PLAIN),
    "a tag of text": (
        PLAIN_TAGS,
        "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}"
        "{{ raise_exception('one') }}{% endif %}{% set f = m.tool_calls[0].function %}"
        'CALL{{ \'\n\' }}{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}</s>'
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
    ),
    "an object, once": (
        CallForm(opening='{"name": "', middle='", "parameters": ', closing="}", between=None),
        "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}"
        "{{ raise_exception('one') }}{% endif %}{% set f = m.tool_calls[0].function %}"
        '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}</s>'
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
    ),
    "a list after a special token": (
        CallForm(
            opening='<|system|>[{"name": "',
            middle='", "arguments": ',
            closing="}]",
            between='}, {"name": "',
            special={"<|system|>": calling_tokenizer().convert_tokens_to_ids("<|system|>")},
        ),
        "{% for m in messages %}{% if m.tool_calls %}<|system|>[{% for c in m.tool_calls %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        "{% if not loop.last %}, {% endif %}{% endfor %}]</s>"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
    ),
    "with ids": (
        OURS,
        "{% for m in messages %}{% for c in m.tool_calls or [] %}[CALL]"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
        '"id": "{{ c.id }}"}{% endfor %}{{ m.content }}</s>{% endfor %}',
    ),
    "no JSON": (
        OURS,
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}("
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %})"
        "{% endfor %}{{ m.content }}</s>{% endfor %}",
    ),
}
"""Chat templates, and how they write calls."""


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_form_of_calls_is_that_of_the_chat_template(kind):
    form, template = TEMPLATES[kind]
    tokenizer = calling_tokenizer(template)
    forms = CallForms(Grammars(tokenizer, len(tokenizer)))
    assert forms.of(tokenizer, frozenset({tokenizer.eos_token_id})) == form


def calling_of(form, **body):
    asked = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER, AGE]} | body
    tools = Tools.of(ChatBody.model_validate(asked))
    assert tools is not None
    return Calling(tools=tools, form=form)


FORMS = [form for name, (form, _) in TEMPLATES.items() if name not in ("with ids", "no JSON")]


def called(form, *calls):
    texts = [name + form.middle + arguments for name, arguments in calls]
    return form.opening + (form.between or "").join(texts) + form.closing


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.opening)
def test_a_grammar_takes_texts_and_calls_and_bars_what_is_neither(form):
    tokenizer = calling_tokenizer()
    grammars = Grammars(tokenizer, len(tokenizer))
    good, bad = ("weather", '{"unit": "C"}'), ("weather", '{"unit": "K"}')
    again = ("set_age", '{"age": 7}')
    several = form.between is not None
    before = "well, " if form.trigger else ""
    cases = [
        ("just text", True),
        ('{"a": 1}', True),
        (before + called(form, good), True),
        (called(form, bad), False),
        (called(form, ("wether", '{"unit": "C"}')), False),
        (called(form, good, again), several),
        (called(form, good) + " and so on", False),
    ]
    for text, allowed in cases:
        matcher = grammars.compiled(calling_of(form).rule, frozenset({tokenizer.eos_token_id}))
        ids = tokenizer(text)["input_ids"]
        try:
            for token in ids:
                matcher.take(token)
            ends = bool(matcher.allowed()[tokenizer.eos_token_id])
        except GrammarError:
            ends = False
        assert ends == allowed, text


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.opening)
def test_an_answer_is_read_alike_in_one_piece_and_in_many(form):
    calls = [("weather", '{"unit": "}\\"{"}'), ("set_age", '{"age": {"a": [1]}}')]
    calls = calls if form.between else calls[:1]
    before = "so < {" if form.trigger else ""
    text = before + called(form, *calls)
    for size in (1, 3, 7, len(text)):
        reader = CallReader(calling_of(form))
        contents = ""
        found: dict[int, list[str]] = {}
        for at in range(0, len(text), size):
            content, parts = reader.step(text[at : at + size], over=at + size >= len(text))
            contents += content
            for part in parts:
                name = part["function"].get("name")
                own = found.setdefault(part["index"], [name, ""])
                own[1] += part["function"]["arguments"]
        assert contents == before
        assert [tuple(each) for each in found.values()] == calls
    reader = CallReader(calling_of(form))
    almost = form.opening[:-1]
    given = [reader.step(letter, over=False)[0] for letter in almost]
    assert "".join(given) + reader.step("", over=True)[0] == almost
