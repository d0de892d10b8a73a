"""The playground, in a real headless Chromium, before a gateway and real Tritons."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import small_models
from axe_core_python.selenium import Axe
from conftest import MODEL, ROOT, free_options, wait_until
from gateways import gateway, triton_model
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from tokenizers import Tokenizer

from halimede import Embedder, Reranker
from halimede_tools.build.plan import build, build_request
from halimede_tools.build.samples import pictures
from halimede_tools.serve import wheel
from halimede_tools.settings import Settings

pytestmark = pytest.mark.needs("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-dev-shm-usage", "--force-device-scale-factor=1")  # fmt: skip
TABS = ("texts", "rank", "images", "map")
SIZES = {"desktop": (1280, 900), "phone": (375, 812)}
DOCUMENTS = ["A heat pump warms rooms.", "The museum opens at nine.", "Wool socks keep feet warm."]
LONG = "The attic keeps heat, said the engineer; curtains stop draughts – mostly. " * 25
LINES = [f"{word} number {n}" for n in range(250) for word in ("apple", "Paris", "violin", "rain")]
SAFE_ROUNDING = 6e-4
"""The page shows three digits."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[wheel.Server]:
    """A running Triton with a small CLIP and a small reranker."""
    folder = tmp_path_factory.mktemp("small")
    home = Settings(home=folder / "home", repository=folder / "repository")
    for name, make in (("clip", small_models.clip), ("reranker", small_models.bert_reranker)):
        build(build_request(str(make(folder / name)), name, precisions=("fp32",)), home)
    with wheel.serve(home.repository, home.python_backend, folder, free_options()) as running:
        yield running


@pytest.fixture(scope="module")
def site(server: wheel.Server, small: wheel.Server) -> Iterator[str]:
    """A gateway with a model of texts, one of images, and a reranker."""
    models = triton_model(server) | triton_model(small, "clip")
    with gateway(models, serve_all=True) as running:
        yield running


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(4):
        form = pictures.Form("PNG", "RGB")
        (folder / f"photo-{seed}.png").write_bytes(
            pictures.encoded(pictures.drawn(seed, 160, 120), form)
        )
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options, service) as running:
        yield running


