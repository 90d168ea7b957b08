"""The prediction page in a real browser."""
import json
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="NO BROWSER TESTS: no playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="NO BROWSER TESTS: Debian's chromium is not installed")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update"]
GIVE = """([kind, names, bytes]) => {
  const data = new DataTransfer();
  for (const name of names) data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
  const event = kind === "paste" ? new ClipboardEvent(kind, {clipboardData: data, bubbles: true})
                                 : new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true});
  document.getElementById("drop").dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Return a function that opens an address; afterwards, no foreign host was asked and no script failed."""
    contexts, requests, errors = [], [], []

    def open_page(url, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if "Security Policy" in line.text else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    web = [urlsplit(url) for url in requests if url.startswith("http")]
    assert web and {parts.hostname for parts in web} == {"127.0.0.1"}
    assert errors == []


def picture(plain, colour="red"):
    return {"name": f"{colour}.png", "mimeType": "image/png", "buffer": plain(colour)}


def test_choose_a_file(open_page, server, plain):
    page = open_page(server.url)
    page.set_input_files("#file", picture(plain))
    page.wait_for_selector("#answer:visible")
    assert page.inner_text("#label") == "red"
    assert page.inner_text("#sure") == "over 99 % sure"
    assert page.inner_text("#shares").split() == ["green", "under", "1", "%", "blue", "under", "1", "%"]
    assert page.locator("#preview").evaluate("image => image.naturalWidth") == 64


def test_several_labels(open_page, start, plain, tmp_path):
    from automl_cv.export import colour_bundle

    with start(colour_bundle(tmp_path / "model", "multilabel")) as server:
        page = open_page(server.url, viewport={"width": 360, "height": 700})
        page.set_input_files("#file", picture(plain, "yellow"))
        page.wait_for_selector("#answer:visible")
        assert page.inner_text("#found").split() == ["red", "over", "99", "%", "green", "over", "99", "%"]
        assert page.inner_text("#shares").split() == ["blue", "50", "%"] and page.is_hidden("#none")
        page.set_input_files("#file", picture(plain, "black"))
        page.wait_for_selector("#none:visible")
        assert page.inner_text("#none") == "none of the labels" and page.locator("#found li").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_keyboard_alone(open_page, server, plain):
    page = open_page(server.url)
    with page.expect_file_chooser() as chooser:
        page.focus("#file")  # inside, so that the browser knows of the wait before it gets the key
        page.keyboard.press("Enter")
    chooser.value.set_files(picture(plain, "blue"))
    page.wait_for_selector("#answer:visible")
    assert page.inner_text("#label") == "blue"


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_drop_and_paste(open_page, server, plain, kind):
    page = open_page(server.url)
    page.evaluate(GIVE, [kind, ["sky.png"], list(plain("blue"))])
    page.wait_for_selector("#answer:visible")
    assert page.inner_text("#label") == "blue"
    assert page.inner_text("#name") == "sky.png"


def test_trouble_is_a_sentence_and_passes(open_page, server, plain):
    page = open_page(server.url)
    page.set_input_files("#file", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"})
    page.wait_for_selector("#trouble:visible")
    assert page.inner_text("#trouble-title") == "The file is not a picture"
    assert "No picture format was recognised" in page.inner_text("#trouble-detail")
    page.evaluate(GIVE, ["drop", ["a.png", "b.png"], list(plain("red"))])
    assert page.inner_text("#trouble-title") == "One picture at a time"
    page.evaluate(GIVE, ["drop", [], []])
    assert page.inner_text("#trouble-title") == "That was no file"
    page.set_input_files("#file", picture(plain, "blue"))
    page.wait_for_selector("#answer:visible")
    assert page.is_hidden("#trouble")


def test_too_large_is_told_without_sending(open_page, server, tmp_path):
    (tmp_path / "a.jpg").touch()
    os.truncate(tmp_path / "a.jpg", 10 * 2**20 + 1)
    page = open_page(server.url)
    page.set_input_files("#file", tmp_path / "a.jpg")
    page.wait_for_selector("#trouble:visible")
    assert page.inner_text("#trouble-detail") == "The file has 10.5 MB. The limit is 10.5 MB."


def test_dark_and_light(open_page, server):
    shades = {}
    for scheme in ("light", "dark"):
        page = open_page(server.url, color_scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shades[scheme] = sum(int(part) for part in colour[4:-1].split(",")) / 3
    assert shades["dark"] < 60 < 200 < shades["light"]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_fits_a_phone(open_page, server, path):
    page = open_page(server.url + path, viewport={"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_curl_line_is_the_real_one(open_page, server):
    page = open_page(server.url)
    page.click("summary")
    assert page.inner_text("#command").strip() == f"curl -F file=@picture.jpg {server.url}/predict"
    page.click("text=All addresses and errors")
    assert page.inner_text("h1") == "For programmers"
    assert f"curl {server.url}/health/ready" in page.inner_text("main")


def test_hostile_class_names_and_a_dead_service(open_page, start, bundle, plain, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    info = json.loads((copy / "model.json").read_text())
    hostile = "<img src=x onerror=alert(1)>"
    (copy / "model.json").write_text(json.dumps(info | {"classes": [hostile, "green", "b" * 100]}))
    with start(copy) as server:
        page = open_page(server.url, viewport={"width": 360, "height": 700})
        page.on("dialog", lambda dialog: pytest.fail("a script ran"))
        assert page.inner_text(".chips li:first-child") == hostile
        page.set_input_files("#file", picture(plain))
        page.wait_for_selector("#answer:visible")
        assert page.inner_text("#label") == hostile
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.set_input_files("#file", picture(plain))
    page.wait_for_selector("#trouble:visible")
    assert page.inner_text("#trouble-title") == "The service did not answer"
