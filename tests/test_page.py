"""The pages in a real browser."""
import csv
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from automl_cv.data import run_step

playwright = pytest.importorskip("playwright.sync_api", reason="NO BROWSER TESTS: no playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="NO BROWSER TESTS: Debian's chromium is not installed")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update",
        "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a camera that films green
PAGES = ["/", "/batch", "/model", "/docs"]
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
    assert page.get_by_role("button", name="Your picture red.png Choose another one", exact=True).count() == 1


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


def test_doubt_about_several_labels_names_the_figure_that_decides(open_page, start, plain, tmp_path):
    """Each label is over its threshold and sure by itself; what is not sure enough is all of them together."""
    from automl_cv.export import colour_bundle

    bundle = colour_bundle(tmp_path / "model", "multilabel")
    info = json.loads((bundle / "model.json").read_text())
    doubts = {"abstain": 0.9, "coverage": 0.5, "target_accuracy": 0.99}
    (bundle / "model.json").write_text(json.dumps(info | {"thresholds": info["thresholds"] | doubts}))
    said = "From a probability of 90 % on that all labels are right, 99 % of"
    with start(bundle) as server:
        page = open_page(server.url)
        page.set_input_files("#file", picture(plain, "yellow"))
        page.wait_for_selector("#low_confidence:visible")
        assert said in page.inner_text("#low_confidence")
        page.goto(f"{server.url}/model")
        assert said in page.inner_text("main")


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_drop_and_paste(open_page, server, plain, kind):
    page = open_page(server.url)
    page.evaluate(GIVE, [kind, ["sky.png"], list(plain("blue"))])
    page.wait_for_selector("#answer:visible")
    assert page.inner_text("#label") == "blue"
    assert page.inner_text("#name") == "sky.png"


def test_a_picture_from_the_camera(open_page, server):
    page = open_page(server.url)
    page.click("#camera")
    page.wait_for_selector("#viewfinder[open] video")
    page.keyboard.press("Escape")
    page.wait_for_selector("#viewfinder", state="hidden")
    page.click("#camera")
    page.click("#shoot")
    page.wait_for_selector("#answer:visible")
    assert page.inner_text("#label") == "green" and page.inner_text("#name") == "camera.jpg"
    assert page.is_hidden("#viewfinder") and page.evaluate("document.getElementById('video').srcObject") is None


def test_a_camera_that_is_asked_for_twice_is_let_go(open_page, server):
    page = open_page(server.url)
    page.evaluate("""() => {
        const devices = navigator.mediaDevices;
        const lend = devices.getUserMedia.bind(devices);
        window.streams = [];
        devices.getUserMedia = async (wish) => { streams.push(await lend(wish)); return streams.at(-1); };
        const button = document.getElementById("camera");
        button.click();
        button.click();
    }""")
    page.wait_for_selector("#viewfinder[open] video")
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#video")).to_have_js_property("srcObject", None)  # polls without eval
    assert page.evaluate("streams.map((stream) => stream.getTracks().map((track) => track.readyState))") == [["ended"]]
    page.click("#camera")
    page.wait_for_selector("#viewfinder[open] video")


@pytest.fixture(scope="module")
def doubtful(bundle, tmp_path_factory):
    """Return a bundle that abstains, and that has test figures."""
    copy = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("doubtful") / "model"))
    info = json.loads((copy / "model.json").read_text())
    rows = [{"label": name, "precision": 0.9, "recall": 0.8, "f1": 0.85, "images": 20} for name in info["classes"]]
    metrics = {"metric": "accuracy", "accuracy": 0.95, "low": 0.9, "high": 0.98, "images": 60, "classes": rows,
               "calibration_error": 0.03, "confusion": [[19, 1, 0], [0, 20, 0], [2, 0, 18]]}
    thresholds = {"abstain": 0.9, "coverage": 0.8, "target_accuracy": 0.99}
    (copy / "model.json").write_text(json.dumps(info | {"metrics": metrics, "thresholds": thresholds}))
    return copy


def test_not_sure_is_explained(open_page, start, doubtful, plain):
    with start(doubtful) as server:
        page = open_page(server.url)
        page.set_input_files("#file", picture(plain, "yellow"))
        page.wait_for_selector("#low_confidence:visible")
        assert page.inner_text("#verdict").lower() == "my best guess"
        assert "From a confidence of 90 % on, 99 %" in page.inner_text("#low_confidence")
        assert page.is_hidden("#unlike_training")
        page.set_input_files("#file", picture(plain, "red"))
        page.wait_for_selector("#verdict:has-text('This looks like')")
        assert page.is_hidden("#low_confidence")


