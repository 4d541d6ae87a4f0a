"""The site that `make docs` builds from docs/, as a reader sees it in a browser.

`make test` leaves these tests out, because they need a browser and the network: `make test-site`
runs them.
"""

import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from conftest import WorkerPostgres
from tests.serving import wait_until
from tests.test_docs import ANSWER, GUIDE, INTEGRATIONS, ROOT, blocks, public_modules, run_snippets

SECONDS = 20
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


class Quiet(SimpleHTTPRequestHandler):
    """A file server that logs nothing."""

    def log_message(self, format: str, *_: Any) -> None: ...  # noqa: A002 - the base class's name


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site in strict mode, and return its folder."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    return folder


@pytest.fixture(scope="session")
def address(built: Path) -> Iterator[str]:
    """Serve the site on a free port, and yield its address."""
    handler = functools.partial(Quiet, directory=str(built))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Start a headless Chromium that records its log messages and its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--window-size=1280,900", f"--user-data-dir={profile}"),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService("/usr/bin/chromedriver")
    driver = webdriver.Chrome(options, service)
    driver.set_page_load_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.fixture(autouse=True)
def _as_a_desktop(request: pytest.FixtureRequest) -> None:
    if "browser" in request.fixturenames:
        driver = request.getfixturevalue("browser")
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        log(driver, "browser")
        log(driver, "performance")


def pages(built: Path) -> list[str]:
    """Return the pages as paths of the site."""
    found = (page.relative_to(built).as_posix() for page in built.glob("**/*.html"))
    return sorted(page.removesuffix("index.html") for page in found if page != "404.html")


def log(driver: webdriver.Chrome, kind: str) -> list[dict[str, str]]:
    """Return what has been logged since the last call."""
    entries: list[dict[str, str]] = driver.get_log(kind)  # type: ignore[no-untyped-call]
    return entries


def requested(driver: webdriver.Chrome) -> set[str]:
    """Return the URLs that have been requested since the last call."""
    messages = (json.loads(each["message"])["message"] for each in log(driver, "performance"))
    return {
        each["params"]["request"]["url"]
        for each in messages
        if each["method"] == "Network.requestWillBeSent"
    }


# --- in a browser -------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_every_page_renders(built: Path, address: str, browser: webdriver.Chrome) -> None:
    """Every page has one heading, logs nothing, loads nothing from elsewhere, and fits a phone."""
    for page in pages(built):
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.get(address + page)
        assert len(browser.find_elements(By.TAG_NAME, "h1")) == 1, page
        assert [each["message"] for each in log(browser, "browser")] == [], page
        own = ("data:", "chrome:")  # the page's own data, and the browser's first tab
        found = {each for each in requested(browser) if not each.startswith(own)}
        assert {each for each in found if not each.startswith(address)} == set(), page
        assert address + page in found
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
        width: int = browser.execute_script("return document.documentElement.scrollWidth")
        assert width == PHONE["width"], f"{page} scrolls sideways"


@pytest.mark.parametrize(("preferred", "scheme"), [("light", "default"), ("dark", "slate")])
def test_light_and_dark(
    preferred: str, scheme: str, address: str, browser: webdriver.Chrome
) -> None:
    """The page follows the system's light or dark mode until the reader chooses the other."""
    features = [{"name": "prefers-color-scheme", "value": preferred}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(address)
    browser.execute_script("localStorage.clear()")
    browser.get(address)

    def shown() -> str | None:
        return browser.find_element(By.TAG_NAME, "body").get_attribute("data-md-color-scheme")

    assert shown() == scheme
    toggles = browser.find_elements(By.CSS_SELECTOR, "label[for^=__palette]")
    next(each for each in toggles if each.is_displayed()).click()
    WebDriverWait(browser, SECONDS).until(lambda _: shown() != scheme)
    browser.execute_script("localStorage.clear()")


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("forgotten commit", "sessions/"),
        ("QueuePool limit", "troubleshooting/"),
        ("run_in_transaction", "reference/fastapi_sqlnative/"),
    ],
)
def test_search_finds(words: str, page: str, address: str, browser: webdriver.Chrome) -> None:
    """Search finds the page that explains the words."""
    browser.get(address)
    field = browser.find_element(By.CSS_SELECTOR, "[data-md-component=search-query]")
    browser.execute_script("arguments[0].focus()", field)
    field.send_keys(words)

    def is_found(_: Any) -> bool:
        # In one call, because the results change with every letter.
        hrefs: list[str] = browser.execute_script(
            "return [...document.querySelectorAll('.md-search-result__link')].map(e => e.href)"
        )
        return any(urlsplit(href).path == f"/{page}" for href in hrefs)

    WebDriverWait(browser, SECONDS).until(is_found)


# --- in the files -------------------------------------------------------------------------------


