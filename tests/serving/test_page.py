"""The page: what it is made of, and what it does in a browser."""

import ast
import asyncio
import re
import shutil
import socket
import threading

import pytest

pytest.importorskip("fastapi")
import uvicorn

from lorakit.serving.api.app import Policy, build_app
from lorakit.serving.api.keys import Keys, Rights
from lorakit.serving.api.listening import Listener
from lorakit.serving.api.own_engine import OwnEngine
from lorakit.serving.page import files
from serving.browser import CHROMIUM, Browser
from serving.servers import Server, save

MOST_BYTES = 60_000


@pytest.fixture
def served(words, folder, tmp_path):
    """A tiny server at a port, which wants a key."""
    folder = shutil.copytree(folder, tmp_path / "served")
    server = Server(words, folder)
    save(words, folder / "late", 5, rank=3)
    keys = Policy(keys=Keys({"secret": Rights()}))
    listening = socket.create_server(("127.0.0.1", 0))
    app = build_app(OwnEngine(server.engine, server.catalog), keys)
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    listener = Listener(config)
    thread = threading.Thread(target=lambda: asyncio.run(listener.serve([listening])))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    listener.should_exit = listener.force_exit = True
    thread.join()
    listening.close()
    server.engine.close(drain=False)


def test_the_page_is_small_and_names_only_its_own_files():
    assert sum(len(content) for content, _ in files().values()) < MOST_BYTES
    for content, _ in files().values():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "innerHTML" not in text
        assert not re.search(r"https?://|style=|\son\w+=", text)
        for name in re.findall(r'(?:from "\.|="/page)/([\w.]+)"', text):
            assert f"/page/{name}" in files()


def test_the_page_needs_no_key_and_lets_nothing_else_in(words, folder):
    server = Server(words, folder, Policy(keys=Keys({"secret": Rights()})))
    for path, (content, kind) in files().items():
        response = server.client.get(path)
        assert (response.status_code, response.content) == (200, content)
        assert response.headers["content-type"] == kind
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'" in policy
        assert "unsafe" not in policy
    assert server.client.get("/page/other.js").status_code == 401
    assert server.client.get("/v1/adapters").status_code == 401
    server.engine.close()


DARK = "getComputedStyle(document.body).backgroundColor"
NAMELESS = """
[...document.querySelectorAll('button, input, select, textarea')].filter((each) => {
  const said = (each.labels?.[0] ?? each).cloneNode(true);
  said.querySelectorAll('select, textarea').forEach((inner) => inner.remove());
  return !(each.getAttribute('aria-label') || said.textContent.trim());
}).map((each) => each.outerHTML)
"""
"""What a screen reader has no name for."""


ANSWERED = "document.getElementById('send').textContent === 'Ask'"
TEXTS = "[...document.querySelectorAll('.answer')].map((each) => each.textContent)"


def give_the_key(page):
    """Type the key that the page asks for, and see the adapters that it lets one see."""
    page.wait("document.getElementById('keybox').open")
    assert "no key" in page.run("document.getElementById('adapters-error').textContent")
    page.type("#key", "secret")
    page.run("document.getElementById('keyform').requestSubmit()")
    page.wait("document.querySelectorAll('#rows tr').length === 4")
    told = page.run("document.getElementById('rows').innerText")
    assert "lora r 2" in told
    assert "yes" in told


def ask_both(page):
    """Ask both columns at once, the second with a combination; the answers are the server's."""
    choose = "document.querySelectorAll('select.model')[1]"
    page.run(f"{choose}.value = 'mix:'; {choose}.dispatchEvent(new Event('change'))")
    page.run("document.querySelectorAll('.length').forEach((each) => { each.value = 6; })")
    page.type("#prompt", "red cat")
    assert page.run(NAMELESS) == []
    page.press("Enter", 2)
    page.wait(f"{ANSWERED} && document.querySelectorAll('.figures b').length >= 4")
    left, right = page.run(TEXTS)
    assert left
    assert right
    assert "tokens" in page.run("document.querySelector('.figures').textContent")
    assert page.run("document.getElementById('status').textContent").startswith("A: ")


def look_at_tokens(page):
    """See a token's probability and its rivals, under the pointer and under the focus."""
    page.point(".answer span")
    assert page.run("document.getElementById('tip').innerText").count("%") >= 5
    page.run("document.querySelector('.answer span').focus()")
    page.press("ArrowRight")
    assert page.run("document.activeElement.previousElementSibling !== null")
    page.press("Escape")
    assert page.run("document.getElementById('tip').hidden")


def load_and_unload(page):
    """Have an adapter come and go."""
    page.run("document.querySelector('[aria-label=\"Load late\"]').click()")
    page.wait("document.querySelector('[aria-label=\"Unload late\"]') !== null")
    assert page.run("[...document.querySelectorAll('select.model')[0].options].length") == 5
    page.run("document.querySelector('[aria-label=\"Unload late\"]').click()")
    page.wait("document.querySelector('[aria-label=\"Load late\"]') !== null")


def ask_wrongly(page):
    """Ask with a setting that is wrong, and be told so in words."""
    page.run("document.querySelector('.temperature').value = -1")
    page.press("Enter", 2)
    page.wait("!document.querySelector('article .error').hidden")
    assert "temperature: " in page.run("document.querySelector('article .error').textContent")
    page.wait(ANSWERED)
    page.run("document.querySelector('.temperature').value = 0")


def stop_and_copy(page):
    """Stop a request, which ends at once, and copy it."""
    page.run("for (const _ of [1, 2]) document.getElementById('send').click()")
    page.wait(ANSWERED)
    assert page.run("document.querySelector('.figures').textContent") == "stopped"
    page.run("document.querySelector('.python').click()")
    page.wait("document.querySelector('.python').textContent === 'Copied'")


@pytest.mark.browser
@pytest.mark.thorough
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_two_columns_are_asked_in_a_browser(served, tmp_path, width):
    with Browser(tmp_path / "browser") as page:
        page.open(served, width)
        give_the_key(page)
        ask_both(page)
        look_at_tokens(page)
        load_and_unload(page)
        ask_wrongly(page)
        stop_and_copy(page)
        assert page.run("document.documentElement.scrollWidth") <= width
        light = page.run(DARK)
        page.open(served, width, dark=True)
        assert page.run(DARK) != light
        assert [each for each in page.problems if "status of 4" not in each] == []


@pytest.mark.browser
@pytest.mark.thorough
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_request_is_written_for_curl_and_in_python(served, tmp_path):
    with Browser(tmp_path / "browser") as page:
        page.open(served)
        curl = "import('/page/snippets.js').then((m) => m.asCurl('/v1/completions', {a: \"b'c\"}))"
        assert "-d '{\n  \"a\": \"b'\\''c\"\n}'" in page.run(curl)
        body = "{model: 'tiny', prompt: 'it\\'s \"so\"', adapters: [{name: 'a', weight: 0.5}]}"
        written = f"m.asPython('/v1/completions', {body}, true)"
        program = page.run(f"import('/page/snippets.js').then((m) => {written})")
    calls = [n for n in ast.walk(ast.parse(program)) if isinstance(n, ast.Call)]
    (call,) = [n for n in calls if ast.unparse(n.func) == "client.completions.create"]
    given = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
    assert given == {
        "model": "tiny",
        "prompt": 'it\'s "so"',
        "extra_body": {"adapters": [{"name": "a", "weight": 0.5}]},
    }