class Page:
    """The page in the browser."""

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, tab: str = "texts", size: str = "desktop", scheme: str = "light") -> None:
        """Load the page, and wait for its models."""
        width, height = SIZES[size]
        command = self.driver.execute_cdp_cmd
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        command("Emulation.setEmulatedMedia", {"features": features})
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        command("Emulation.setDeviceMetricsOverride", {**metrics, "mobile": size == "phone"})
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}/#{tab}")
        wait_until(lambda: self["facts"].text)

    def __getitem__(self, id_: str) -> WebElement:
        return self.driver.find_element(By.ID, id_)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def write(self, id_: str, text: str) -> None:
        """Put a text into a field at once, as pasting does."""
        self.driver.execute_script(
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            self[id_],
            text,
        )

    def work(self, tab: str) -> str:
        """Press a tab's button; return what its status says in the end."""
        self.driver.find_element(By.CSS_SELECTOR, f"form[data-tab={tab}] button.main").click()
        return self.answered(tab)

    def answered(self, tab: str) -> str:
        wait_until(lambda: self[f"{tab}-status"].text != "Working …")
        return self[f"{tab}-status"].text

    def requests(self) -> list[dict[str, Any]]:
        """What was requested since this was last asked."""
        messages = [
            json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")
        ]
        return [
            message["params"]["request"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def code(self, language: str) -> str:
        self.driver.find_element(By.CSS_SELECTOR, f"[name=language][value={language}]").click()
        return self["code"].get_attribute("textContent") or ""


@pytest.fixture
def page(driver: webdriver.Chrome, site: str) -> Iterator[Page]:
    """The page; afterwards nothing has failed in it, and nothing left its origin."""
    for log in ("browser", "performance"):
        driver.get_log(log)
    opened = Page(driver, site)
    yield opened
    assert driver.get_log("browser") == []
    for request in opened.requests():
        assert request["url"].startswith((f"{site}/", "data:", f"blob:{site}/", "about:"))


def numbers(cells: list[WebElement]) -> np.ndarray:
    return np.array([float(cell.text.replace("−", "-")) for cell in cells])


def vectors_of(address: str, texts: list[str], **fields: str) -> np.ndarray:
    """The API's vectors of texts."""
    body = {"model": MODEL, "input": texts, **fields}
    answer = httpx.post(f"{address}/v1/embeddings", json=body, timeout=60).json()
    return np.array([row["embedding"] for row in answer["data"]])


def test_files_and_their_policy(site: str) -> None:
    """Only the page's own files are served, for GET and HEAD, and they may load nothing else."""
    with httpx.Client(base_url=site) as http:
        paths = ["/", "/playground/app.js", "/playground/style.css", "/playground/icon.svg"]
        for path in paths:
            answer = http.get(path)
            assert (answer.status_code, http.head(path).status_code) == (200, 200)
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
            assert "unsafe" not in policy
        for path in ("/playground/..%2Fapp.py", "/playground/other.js", "/playground/"):
            assert http.get(path).status_code == 404


def test_it_can_be_turned_off(server: wheel.Server) -> None:
    with gateway(triton_model(server), playground=False) as running:
        for path in ("/", "/playground/app.js", "/playground/api/models"):
            assert httpx.get(f"{running}{path}").status_code == 404


def test_bad_requests_are_refused_in_words(site: str) -> None:
    """Too much, too little, another kind of model, and what is no image: 4xx."""
    bodies: list[tuple[str, dict[str, Any], int]] = [
        ("similarity", {"model": MODEL, "texts": []}, 422),
        ("similarity", {"model": MODEL, "texts": ["a"] * 65}, 422),
        ("similarity", {"model": "nothing", "texts": ["a"]}, 404),
        ("similarity", {"model": "reranker", "texts": ["a"]}, 400),
        ("rank", {"query": "a", "documents": ["b"]}, 422),
        ("rank", {"query": "a", "documents": ["b"], "reranker": MODEL}, 400),
        ("images", {"model": MODEL, "images": ["aGk="], "texts": ["a"]}, 400),
        ("images", {"model": "clip", "images": ["aGk="], "texts": ["a"]}, 400),
        ("images", {"model": "clip", "images": ["é"], "texts": ["a"]}, 400),
        ("map", {"model": MODEL, "texts": ["a"] * 1001}, 422),
    ]
    for name, body, status in bodies:
        answer = httpx.post(f"{site}/playground/api/{name}", json=body)
        assert (answer.status_code, name) == (status, name)
        assert answer.json()["error"]["message"]


def test_models_and_their_facts(page: Page) -> None:
    page.open()
    for fact in ("dense", "fp32", "384", "256"):
        assert fact in page["facts"].text
    Select(page["model"]).select_by_visible_text("clip")
    assert "77" in page["facts"].text
    assert [option.get_attribute("textContent") for option in Select(page["reranker"]).options] == [
        "reranker",
        "none",
    ]
    page["all"].find_element(By.TAG_NAME, "summary").click()
    assert "clip-image" in page["all-models"].text


def test_similarities_are_the_apis(page: Page) -> None:
    page.open()
    texts = ["hello world", "What is Triton?", "<b>no markup</b>", "Hello, world!"]
    page.write("text-lines", "\n".join(texts))
    assert page.work("texts").startswith("Most alike: “hello world” and “Hello, world!”")
    vectors = vectors_of(page.address, texts)
    shown = numbers(page.all("#texts-result td[data-value]")).reshape(4, 4)
    assert np.abs(shown - vectors @ vectors.T).max() < 6e-3  # two digits
    assert [cell.text for cell in page.all(".heat .name")] == texts


def test_the_part_that_was_cut_off_is_marked(page: Page, source: Path) -> None:
    """It begins at the first word that has a token beyond the limit."""
    page.open()
    text = "🦊 中文 " + LONG.strip()
    page.write("text-lines", f"short\n{text}")
    page.work("texts")
    said = "Cut off from here: "
    [whole] = page.all("#texts-result .whole > span")
    kept, cut = (whole.get_attribute("textContent") or "").split(said)
    assert kept + cut == text
    start = len(kept)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_truncation()
    first_cut = tokenizer.encode(text).offsets[255]  # with [CLS]; the 256th place is [SEP]'s
    assert start <= first_cut[0]
    assert text[start : first_cut[0]].strip() == "" or text[start : first_cut[0]].isalnum()


def test_rankings_show_both_scores(page: Page, small: wheel.Server) -> None:
    page.open("rank")
    documents = [*DOCUMENTS, LONG.strip()]
    page.write("query", "warm house")
    page.write("documents", "\n".join(documents))
    assert page.work("rank").startswith("The best by cosine:")
    asked = vectors_of(page.address, ["warm house"], input_type="query")[0]
    cosines = vectors_of(page.address, documents, input_type="document") @ asked
    with Reranker(url=small.grpc_address, model="reranker") as reranker:
        scores = reranker.score([("warm house", document) for document in documents]).scores
    for by, expected in (("cosines", cosines), ("scores", scores)):
        items = page.all(f"#rank-result ol[data-by={by}] > li")
        order = [int(item.get_attribute("data-index") or "") for item in items]
        assert order == np.argsort(-expected, kind="stable").tolist()
        main = numbers([item.find_elements(By.CSS_SELECTOR, ".meter b")[0] for item in items])
        other = numbers([item.find_elements(By.CSS_SELECTOR, ".meter b")[1] for item in items])
        assert np.abs(main - expected[order]).max() < SAFE_ROUNDING
        assert np.abs(other - (scores if by == "cosines" else cosines)[order]).max() < SAFE_ROUNDING
    assert page.all("#rank-result mark")
    Select(page["reranker"]).select_by_visible_text("none")
    page.work("rank")
    assert len(page.all("#rank-result ol")) == 1


def drop(page: Page, files: list[Path]) -> None:
    """Drop files on the page, as a pointer does."""
    parts = [[file.name, list(file.read_bytes())] for file in files]
    page.driver.execute_script(
        "const data = new DataTransfer();"
        "for (const [name, bytes] of arguments[1])"
        "  data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));"
        "for (const name of ['dragenter', 'dragover', 'drop'])"
        "  arguments[0].dispatchEvent(new DragEvent(name, {dataTransfer: data, bubbles: true}))",
        page["drop"],
        parts,
    )


def test_images_are_ranked_for_texts(page: Page, small: wheel.Server, photos: list[Path]) -> None:
    """Chosen and dropped images; one is removed again."""
    page.open("images")
    page["files"].send_keys("\n".join(map(str, photos[:2])))
    drop(page, photos[2:])
    wait_until(lambda: len(page.all("#thumbs img")) == 4)
    page.all("#thumbs button")[1].click()
    left = [photo for index, photo in enumerate(photos) if index != 1]
    page.write("image-texts", "a photo of a cat\na red square")
    assert page.work("images") == "3 images ranked for 2 texts."
    with Embedder(small.grpc_address, "clip") as embedder:
        texts = embedder.embed(["a photo of a cat", "a red square"]).vectors
        cosines = texts @ embedder.embed_images(left).vectors.T
    for row, section in enumerate(page.all("#images-result section")):
        items = section.find_elements(By.CSS_SELECTOR, "li")
        order = [int(item.get_attribute("data-index") or "") for item in items]
        assert order == np.argsort(-cosines[row], kind="stable").tolist()
        shown = numbers(section.find_elements(By.CSS_SELECTOR, "li b"))
        assert np.abs(shown - cosines[row][order]).max() < SAFE_ROUNDING


def test_the_map_of_a_thousand_lines(page: Page) -> None:
    """Points have the distances of the first two principal components; keys move between them."""
    page.open("map")
    page.write("lines", "\n".join(LINES))
    assert page.work("map").startswith("1,000 lines. The two axes hold ")
    read = "return [...document.querySelectorAll('#map-result circle')].map(c => [c.cx.baseVal.value, c.cy.baseVal.value])"
    drawn = np.array(page.driver.execute_script(read))
    vectors = vectors_of(page.address, LINES)
    centred = vectors - vectors.mean(axis=0)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * lengths[:2]
    pairs = [np.linalg.norm(points[1:] - points[:-1], axis=1) for points in (drawn, expected)]
    assert np.corrcoef(*pairs)[0, 1] > 0.9999
    first = page.all("#map-result circle")[0]
    page.driver.execute_script("arguments[0].focus()", first)
    for key, line in ((Keys.ARROW_RIGHT, LINES[1]), (Keys.END, LINES[-1]), (Keys.HOME, LINES[0])):
        page.driver.switch_to.active_element.send_keys(key)
        assert page.driver.switch_to.active_element.get_attribute("aria-label") == line
        assert page.all("#map-result .tip")[0].text == line
    page.all("#map-result summary")[0].click()
    assert len(page.all("#map-result tbody tr")) == 1000


def run(code: str, language: str, server: wheel.Server, folder: Path) -> str:
    """Run code in a folder; return what it prints."""
    path = os.pathsep.join([str(ROOT / "client"), str(ROOT / "python_backend")])
    environment = {**os.environ, "HALIMEDE_URL": server.grpc_address, "PYTHONPATH": path}
    program = ["bash", "-c"] if language == "curl" else [sys.executable, "-c"]
    ran = subprocess.run(
        [*program, code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def printed(output: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of NumPy's as it was printed."""
    return np.array(output.replace("[", " ").replace("]", " ").split(), float).reshape(shape)


@pytest.mark.needs("curl")
def test_the_code_does_the_same(page: Page, server: wheel.Server, tmp_path: Path) -> None:
    """What is shown runs as it is, and gives the same numbers."""
    page.open()
    texts = ['it\'s “quoted” "twice"', "back\\slash $HOME", "🦊 fox"]
    page.write("text-lines", "\n".join(texts))
    vectors = vectors_of(page.address, texts)
    answer = json.loads(run(page.code("curl"), "curl", server, tmp_path))
    assert np.allclose([row["embedding"] for row in answer["data"]], vectors, atol=1e-6)
    for language in ("openai", "halimede"):
        shown = printed(run(page.code(language), language, server, tmp_path), (3, 3))
        assert np.allclose(shown, vectors @ vectors.T, atol=1e-5)
    page["tab-rank"].click()
    page.write("documents", "\n".join(DOCUMENTS))
    Select(page["reranker"]).select_by_visible_text("none")  # it is on another Triton
    documents = vectors_of(page.address, DOCUMENTS, input_type="document")
    asked = vectors_of(page.address, ["How can I make my house warmer?"], input_type="query")[0]
    for language in ("openai", "halimede"):
        shown = printed(run(page.code(language), language, server, tmp_path), (3,))
        assert np.allclose(shown, documents @ asked, atol=1e-5)
    page["tab-map"].click()
    for language in ("openai", "halimede"):
        printed(run(page.code(language), language, server, tmp_path), (24, 2))


@pytest.mark.needs("curl")
def test_the_code_of_images_and_rerankers(
    page: Page, small: wheel.Server, photos: list[Path]
) -> None:
    page.open("images")
    page["files"].send_keys("\n".join(map(str, photos)))
    wait_until(lambda: len(page.all("#thumbs img")) == 4)
    page.write("image-texts", "a photo of a cat\na red square")
    with Embedder(small.grpc_address, "clip") as embedder:
        images = embedder.embed_images(photos).vectors
        cosines = embedder.embed(["a photo of a cat", "a red square"]).vectors @ images.T
    folder = photos[0].parent
    for language in ("halimede", "openai"):
        shown = printed(run(page.code(language), language, small, folder), cosines.shape)
        assert np.allclose(shown, cosines, atol=1e-5)
    embedded, _ = run(page.code("curl"), "curl", small, folder).replace("}{", "}\n{").split("\n")
    assert np.allclose(json.loads(embedded)["embeddings"]["float"], images, atol=1e-5)
    page["tab-rank"].click()
    page.write("documents", "\n".join(DOCUMENTS))
    Select(page["model"]).select_by_visible_text("clip")
    with Reranker(url=small.grpc_address, model="reranker") as reranker:
        ranking = reranker.rank("How can I make my house warmer?", DOCUMENTS)
    lines = run(page.code("halimede"), "halimede", small, folder).splitlines()[-3:]
    assert [int(line.split()[0]) for line in lines] == ranking.indices.tolist()
    last = run(page.code("openai"), "openai", small, folder).splitlines()[-1]
    assert [row["index"] for row in ast.literal_eval(last)["results"]] == ranking.indices.tolist()


def test_code_is_copied(page: Page) -> None:
    page.open()
    grant = {
        "origin": page.address,
        "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"],
    }
    page.driver.execute_cdp_cmd("Browser.grantPermissions", grant)
    page["copy"].click()
    wait_until(lambda: page["copied"].get_attribute("textContent"))
    read = "navigator.clipboard.readText().then(arguments[0])"
    assert page.driver.execute_async_script(read) == page["code"].get_attribute("textContent")


def focused(page: Page) -> str:
    return page.driver.switch_to.active_element.get_attribute("id") or ""


def press(page: Page, *keys: str) -> None:
    webdriver.ActionChains(page.driver).send_keys(*keys).perform()


def tab_to(page: Page, id_: str) -> None:
    for _ in range(12):
        if focused(page) == id_:
            return
        press(page, Keys.TAB)
    raise AssertionError(f"{id_} is not reached")


def test_the_keyboard_is_enough(page: Page) -> None:
    """From the top of the page to a ranking, by Tab, arrows and Enter alone."""
    page.open()
    press(page, Keys.TAB)
    assert page.driver.switch_to.active_element.text == "Skip to the input"
    tab_to(page, "model")
    tab_to(page, "tab-texts")
    press(page, Keys.ARROW_RIGHT)
    assert focused(page) == "tab-rank"
    tab_to(page, "query")
    webdriver.ActionChains(page.driver).key_down(Keys.CONTROL).send_keys("a").key_up(
        Keys.CONTROL
    ).send_keys("which bird swims?", Keys.ENTER).perform()
    wait_until(lambda: page.all("#rank-result li"))
    assert "Penguins" in page.answered("rank")
    assert focused(page) == "query"


def test_errors_are_told(page: Page) -> None:
    """An empty field, and what the gateway refuses: in words, as an alert."""
    page.open()
    page.write("text-lines", "")
    page.work("texts")
    assert page["error"].text == "Write at least one text."
    page.write("text-lines", "\n".join("a" * 65))
    page.work("texts")
    assert "at most 64 items" in page["error"].text
    [failed] = page.driver.get_log("browser")  # Chromium's own note of the status
    assert "422" in failed["message"]
    page.write("text-lines", "a\nb")
    page.work("texts")
    assert not page["error"].is_displayed()


def test_the_key_stays_in_the_tab(page: Page) -> None:
    """It goes to the gateway alone, survives a reload, and is not in the code."""
    page.open()
    page["key-box"].find_element(By.TAG_NAME, "summary").click()
    page["key"].send_keys("s3cret", Keys.ENTER)
    page.open()
    sent = page.requests()
    assert sent[-1]["url"] == f"{page.address}/playground/api/models"
    assert sent[-1]["headers"]["Authorization"] == "Bearer s3cret"
    for language in ("curl", "openai", "halimede"):
        assert "s3cret" not in page.code(language)
    assert "$HALIMEDE_KEY" in page.code("curl")
    assert page.driver.execute_script("return [document.cookie, localStorage.length]") == ["", 0]
    page.driver.execute_script("sessionStorage.clear()")


def test_a_gateway_with_keys(
    driver: webdriver.Chrome, server: wheel.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page opens without a key, asks for one, and works with it."""
    monkeypatch.setenv("HALIMEDE_GATEWAY_KEYS", "s3cret-of-this-test-0123456789")
    with gateway(triton_model(server)) as running:
        page = Page(driver, running)
        driver.get(running)
        wait_until(lambda: page["error"].is_displayed())
        assert "Enter a key at the top of the page." in page["error"].text
        assert focused(page) == "key"
        press(page, "s3cret-of-this-test-0123456789", Keys.ENTER)
        wait_until(lambda: page["facts"].text)
        assert not page["error"].is_displayed()
        assert page.work("texts").startswith("Most alike:")
        driver.execute_script("sessionStorage.clear()")
    for log in ("browser", "performance"):
        driver.get_log(log)


def filled(page: Page, photos: list[Path], size: str, scheme: str) -> Iterator[str]:
    """Each tab in turn, with its answer."""
    for tab in TABS:
        page.open(tab, size, scheme)
        if tab == "rank":
            value = page["documents"].get_attribute("value") or ""
            page.write("documents", f"{value}\n{LONG.strip()}")
        if tab == "images":
            page["files"].send_keys("\n".join(map(str, photos)))
            wait_until(lambda: len(page.all("#thumbs img")) == len(photos))
        page.work(tab)
        yield tab


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_tab_is_readable(
    page: Page, photos: list[Path], size: str, scheme: str, tmp_path: Path
) -> None:
    """No tab breaks a rule of axe's, contrast included, or is wider than the screen."""
    folder = ROOT / "docs" / "images" if os.environ.get("HALIMEDE_SCREENSHOTS") else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    for tab in filled(page, photos, size, scheme):
        broken = Axe().run(page.driver)["violations"]
        assert not broken, [(rule["id"], rule["nodes"][0]["html"]) for rule in broken]
        measure: Callable[[str], Any] = page.driver.execute_script
        width = measure("return document.documentElement.scrollWidth")
        assert width <= SIZES[size][0]
        screenshot(page, folder / f"playground-{tab}-{scheme}-{size}.png", size)


def screenshot(page: Page, path: Path, size: str) -> None:
    """Save the page, as far down as it goes."""
    height = page.driver.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": SIZES[size][0], "height": height, "scale": 1}
    taken = page.driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
    )
    picture = Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