class Document(HTMLParser):
    """The anchors and links of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif value and (tag, name) in {("a", "href"), ("img", "src"), ("link", "href")}:
                self.links.append(value)


def test_links_and_anchors_hold(built: Path) -> None:
    """Every link inside the site leads to an existing file, and to an existing anchor in it."""
    documents = {page: Document(built / page / "index.html") for page in pages(built)}
    for page, document in documents.items():
        for link in document.links:
            if urlsplit(link).scheme:
                continue
            target, anchor = urldefrag(urljoin(f"/{page}", link))
            path = unquote(target).lstrip("/")
            assert (built / path).exists(), f"{page}: {link}"
            if anchor and path in documents:
                assert unquote(anchor) in documents[path].anchors, f"{page}: {link}"


def test_the_reference_can_be_linked_to(built: Path) -> None:
    """Every public name has an anchor in the reference, under its public path."""
    found: set[str] = set()
    for page in (built / "reference").glob("*/index.html"):
        found |= Document(page).anchors
    for module in public_modules():
        for name in module.__all__:
            places = {f"{each.__name__}.{name}" for each in public_modules() if hasattr(each, name)}
            assert places & found, f"{module.__name__}.{name}"


def test_llms_txt_leads_to_every_page(built: Path) -> None:
    """llms.txt links every page of the guide once, and every link leads to a page."""
    links = re.findall(
        r"^- \[.+\]\((.+?)\): .+$", (built / "llms.txt").read_text("utf-8"), re.MULTILINE
    )
    assert len(links) == len(set(links))
    assert all((built / link / "index.html").exists() for link in links)
    guide = {each.relative_to(ROOT / "docs").with_suffix("").as_posix() for each in GUIDE}
    assert {f"{each}/" for each in guide - {"index"}} <= set(links)


# --- other packages -----------------------------------------------------------------------------


def test_it_works_with_other_packages(
    postgres: WorkerPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snippets about other packages run in an environment that has these packages."""
    run_snippets(INTEGRATIONS, postgres, monkeypatch)


# --- the tutorial -------------------------------------------------------------------------------


START = ROOT / "docs" / "start.md"


def commands(tool: str) -> list[str]:
    """Return the tutorial's commands for one tool, with the checkout in place of the package."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        name = tomllib.load(file)["project"]["name"]
    (lines,) = (
        block.content.splitlines()
        for block in blocks(START)
        if block.info == "console" and f"{tool} " in block.content and name in block.content
    )
    return [line.replace(f" {name} ", f" {ROOT} ") for line in lines]


@pytest.mark.timeout(600)  # pip and uv install some fifty packages
@pytest.mark.parametrize(
    ("tool", "fastapi", "tested"),
    [
        ("uv", ["uv", "run", "fastapi"], "uv add --dev pytest && uv run pytest"),
        ("pip", [".venv/bin/fastapi"], ".venv/bin/pip install pytest && .venv/bin/pytest"),
    ],
    ids=["uv", "pip"],
)
def test_the_tutorial_from_an_empty_folder(
    tool: str, fastapi: list[str], tested: str, tmp_path: Path
) -> None:
    """From an empty folder, the tutorial's commands and code produce the answers that it shows."""
    tools = Path(sys.executable).parent
    own = {"DATABASE_URL", "PYTHONPATH", "VIRTUAL_ENV"}  # a reader has none of these
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "UV_PYTHON": sys.executable}
    for command in commands(tool):
        subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True)
    found = [each for each in blocks(START) if each.info in {"python", "http", "toml"}]
    code = [each.content for each in found if each.info == "python"]
    tests = [each for each in code if "TestClient" in each]
    (tmp_path / "test_main.py").write_text("".join(tests), "utf-8")
    (tmp_path / "main.py").write_text(
        "\n".join(each for each in code if each not in tests), "utf-8"
    )
    (table,) = (each.content for each in found if each.info == "toml")
    with (tmp_path / "pyproject.toml").open("a") as project:
        project.write(f"\n{table}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    serving = [*fastapi, "dev", "--port", str(port)]
    with subprocess.Popen(serving, cwd=tmp_path, env=environment) as server:
        try:
            wait_until(lambda: is_alive(address, server), 60)
            for block in found:
                if block.info == "http":
                    for line in block.content.splitlines():
                        send(address, line)
        finally:
            # Signal only this process, which passes the signal on. A second signal that interrupted
            # the handler of uvicorn's reloader would wait forever for the lock of the first.
            server.terminate()
    subprocess.run(tested, shell=True, cwd=tmp_path, env=environment, check=True)


def is_alive(address: str, server: subprocess.Popen[bytes]) -> bool:
    assert server.poll() is None, "the server has ended"
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{address}/health/live").is_success
    return False


def send(address: str, line: str) -> None:
    request, answer = line.split(" -> ")
    method, path = request.split(" ")
    expected = ANSWER.fullmatch(answer)
    assert expected is not None
    response = httpx.request(method, address + path)
    assert str(response.status_code) == expected["status"], line
    if expected["body"]:
        assert response.json() == json.loads(expected["body"]), line