def test_a_doubtful_answer_is_not_as_sure_as_the_threshold(open_page, start, doubtful, plain, tmp_path):
    """Yellow is half red and half green; in whole percents, the threshold would have the same figure."""
    copy = Path(shutil.copytree(doubtful, tmp_path / "model"))
    info = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(info | {"thresholds": info["thresholds"] | {"abstain": 0.5049}}))
    with start(copy) as server:
        page = open_page(server.url)
        page.set_input_files("#file", picture(plain, "yellow"))
        page.wait_for_selector("#low_confidence:visible")
        assert page.inner_text("#sure") == "50 % sure"
        assert "From a confidence of 50.49 % on, 99 % of" in page.inner_text("#low_confidence")
        page.goto(f"{server.url}/model")
        assert "From a confidence of 50.49 % on, 99 % of" in page.inner_text("main")


def test_the_model_card(open_page, start, doubtful):
    with start(doubtful) as server:
        page = open_page(f"{server.url}/model")
        text = page.inner_text("main")
        assert "95.0 %" in text and "between 90.0 % and 98.0 %" in text and "On 60 pictures" in text
        cells = page.locator(".confusion td").all_inner_texts()
        assert cells == ["19", "1", "0", "0", "20", "0", "2", "0", "18"]
        assert page.locator(".confusion .right").all_inner_texts() == ["19", "20", "18"]
        assert page.locator(".figures tbody tr").count() == 3
        told = httpx.get(f"{server.url}/model", trust_env=False)
        assert told.json()["classes"] == ["red", "green", "blue"]


def test_a_model_without_figures_has_a_card(open_page, server):
    page = open_page(f"{server.url}/model")
    text = page.inner_text("main")
    assert "not tested yet" in text and "no threshold" in text and page.locator(".confusion").count() == 0


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


