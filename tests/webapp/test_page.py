"""The web page as a visitor has it: a real browser, the app as a process of its own, bad input and many clicks."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio_client
import pytest
from PIL import Image

from shortcut_jax.inference.image_files import SHEET, read_records, save_image
from tests.helpers import CHROMIUM

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
pytestmark = pytest.mark.slow

SEVEN = "a handwritten digit seven"
GOOD = [SEVEN, 4, 4, 0, 1.0, "slow", "euler", 0]
"""Values in the order of the fields of a run: prompt, steps, num, seed, guidance, view, method, shift."""
BUSY = re.compile("queue is full|busy", re.IGNORECASE)


class Served:
    """The app as a process; its address is known when it serves."""

    def __init__(self, workdir, log, *options):
        flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
        folder = log.parent / f"{log.stem}-tmp"
        folder.mkdir()
        env = {**os.environ, "XLA_FLAGS": " ".join(flags), "TMPDIR": str(folder)}
        command = [sys.executable, "-m", "shortcut_jax.app", f"--workdir={workdir}", "--port=0", *options]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
        self.log, self.folder = log, folder
        self.url = self._wait(r"the page is at (http://127\.0\.0\.1:\d+)")

    def _wait(self, pattern, timeout=180):
        end = time.monotonic() + timeout
        while time.monotonic() < end and self.process.poll() is None:
            if found := re.search(pattern, self.log.read_text()):
                return found[1]
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def ask(self, name, values, timeout=60):
        """`complete` and what was answered, or `error` and the message, through the HTTP interface."""
        body = json.dumps({"data": values}).encode()
        where = f"{self.url}/gradio_api/call/{name}"
        request = urllib.request.Request(where, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                event = json.load(reply)["event_id"]
        except urllib.error.HTTPError as error:
            return "error", error.read().decode()
        with urllib.request.urlopen(f"{where}/{event}", timeout=timeout) as stream:
            text = stream.read().decode()
        kind, data = re.findall(r"event: (complete|error)\ndata: (.*)", text)[-1]
        return kind, data

    def end(self, which):
        self.process.send_signal(which)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory):
    app = Served(trained, tmp_path_factory.mktemp("app") / "log", "--nowarm_up")
    yield app
    if app.process.poll() is None:
        app.process.kill()


@pytest.fixture
def page(served):
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as playwright,
        contextlib.closing(
            playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        ) as browser,
    ):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(served.url)
        page.wait_for_selector("button#sample")
        yield page


def _shown(page, selector, num):
    """Waits until so many images are there, decoded."""
    script = "([s, n]) => [...document.querySelectorAll(s)].filter(x => x.complete && x.naturalWidth > 0).length == n"
    page.wait_for_function(script, arg=[selector, num])


@needs_chromium
def test_a_prompt_becomes_images_and_a_comparison(served, page):
    page.fill("#prompt textarea", SEVEN)
    page.click("button#sample")
    _shown(page, "#gallery img", 4)
    status = page.inner_text("#sample-status")
    assert re.search(r"4 images in 4 steps: [\d.]+ m?s, [\d.]+ m?s each", status)
    assert re.search(r"Compiled once in [\d.]+ m?s, which is not part of the times", status)
    assert all(re.fullmatch(r"[\d.]+ m?s", x) for x in page.locator("#gallery .caption-label").all_inner_texts())
    page.locator("#gallery .thumbnail-item").nth(2).click()
    with page.expect_download() as downloading:
        page.locator("#gallery").get_by_label("Download").click()
    download = downloading.value
    assert download.suggested_filename == "a-handwritten-digit-seven-seed0-2-steps4.png"
    image, (made_by,) = Image.open(download.path()), read_records(download.path())
    assert image.size == (256, 256) and made_by["enlarged"] == 32
    assert image.text["parameters"].startswith(f"{SEVEN}\nSteps: 4, Sampler: Euler, CFG scale: 1.0, Seed: 0, Size: 8x8")
    assert [made_by[k] for k in ("prompt", "steps", "seed", "index", "view")] == [SEVEN, 4, 0, 2, "slow"]
    page.keyboard.press("Escape")
    page.click("#random")
    page.wait_for_function("document.querySelector('#seed-row input').value != '0'")
    page.get_by_role("tab", name="Compare").click()
    page.click("button#compare")
    _shown(page, ".compared img", 4)
    page.wait_for_function("document.querySelectorAll('.time .bar').length == 4")
    for n in (1, 2, 4, 32):
        assert re.fullmatch(rf"{n} steps? · [\d.]+ m?s", page.inner_text(f"#time-{n}").strip())
    assert len({page.locator(".compared img").nth(i).get_attribute("src") for i in range(4)}) == 4
    elsewhere = [url for url in page.asked if not url.startswith((served.url, "data:", "blob:"))]
    assert elsewhere == []


@needs_chromium
def test_an_empty_prompt_is_told_and_the_page_goes_on(page):
    page.fill("#prompt textarea", "  ")
    page.click("button#sample")
    page.get_by_text("the prompt is empty: say what the image should show").wait_for()
    page.fill("#prompt textarea", "a cat")
    page.click("button#sample")
    page.wait_for_selector("#sample-status .note")
    assert "never seen in training, so of no meaning: 'cat'" in page.inner_text("#sample-status .note")
    page.fill("#prompt textarea", SEVEN)
    page.click("button#sample")
    page.wait_for_selector("#sample-status .note", state="detached")
    _shown(page, "#gallery img", 4)


def test_what_a_browser_would_not_send_is_told_and_ends_nothing(served):
    for place, value, message in (
        (1, 1000, "steps is 1000, but must be 1 to 64"),
        (0, "", "the prompt is empty"),
        (0, {"a": [None]}, "but must be text"),
        (2, 10**30, "num is a number of 100 bits"),
        (4, float("nan"), "guidance is"),
        (4, None, "guidance is None"),
        (5, "../../x", "view is '../../x', but must be one of slow, online, fast"),
        (6, "magic", "method is 'magic', but must be one of euler, heun"),
        (7, -1, "shift is -1, but must be 0 to 20"),
    ):
        values = [*GOOD[:place], value, *GOOD[place + 1 :]]
        kind, data = served.ask("sample", values)
        assert kind == "error" and message in data, data
    assert served.ask("compare", ["", 0, 1.0, "slow", "euler", 0])[0] == "error"
    assert "Traceback" not in served.log.read_text()
    assert served.ask("sample", GOOD[:3])[0] == "error"
    assert served.ask("sample", GOOD)[0] == "complete"


@needs_chromium
@pytest.mark.parametrize("width, height", [(390, 844), (1280, 800)])
def test_nothing_is_wider_than_the_screen(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    page.reload()
    page.wait_for_selector("button#sample")
    button = page.locator("button#sample").bounding_box()
    assert button["y"] > 0 and button["y"] + button["height"] <= height
    page.click("button#sample")
    _shown(page, "#gallery img", 4)
    for name in ("Sample", "Compare", "Edit"):
        page.get_by_role("tab", name=name).click()
        wide = """() => [...document.querySelectorAll('.gradio-container *')].filter(
            x => x.checkVisibility() && x.getBoundingClientRect().right > innerWidth + 1).length"""
        assert page.evaluate("document.documentElement.scrollWidth") <= width and page.evaluate(wide) == 0, name
    page.get_by_role("tab", name="Sample").click()
    cells = [page.locator("#gallery .thumbnail-item").nth(i).bounding_box() for i in range(4)]
    assert len({round(cell["y"]) for cell in cells}) == (2 if width == 390 else 1)


@needs_chromium
def test_an_uploaded_image_is_edited(page, tmp_path):
    Image.new("RGB", (60, 40), "gray").save(tmp_path / "one.png")
    page.get_by_role("tab", name="Edit").click()
    page.fill("#prompt textarea", SEVEN)
    page.click("button#edit")
    page.get_by_text("the image is missing: upload the one to edit").wait_for()
    page.set_input_files("#source input[type=file]", tmp_path / "one.png")
    page.wait_for_selector("#source img")
    page.fill("#source-prompt textarea, #source-prompt input", "a handwritten digit one")
    page.click("button#edit")
    _shown(page, "#edited img", 1)
    assert "Resized from 60 x 40 and cut to 8 x 8 pixels" in page.inner_text("#edit-status")
    with page.expect_download() as downloading:
        page.locator("#edited a[download]").first.click()
    (made_by,) = read_records(downloading.value.path())
    assert downloading.value.suggested_filename == "a-handwritten-digit-seven-edit-seed0-steps8.png"
    assert (made_by["source_prompt"], made_by["skip"], made_by["prompt"]) == ("a handwritten digit one", 1, SEVEN)


def test_endpoints_have_names_and_so_have_their_parameters(served, tmp_path):
    client = gradio_client.Client(served.url, verbose=False, download_files=str(tmp_path / "got"))
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(described) == {"/sample", "/compare", "/edit"}
    names = {name: [p["parameter_name"] for p in found["parameters"]] for name, found in described.items()}
    assert names["/sample"] == ["prompt", "steps", "num", "seed", "guidance", "view", "method", "shift"]
    for name, found in described.items():
        assert all(f"{parameter}: " in found["description"] for parameter in names[name]), name
    images, status = client.predict(prompt=SEVEN, steps=2, num=3, seed=5, method="heun", shift=2.0, api_name="/sample")
    assert len(images) == 3 and "3 images in 2 steps" in status
    (made_by,) = read_records(images[1]["image"])
    assert [made_by[k] for k in ("steps", "seed", "index", "method", "shift")] == [2, 5, 1, "heun", 2.0]
    *shown, last = client.predict(prompt=SEVEN, view="online", api_name="/compare")[:4]
    assert [read_records(x)[0]["steps"] for x in (*shown, last)] == [1, 2, 4, 32]
    upload = gradio_client.handle_file(images[0]["image"])
    values = dict(source_prompt=SEVEN, prompt="a handwritten digit one", api_name="/edit")
    edited, status = client.predict(image=upload, steps=4, skip=1, **values)
    assert read_records(edited)[0]["source_prompt"] == SEVEN and "1 image in 4 steps" in status
    sheet = tmp_path / "sheet.png"
    save_image(sheet, Image.open(edited), [made_by], SHEET)
    for changes, message in (
        (dict(image=upload, steps=4, skip=4), "skip is 4, but must be less than the 4 steps"),
        (dict(image=upload, method="heun"), "an edit goes with euler only"),
        (dict(image=gradio_client.handle_file(sheet)), "the image is a sheet of several"),
        (dict(image=gradio_client.handle_file(__file__)), "the image cannot be read: unsupported format"),
        (dict(image={"path": "/etc/hostname"}), "the image is no file that was uploaded here"),
        (dict(image={"path": ["x"]}), ""),
        (dict(image=upload, source_prompt=" "), "the source prompt is empty"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError) as refused:
            client.predict(**{**values, **changes})
        assert message in str(refused.value), changes


def _raw(served, method, path, headers, body=None):
    """Status, headers and text of one request, with a Host of one's own."""
    connection = http.client.HTTPConnection("127.0.0.1", int(served.url.rpartition(":")[2]), timeout=30)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        reply = connection.getresponse()
        return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read().decode()


def test_foreign_hosts_and_pages_are_refused(served):
    own, port = served.url.removeprefix("http://"), served.url.rpartition(":")[2]
    assert _raw(served, "GET", "/config", {"Host": own})[0] == 200
    assert _raw(served, "GET", "/", {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"})[0] == 200
    call = json.dumps({"data": GOOD}).encode()
    send = {"Content-Type": "application/json", "Content-Length": str(len(call))}
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for method, path, headers, body in (
        ("GET", "/", {}, None),
        ("GET", "/config", {}, None),
        ("OPTIONS", "/gradio_api/queue/join", ask, None),
        ("POST", "/gradio_api/call/sample", send, call),
        ("POST", "/gradio_api/queue/join", send, call),
        ("GET", "/gradio_api/queue/data?session_hash=x", {}, None),
        ("GET", "/gradio_api/heartbeat/x", {}, None),
    ):
        for foreign in ({"Host": "evil.example"}, {"Host": own, "Origin": "http://evil.example"}):
            status, answered, text = _raw(served, method, path, {**foreign, **headers}, body)
            assert status == 403 and "evil.example" in text and text.count("\n") == 1, (path, foreign, text)
            assert not [name for name in answered if name.startswith("access-control")]
    assert served.ask("sample", GOOD)[0] == "complete"


def test_large_bodies_are_refused_unread(served):
    own = {"Host": served.url.removeprefix("http://"), "Content-Type": "application/json"}
    for path in ("/gradio_api/call/sample", "/gradio_api/queue/join", "/gradio_api/upload", "/login"):
        status, _, text = _raw(served, "POST", path, {**own, "Content-Length": str(200 * 2**20)})
        assert status == 413 and "at most" in text, (path, text)
    chunks = b"".join(b"10000\r\n%b\r\n" % (b" " * 2**16) for _ in range(20))
    status, _, text = _raw(served, "POST", "/gradio_api/call/sample", {**own, "Transfer-Encoding": "chunked"}, chunks)
    assert status == 413 and "at most 1 MiB" in text


@needs_chromium
def test_fifty_at_once_are_answered_or_told_that_the_queue_is_full(served, page):
    start = time.monotonic()
    with ThreadPoolExecutor(50) as pool:
        slow = [[SEVEN, 64, 4, seed, *GOOD[4:]] for seed in range(50)]
        answers = list(pool.map(lambda values: served.ask("sample", values), slow))
    assert time.monotonic() - start < 120
    kinds = Counter("full" if BUSY.search(data) else kind for kind, data in answers)
    assert kinds["complete"] >= 16 and kinds["full"] and sum(kinds.values()) == 50 == kinds["complete"] + kinds["full"]
    # A visitor who clicks while it is full gets a message.
    done = threading.Event()

    def press():
        while not done.is_set():
            served.ask("sample", slow[0])

    with ThreadPoolExecutor(40) as pool:
        for _ in range(40):
            pool.submit(press)
        try:
            time.sleep(1)
            page.fill("#prompt textarea", SEVEN)
            page.click("button#sample")
            page.get_by_text(BUSY).first.wait_for()
        finally:
            done.set()
    page.click("button#sample")
    _shown(page, "#gallery img", 4)


def test_sigterm_ends_it_while_it_works(served):
    pool = ThreadPoolExecutor(4)
    for _ in range(4):
        pool.submit(served.ask, "sample", [SEVEN, 64, 16, *GOOD[3:]])
    time.sleep(0.3)
    start = time.monotonic()
    assert served.end(signal.SIGTERM) == 0
    assert time.monotonic() - start < 15
    pool.shutdown()
    assert served.log.read_text().splitlines()[-1] == "stopped by SIGTERM"
    assert not list(served.folder.glob("shortcut_jax_app_*"))


def test_control_c_ends_it(trained, tmp_path):
    app = Served(trained, tmp_path / "log", "--nowarm_up", "--views=online")
    assert Path(f"/proc/{app.process.pid}").exists()
    assert app.end(signal.SIGINT) == 130
    assert app.log.read_text().splitlines()[-1] == "stopped by SIGINT"