def test_trouble_is_in_sight_on_a_phone_held_sideways(open_page, server):
    page = open_page(server.url, viewport={"width": 640, "height": 340})
    page.set_input_files("#file", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"})
    page.wait_for_selector("#trouble:visible")
    playwright.expect(page.locator("#trouble")).to_be_in_viewport(ratio=0.99)


def test_an_answer_that_comes_late_hides_no_trouble(open_page, server, plain):
    page, sent = open_page(server.url), []
    page.route("**/predict?*", lambda route: sent.append(route))
    page.set_input_files("#file", picture(plain, "green"))
    page.wait_for_selector("#busy:visible")
    page.evaluate(GIVE, ["drop", ["a.png", "b.png"], list(plain("red"))])
    sent[0].fulfill(json={"label": "green", "confidence": 1, "class_index": 1})
    page.wait_for_timeout(100)
    assert page.inner_text("#trouble-title") == "One picture at a time" and page.is_hidden("#answer")


def test_a_lost_connection_is_tried_again(open_page, server, plain):
    page = open_page(server.url)
    page.context.set_offline(True)
    page.set_input_files("#file", picture(plain, "green"))
    page.wait_for_selector("#again:visible")
    assert page.inner_text("#trouble-title") == "The service did not answer"
    page.context.set_offline(False)
    page.click("#again")
    page.wait_for_selector("#answer:visible")
    assert page.inner_text("#label") == "green"


def test_an_upload_that_was_too_slow_can_be_tried_again(open_page, server, plain):
    page = open_page(server.url)
    page.route("**/predict?*", lambda route: route.fulfill(status=408, json={"title": "The upload is too slow", "detail": "Try again."}))
    page.set_input_files("#file", picture(plain, "green"))
    page.wait_for_selector("#again:visible")
    page.unroute("**/predict?*")
    page.click("#again")
    page.wait_for_selector("#answer:visible")


def test_too_large_is_told_without_sending(open_page, server, tmp_path):
    (tmp_path / "a.jpg").touch()
    os.truncate(tmp_path / "a.jpg", 10 * 2**20 + 1)
    page = open_page(server.url)
    page.set_input_files("#file", tmp_path / "a.jpg")
    page.wait_for_selector("#trouble:visible")
    assert page.inner_text("#trouble-detail") == "The file has 10.5 MB. The limit is 10.5 MB."


@pytest.mark.parametrize("path", PAGES)
def test_dark_and_light(open_page, server, path):
    shades = {}
    for scheme in ("light", "dark"):
        page = open_page(server.url + path, color_scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shades[scheme] = sum(int(part) for part in colour[4:-1].split(",")) / 3
    assert shades["dark"] < 60 < 200 < shades["light"]


def test_buttons_have_borders_where_the_system_sets_the_colours(open_page, server):
    for path, names in (("/", [".drop .button", "#camera"]), ("/batch", [".drop .button", "#choose-folder"])):
        page = open_page(server.url + path, forced_colors="active")
        for name in names:
            style = page.locator(name).first.evaluate("part => getComputedStyle(part).border")
            assert style.startswith("1px solid rgb(")  # rgba( is transparent


@pytest.mark.parametrize("path", PAGES)
def test_fits_a_phone(open_page, server, path):
    page = open_page(server.url + path, viewport={"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_long_class_names_fit_a_phone(open_page, start, doubtful, tmp_path):
    copy = Path(shutil.copytree(doubtful, tmp_path / "model"))
    info = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(info | {"classes": ["Amanita muscaria var. guessowii " * 3, "b" * 80, "c"]}))
    with start(copy) as server:
        page = open_page(f"{server.url}/model", viewport={"width": 360, "height": 700})
        assert page.locator(".confusion").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def focused(page):
    return page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")


def tab_to(page, wanted, most=30):
    """Press Tab until an element has the focus, and return what had it on the way; each shows that it has it."""
    passed = []
    while len(passed) < most and (not passed or passed[-1] != wanted):
        page.keyboard.press("Tab")
        passed.append(focused(page))
        assert page.evaluate("""(document.activeElement.closest(".drop") ?? document.activeElement)
            .matches(":focus-visible, :focus-within")""")
        outline = page.evaluate("""getComputedStyle(document.activeElement.closest(".drop") ??
            document.activeElement).outlineStyle""")
        assert outline == "solid"
    assert passed[-1] == wanted
    return passed


def choose_by_key(page, files):
    with page.expect_file_chooser() as chooser:
        page.evaluate("0")  # inside, so that the browser knows of the wait before it gets the key
        page.keyboard.press("Enter")
    chooser.value.set_files(files)


def test_the_first_page_by_keyboard(open_page, server, plain):
    page = open_page(server.url)
    assert tab_to(page, "file") == ["Skip to the content", "automl_cv", "Predict", "Batch", "Model", "API", "file"]
    choose_by_key(page, picture(plain, "blue"))
    page.wait_for_selector("#answer:visible")
    assert tab_to(page, "Use it from a program")[0] == "camera"
    page.keyboard.press("Enter")
    page.wait_for_selector("#python:visible")


def test_the_batch_page_by_keyboard(open_page, server, plain):
    page = open_page(f"{server.url}/batch")
    tab_to(page, "files")
    choose_by_key(page, [picture(plain, "blue"), picture(plain, "red")])
    page.wait_for_selector("#download:enabled")
    assert tab_to(page, "download") == ["choose-folder", "label", "low", "high", "download"]
    with page.expect_download() as saved:
        page.keyboard.press("Enter")
    assert saved.value.suggested_filename == "answers.csv"


def test_the_curl_line_is_the_real_one(open_page, server):
    page = open_page(server.url)
    page.click("summary")
    assert page.inner_text("#command").strip() == f"curl -F file=@picture.jpg {server.url}/predict"
    page.click("text=All addresses and errors")
    assert page.inner_text("h1") == "For programmers"
    assert f"curl {server.url}/health/ready" in page.inner_text("main")


def test_the_page_for_programmers_explains_what_it_shows(open_page, server):
    page = open_page(f"{server.url}/docs")
    rows = [row.split("\t") for row in page.locator("tr").all_inner_texts()]
    assert ["format", "json or csv", "a JSON line for each file, or a table"] in rows
    assert ["reason", "why: low_confidence, unlike_training, or none"] in rows


def test_hostile_class_names_and_a_dead_service(open_page, start, bundle, plain, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    info = json.loads((copy / "model.json").read_text())
    hostile = "<img src='x' onerror=alert(1)>"
    (copy / "model.json").write_text(json.dumps(info | {"classes": [hostile, "green", "b" * 100]}))
    with start(copy) as server:
        page = open_page(server.url, viewport={"width": 360, "height": 700})
        page.on("dialog", lambda dialog: pytest.fail("a script ran"))
        assert page.inner_text(".chips li:first-child") == hostile
        page.set_input_files("#file", picture(plain))
        page.wait_for_selector("#answer:visible")
        assert page.inner_text("#label") == hostile
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for path in ("/model", "/batch"):
            page.goto(server.url + path)
            assert page.inner_text("#classes ~ ul li:first-child, #label option:has-text('img')") == hostile
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.set_input_files("#files", picture(plain))
        page.wait_for_selector("#download:enabled")
        assert page.inner_text("#rows .answer") == hostile
        page.goto(server.url)
    page.set_input_files("#file", picture(plain))
    page.wait_for_selector("#trouble:visible")
    assert page.inner_text("#trouble-title") == "The service did not answer"


def test_the_lines_for_programs_work(open_page, server, plain, tmp_path):
    (tmp_path / "picture.jpg").write_bytes(plain("blue", "JPEG"))
    page = open_page(server.url)
    page.click("summary")
    found = subprocess.run([sys.executable, "-c", page.inner_text("#python")], cwd=tmp_path, text=True,
                           capture_output=True, check=True, env=os.environ | {"NO_PROXY": "*"})
    assert "'label': 'blue'" in found.stdout
    lines = page.inner_text("#javascript").replace("console.log(", "return (")
    label = page.evaluate("""async ([lines, bytes]) => {
        const file = new File([new Uint8Array(bytes)], "picture.png");
        const run = async (file) => { LINES };
        return (await run(file)).label;
    }""".replace("LINES", lines), [None, list(plain("red"))])
    assert label == "red"


def test_the_lines_for_programs_carry_a_key_where_one_is_needed(open_page, start, bundle, plain, tmp_path):
    (tmp_path / "picture.jpg").write_bytes(plain("blue", "JPEG"))
    with start(bundle, AUTOML_CV_API_KEYS=hashlib.sha256(b"k").hexdigest()) as server:
        page = open_page(server.url)
        page.click("summary")
        line = f'curl -H "X-API-Key: YOUR-KEY" -F file=@picture.jpg {server.url}/predict'
        assert page.inner_text("#command").strip() == line
        assert '"X-API-Key": "YOUR-KEY"' in page.inner_text("#javascript")
        lines = page.inner_text("#python").replace("YOUR-KEY", "k")
        found = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, text=True, capture_output=True, check=True,
                               env=os.environ | {"NO_PROXY": "*"})
        assert "'label': 'blue'" in found.stdout
        page.goto(f"{server.url}/docs")
        shown = page.locator("pre").all_inner_texts()
        assert line in shown and f"curl {server.url}/health/ready" in shown
        page.click("text=Errors >> nth=0")
        assert page.locator("td:visible:text-is('401') + td").all_inner_texts() == ["no_key"]
        page.goto(f"{server.url}/model")
        page.fill("#key", "k")
        page.keyboard.press("Enter")
        page.wait_for_selector("#quality")
        assert page.inner_text(".fine code") == f'curl -H "X-API-Key: YOUR-KEY" {server.url}/model'


@pytest.mark.parametrize("path", ["/", "/model", "/docs"])
def test_the_lines_for_programs_have_the_address_that_people_see(open_page, server, path):
    """A proxy is played: the page comes with an address that only the proxy knows."""
    page = open_page(server.url)
    page.route(f"{server.url}{path}", lambda route: route.fulfill(
        response=(found := route.fetch()), body=found.text().replace(server.url, "http://inside.invalid")))
    page.goto(server.url + path)
    shown = page.locator(".origin").all_text_contents()
    assert set(shown) == {server.url} and "inside.invalid" not in page.text_content("main")


def test_a_page_left_open_over_a_swap_of_the_model_says_so(open_page, start, bundle, plain, tmp_path):
    """A table with columns of the classes before, or labels where there was one class, would be no answer."""
    from automl_cv.export import colour_bundle
    live = Path(shutil.copytree(bundle, tmp_path / "live"))
    info = json.loads((live / "model.json").read_text())
    (live / "model.json").write_text(json.dumps(info | {"classes": ["cherry", "leaf", "sky"]}))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("red.png", plain("red"))
    with start(live) as server:
        one, many = open_page(server.url), open_page(f"{server.url}/batch")
        one.set_input_files("#file", picture(plain))
        one.wait_for_selector("#answer:visible")
        assert one.inner_text("#label") == "cherry"
        for task, label in (("classification", "red"), ("multilabel", "red")):
            colour_bundle(live, task)
            server.process.send_signal(signal.SIGHUP)
            while (facts := httpx.get(f"{server.url}/model", trust_env=False).json())["task"] != task or \
                    facts["classes"] != ["red", "green", "blue"]:
                one.wait_for_timeout(50)
            one.set_input_files("#file", picture(plain))
            one.wait_for_selector("#trouble:visible")
            assert one.inner_text("#trouble-title") == "The model has changed" and one.is_hidden("#again")
            many.set_input_files("#files", [picture(plain), zipped("a.zip", archive.getvalue())])
            many.wait_for_selector("text=2 files done, 2 failed")
            assert many.locator("#rows .failed strong").all_inner_texts() == ["The model has changed"] * 2
            for page in (one, many):
                page.reload()
            one.set_input_files("#file", picture(plain))
            one.wait_for_selector("#answer:visible")
            assert one.inner_text("#label, #found .name") == label


def test_leaving_a_batch_under_way_is_asked(open_page, server, plain):
    page, asked = open_page(f"{server.url}/batch"), []
    page.on("dialog", lambda dialog: asked.append(dialog.type) or dialog.dismiss())
    page.route("**/predict?*", lambda route: None)  # it takes its time
    page.set_input_files("#files", picture(plain))
    page.wait_for_selector("#stop:visible")
    with page.expect_event("dialog"):
        page.evaluate("location.reload()")
    assert asked == ["beforeunload"] and page.is_visible("#stop")
    page.click("#stop")
    page.wait_for_selector("text=1 file done, 1 failed")
    page.reload()
    assert asked == ["beforeunload"]


def read_csv(saved):
    """Read a table as Excel does: as UTF-8 where it begins with the mark."""
    data = Path(saved.value.path()).read_bytes()
    encoding = "utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "cp1252"
    return list(csv.reader(io.StringIO(data.decode(encoding), newline="")))


def download(page):
    with page.expect_download() as saved:
        page.click("#download")
    return read_csv(saved)


def ask(url, name, data):
    """Return the row of a table that the service's own answer makes."""
    reply = httpx.post(f"{url}/predict?top_k=3", files={"file": (name, data)}, trust_env=False)
    found = reply.json()
    if reply.is_error:
        return [name, "", "", "", "", "", found["code"]]
    shares = {share["label"]: share["probability"] for share in found.get("top_k") or found["probabilities"]}
    return [name, found["label"], found["confidence"], *(shares[label] for label in ("red", "green", "blue")), ""]


def as_numbers(row):
    return [float(cell) if cell and 1 < place < 6 else cell for place, cell in enumerate(row)]


def test_a_batch_of_fifty(open_page, server, plain):
    good = {f"{n:02} {colour}.png": plain(colour)
            for n, colour in zip(range(47), ("red", "green", "blue", "yellow", "teal", "orange", "navy") * 7)}
    bad = {"notes.png": b"no picture", "empty.png": b"", "half.png": plain("red")[:60]}
    pictures = dict(sorted((good | bad).items()))
    page = open_page(f"{server.url}/batch")
    page.set_input_files("#files", [{"name": name, "mimeType": "image/png", "buffer": data}
                                    for name, data in pictures.items()])
    page.wait_for_selector("#download:enabled")
    assert page.inner_text("#status") == "50 files done, 3 failed"
    head, *rows = download(page)
    assert head == ["file", "label", "confidence", "red", "green", "blue", "error"]
    assert [as_numbers(row) for row in rows] == [ask(server.url, name, data) for name, data in pictures.items()]
    assert [row[0] for row in rows if row[-1]] == ["empty.png", "half.png", "notes.png"]
    sides = page.locator("#rows canvas:not(.gone)").evaluate_all("all => all.map(one => one.width)")
    assert sides == [56] * 47


def test_filters_narrow_table_and_file(open_page, start, doubtful, plain):
    with start(doubtful) as server:
        page = open_page(f"{server.url}/batch")
        page.set_input_files("#files", [picture(plain, colour) for colour in ("red", "blue", "yellow")]
                             + [{"name": "a.png", "mimeType": "image/png", "buffer": b"x"}])
        page.wait_for_selector("#download:enabled")
        shown = {}
        for kind in ("=blue", "!failed", "!unsure"):
            page.select_option("#label", kind)
            page.wait_for_selector("text=Download CSV (1 of 4 rows)")
            shown[kind] = page.locator("#rows tr:visible .file").all_inner_texts()
        assert shown == {"=blue": ["blue.png"], "!failed": ["a.png"], "!unsure": ["yellow.png"]}
        files = [("files", ("yellow.png", plain("yellow"))), ("files", ("a.png", b"x"))]
        told = httpx.post(f"{server.url}/predict/batch?format=csv", files=files, trust_env=False).text.split("\r\n")
        assert told[0] == "file,label,confidence,red,green,blue,uncertain,error"
        assert told[1].endswith(",low_confidence,") and told[2] == "a.png,,,,,,,not_an_image"
        assert page.locator("#rows tr:visible .answer").text_content() == "red not sure"
        page.select_option("#label", "")
        page.fill("#high", "90")
        page.wait_for_selector("text=Download CSV (1 of 4 rows)")
        assert [[row[0], *row[-2:]] for row in download(page)] == [
            ["file", "uncertain", "error"], ["yellow.png", "low_confidence", ""]]
        page.fill("#low", "80")
        page.wait_for_selector("#nothing:visible")
        assert page.is_disabled("#download")


def test_a_batch_of_several_labels(open_page, start, plain, tmp_path):
    from automl_cv.export import colour_bundle

    with start(colour_bundle(tmp_path / "model", "multilabel")) as server:
        page = open_page(f"{server.url}/batch")
        page.set_input_files("#files", [picture(plain, colour) for colour in ("yellow", "black", "red")])
        page.wait_for_selector("#download:enabled")
        assert page.locator("#rows .answer").all_inner_texts() == ["red, green", "none of the labels", "red"]
        assert page.locator("#rows .share").all_inner_texts() == ["over 99 %", "", "over 99 %"]
        assert [row[1] for row in download(page)] == ["label", "red|green", "", "red"]
        page.select_option("#label", "=green")
        page.wait_for_selector("text=Download CSV (1 of 3 rows)")
        assert page.locator("#rows tr:visible .file").all_inner_texts() == ["yellow.png"]


def test_a_long_table_is_drawn_in_parts(open_page, server, plain, tmp_path):
    for n in range(203):
        (tmp_path / f"{n}.png").write_bytes(plain("red"))
    page = open_page(f"{server.url}/batch")
    page.set_input_files("#folder", tmp_path)
    page.wait_for_selector("#download:enabled")
    assert page.locator("#rows tr:visible").count() == 200
    page.click("text=Show 3 more of 203 rows")
    assert page.locator("#rows tr:visible").count() == 203 and page.is_hidden("#more")
    assert len(download(page)) == 204


def test_failed_rows_are_tried_again(open_page, server, plain):
    page = open_page(f"{server.url}/batch")
    page.context.set_offline(True)
    page.set_input_files("#files", [picture(plain, "red"), picture(plain, "blue")])
    page.wait_for_selector("#retry:visible")
    assert page.inner_text("#status") == "2 files done, 2 failed"
    assert "The service did not answer" in page.inner_text("#rows")
    page.context.set_offline(False)
    page.click("#retry")
    page.wait_for_selector("#rows tr.failed", state="detached")
    page.wait_for_selector("#download:enabled")
    assert [row[:2] for row in download(page)[1:]] == [["red.png", "red"], ["blue.png", "blue"]]


def test_a_line_too_slow_for_four_pictures_gets_them_one_by_one(open_page, server, plain):
    page, sent = open_page(f"{server.url}/batch"), []
    page.route("**/predict?*", lambda route: sent.append(route))
    page.set_input_files("#files", [picture(plain, "red") | {"name": f"{n}.png"} for n in range(6)])

    def wait_for(count):
        end = time.monotonic() + 10
        while len(sent) < count and time.monotonic() < end:
            page.wait_for_timeout(20)
        page.wait_for_timeout(100)
        assert len(sent) == count  # and no other

    wait_for(4)
    for route in sent[:]:
        route.fulfill(status=408, json={"title": "The upload is too slow", "detail": "Try again.", "code": "too_slow"})
    for count in range(5, 11):
        wait_for(count)
        sent[-1].continue_()
    page.wait_for_selector("#download:enabled")
    assert page.inner_text("#status") == "6 files done"


def test_stop_ends_the_uploading_and_keeps_what_came(open_page, server, plain):
    """Six pictures are answered, the next four are under way when it is stopped, and the others are never sent."""
    page, sent = open_page(f"{server.url}/batch"), []
    page.route("**/predict?*", lambda route: sent.append(route) or len(sent) > 6 or route.continue_())
    page.set_input_files("#files", [picture(plain, "red") | {"name": f"{n:02}.png"} for n in range(40)])
    page.wait_for_selector("text=6 of 40 done")
    end = time.monotonic() + 10
    while len(sent) < 10 and time.monotonic() < end:
        page.wait_for_timeout(20)
    page.click("#stop")
    page.wait_for_selector("#download:enabled")
    assert page.inner_text("#status") == "40 files done, 34 failed" and page.is_hidden("#stop")
    assert len(sent) == 10
    rows = download(page)[1:]
    assert [row[0] for row in rows] == [f"{n:02}.png" for n in range(40)]
    assert sorted((row[1], row[-1]) for row in rows) == [("", "stopped")] * 34 + [("red", "")] * 6
    page.unroute("**/predict?*")
    page.click("#retry")
    page.wait_for_selector("text=40 files done")
    assert [row[1] for row in download(page)[1:]] == ["red"] * 40


def test_a_folder_and_names_that_spreadsheets_would_run(open_page, server, plain, tmp_path):
    for name in ("in/=1+1.png", "in/Bär,\"c\".png", "in/.hidden", "in/__MACOSX/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(plain("red"))
    page = open_page(f"{server.url}/batch")
    page.set_input_files("#folder", tmp_path / "in")
    page.wait_for_selector("#download:enabled")
    assert sorted(row[0] for row in download(page)[1:]) == ["in/=1+1.png", 'in/Bär,"c".png']
    assert page.inner_text("#status") == "2 files done, 2 hidden files left out"
    page.evaluate(GIVE, ["drop", ["=1+1.png", "-a.png", "@b.png"], list(plain("red"))])
    page.wait_for_selector("text=5 files done")
    assert sorted(row[0] for row in download(page)[1:])[:3] == ["'-a.png", "'=1+1.png", "'@b.png"]


def test_a_zip_goes_as_it_is(open_page, server, plain, tmp_path):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("red.png", plain("red"))
        archive.writestr("bad.png", b"no picture")
    page = open_page(f"{server.url}/batch")
    page.set_input_files("#files", tmp_path / "some.zip")
    page.wait_for_selector("text=2 files done, 1 failed")
    assert [row[:2] for row in download(page)[1:]] == [["red.png", "red"], ["bad.png", ""]]
    assert page.inner_text("#rows .failed strong") == "The file is not a picture"
    page.context.set_offline(True)
    page.set_input_files("#files", tmp_path / "some.zip")
    page.wait_for_selector("#rows:has-text('The service did not answer')")


def test_a_file_that_is_too_large_on_the_way_is_told(open_page, server, plain):
    """Cloud Run refuses what has over 32 MiB with a page of its own."""
    page = open_page(f"{server.url}/batch")
    assert "up to 10 MB, or zips, each up to 100 MB" in " ".join(page.inner_text("#hint").split())
    page.route("**/predict/batch*", lambda route: route.fulfill(status=413, body="<h1>Error</h1>", content_type="text/html"))
    page.set_input_files("#files", zipped("a.zip", b"PK"))
    page.wait_for_selector("#rows .failed")
    assert page.inner_text("#rows .failed strong") == "The file is too large"
    assert page.inner_text("#rows .failed span").endswith("Give a smaller one; of a zip, the unpacked folder.")


def zipped(name, data):
    return {"name": name, "mimeType": "application/zip", "buffer": data}


def test_each_bad_zip_has_a_row(open_page, server):
    page = open_page(f"{server.url}/batch")
    page.set_input_files("#files", [zipped("one.zip", b"PK\3\4junk"), zipped("two.zip", b"PK\3\4junk")])
    page.wait_for_selector("text=2 files done, 2 failed")
    assert [[row[0], row[-1]] for row in download(page)[1:]] == [["one.zip", "bad_archive"], ["two.zip", "bad_archive"]]


def test_a_busy_service_is_asked_again_for_a_zip(open_page, server, plain):
    """It is busy for five turns; then its row can be retried, where it is busy once more."""
    archive, asked = io.BytesIO(), []
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("red.png", plain("red"))
        file.writestr("blue.png", plain("blue"))
    busy = {"status": 503, "json": {"title": "The service is busy", "detail": "Ask again.", "code": "busy"},
            "headers": {"Retry-After": "0.01"}}
    page = open_page(f"{server.url}/batch")
    page.route("**/predict/batch*", lambda route: asked.append(route) or (
        route.fulfill(**busy) if len(asked) < 7 else route.continue_()))
    page.set_input_files("#files", zipped("a.zip", archive.getvalue()))
    page.wait_for_selector("#retry:visible")
    assert len(asked) == 5 and page.inner_text("#rows .failed strong") == "The service is busy"
    page.click("#retry")
    page.wait_for_selector("text=2 files done")
    assert len(asked) == 7 and [row[:2] for row in download(page)[1:]] == [["red.png", "red"], ["blue.png", "blue"]]


def test_a_service_that_restarts_behind_a_proxy_is_asked_again(open_page, server, plain):
    """The proxy says 502 meanwhile. On the first page a person sees it and asks again."""
    page, asked = open_page(f"{server.url}/batch"), []
    page.route("**/predict?*", lambda route: asked.append(route) or (
        route.fulfill(status=502, body="<h1>502 Bad Gateway</h1>", content_type="text/html", headers={"Retry-After": "0.01"})
        if len(asked) < 3 else route.continue_()))
    page.set_input_files("#files", picture(plain))
    page.wait_for_selector("#download:enabled")
    assert (len(asked), page.inner_text("#rows .answer")) == (3, "red")
    page.goto(server.url)
    asked.clear()
    page.set_input_files("#file", picture(plain))
    page.wait_for_selector("#again:visible")
    assert page.inner_text("#trouble-title") == "The service did not answer"
    assert page.inner_text("#trouble-detail") == "The answer has the status 502. Try again."


def test_a_zip_that_broke_off_is_answered_once(open_page, server, plain):
    archive, lines = io.BytesIO(), []
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("red.png", plain("red"))
    page = open_page(f"{server.url}/batch")
    page.route("**/predict/batch*", lambda route: lines.append(route) or (route.continue_() if lines[1:] else route.fulfill(
        body='{"file": "red.png", "label": "red", "confidence": 1.0, "class_index": 0}\n{"file": "bl')))
    page.set_input_files("#files", zipped("a.zip", archive.getvalue()))
    page.wait_for_selector("text=2 files done, 1 failed")
    assert sorted(row[0] for row in download(page)[1:]) == ["a.zip", "red.png"]
    page.click("#retry")
    page.wait_for_selector("text=1 file done")
    assert [row[0] for row in download(page)[1:]] == ["red.png"]


def test_what_systems_leave_in_folders_is_left_out(open_page, server, plain):
    from automl_cv.core import SYSTEM

    page = open_page(f"{server.url}/batch")
    page.evaluate(GIVE, ["drop", ["red.png", "Desktop.ini", ".DS_Store", *SYSTEM], list(plain("red"))])
    page.wait_for_selector("text=1 file done, 9 hidden files left out")


def violations(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="NO AXE: not installed")
    found = axe.Axe().run(page).response["violations"]
    return [(rule["id"], node["html"]) for rule in found for node in rule["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(open_page, start, doubtful, plain, scheme):
    with start(doubtful) as server:
        for path in PAGES:
            page = open_page(server.url + path, color_scheme=scheme, reduced_motion="reduce")
            page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
            assert violations(page) == [], path
            if path == "/":
                page.set_input_files("#file", picture(plain, "yellow"))
                page.wait_for_selector("#answer:visible")
                assert violations(page) == []
                page.set_input_files("#file", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"x"})
                page.wait_for_selector("#trouble:visible")
                assert violations(page) == []
            if path == "/batch":
                page.set_input_files("#files", [picture(plain, "yellow"), picture(plain)]
                                     + [{"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"x"}])
                page.wait_for_selector("#download:enabled")
                assert violations(page) == []


def test_a_service_with_keys(open_page, start, bundle, plain):
    """The pages ask for the key, send it with each request, and say when it is wrong."""
    digest = hashlib.sha256(b"a long secret").hexdigest()
    with start(bundle, AUTOML_CV_API_KEYS=digest) as server:
        page = open_page(server.url)
        page.set_input_files("#file", picture(plain))
        page.wait_for_selector("#trouble:visible")
        assert page.inner_text("#trouble-title") == "The key is missing or wrong"
        page.fill("#key", "a long secret")
        page.keyboard.press("Enter")
        page.click("#again")
        page.wait_for_selector("#answer:visible")
        assert page.inner_text("#label") == "red"
        page.click("text=Model")
        page.wait_for_selector("#quality")
        page.click("text=Batch")
        page.wait_for_url("**/batch")  # and for its scripts
        page.set_input_files("#files", [picture(plain), picture(plain, "blue")])
        page.wait_for_selector("tbody tr:nth-child(2)")
        page.evaluate("sessionStorage.setItem('key', 'another')")
        page.goto(f"{server.url}/model")
        page.wait_for_selector("text=does not know this key")
        page.fill("#key", "a long secret")
        page.click("text=Use this key")
        page.wait_for_selector("#quality")


def test_a_key_that_no_header_can_carry_is_told(open_page, start, bundle):
    with start(bundle, AUTOML_CV_API_KEYS=hashlib.sha256(b"k").hexdigest()) as server:
        page = open_page(f"{server.url}/model")
        page.fill("#key", "“k”")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=a curly quotation mark")
        page.fill("#key", "k")
        page.keyboard.press("Enter")
        page.wait_for_selector("#quality")


@pytest.mark.parametrize("scheme,border", [("light", "rgb(92, 96, 112)"), ("dark", "rgb(162, 167, 184)")])
def test_a_page_that_was_unlocked_can_be_used_by_keyboard(open_page, start, doubtful, scheme, border):
    with start(doubtful, AUTOML_CV_API_KEYS=hashlib.sha256(b"k").hexdigest()) as server:
        page = open_page(f"{server.url}/model", color_scheme=scheme)
        assert page.inner_text("[aria-current=page]") == "Model" and violations(page) == []
        assert page.locator("#key").evaluate("field => getComputedStyle(field).borderColor") == border
        page.fill("#key", "k")
        page.keyboard.press("Enter")
        page.wait_for_selector("#quality")
        assert focused(page) == "main" and violations(page) == []


def test_the_copy_button_says_what_it_did(open_page, server):
    page = open_page(server.url, permissions=["clipboard-read", "clipboard-write"])
    page.click("summary")
    page.get_by_role("button", name="Copy the curl lines", exact=True).click()
    page.get_by_role("button", name="Copied the curl lines", exact=True).wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == f"curl -F file=@picture.jpg {server.url}/predict"


def test_a_browser_that_lends_no_storage(open_page, start, bundle, plain):
    """The page works as it is, and with a key for as long as it is open."""
    blocked = """Object.defineProperty(window, "sessionStorage", {
        get() { throw new DOMException("denied", "SecurityError"); }})"""
    with start(bundle, AUTOML_CV_API_KEYS=hashlib.sha256(b"k").hexdigest()) as server:
        page = open_page(server.url)
        page.add_init_script(blocked)
        page.reload()
        page.set_input_files("#file", picture(plain))
        page.wait_for_selector("#trouble:has-text('The key is missing or wrong')")
        page.fill("#key", "k")
        page.keyboard.press("Enter")
        page.click("#again")
        page.wait_for_selector("#answer:visible")
        assert page.inner_text("#label") == "red"


@pytest.mark.parametrize("scheme, ink", [("light", "rgb(27, 29, 41)"), ("dark", "rgb(236, 238, 245)")])
def test_the_words_of_drawings_have_the_ink_of_the_data_report(browser, tmp_path, scheme, ink):
    run_step(str(tmp_path), "demo:5")
    page = browser.new_page(color_scheme=scheme)
    page.goto((tmp_path / "report.html").as_uri())
    fills = page.eval_on_selector_all("svg text", "all => all.map(one => getComputedStyle(one).fill)")
    page.close()
    assert set(fills) == {ink}
