"""The documentation's site: builds without a warning, fetches nothing, and resolves every name."""

import importlib
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest
import yaml
from docs_blocks import ROOT

import dynaslim
from dynaslim.cli import VERBS

FETCHING = {
    "audio": "src", "embed": "src", "iframe": "src", "img": "src", "link": "href", "object": "data",
    "script": "src", "source": "src", "track": "src", "use": "href", "video": "src",
}  # fmt: skip
"""Elements that make a browser load something, and the attribute that names it."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs and mkdocstrings are not installed: pip install 'dynaslim[docs]'")
    out = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


class _Fetched(HTMLParser):
    """What a page makes a browser load."""

    def __init__(self, text):
        super().__init__()
        self.urls = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "link" and values.get("rel") in ("canonical", "next", "prev"):
            return  # names a place, and loads nothing
        for name in (FETCHING.get(tag), "srcset", "poster", "background"):
            if name and values.get(name):
                self.urls.append(values[name])


def test_built_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    urls = [(page, url) for page in pages for url in _Fetched(page.read_text()).urls]
    assert len(urls) > 3 * len(pages), "each has a script, a style sheet and an icon"
    for page, url in urls:
        assert not re.match(r"(\w+:)?//", url), f"{page.name}: {url}"
        target = site if url.startswith("/") else page.parent
        assert (target / url.lstrip("/").split("?")[0].split("#")[0]).exists(), f"{page}: {url}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text()), sheet


def test_a_page_that_loads_something_would_be_found():
    text = '<link rel="stylesheet" href="https://a/b.css"><a href="https://c"><img src="//d/e.png">'
    assert _Fetched(text).urls == ["https://a/b.css", "//d/e.png"]


def test_a_browser_sends_no_foreign_requests(site, browser):
    """Scripts may load more than the pages name: a search, on a small screen."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Quiet", (_Quiet,), {"root": str(site)}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    requests, errors = [], []
    try:
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        for name in ("concepts/", "reference/runtime/"):
            page.goto(here + name, wait_until="networkidle")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 390, f"{name}: {wide} px wide"
        page.click("label.md-header__button[for=__search]")
        page.locator(".md-search__input").press_sequentially("escalation")
        page.wait_for_selector(".md-search-result__item")
        page.close()
    finally:
        server.shutdown()
        server.server_close()
    assert not errors
    assert len(requests) > 10
    foreign = [url for url in requests if not url.startswith((here, "data:", "blob:"))]
    assert not foreign


class _Quiet(SimpleHTTPRequestHandler):
    root = ""

    def __init__(self, *args):
        super().__init__(*args, directory=self.root)

    def log_message(self, *_):
        pass


def test_every_public_name_is_in_the_reference(site):
    text = "".join(page.read_text() for page in site.glob("reference/*/index.html"))
    for name in dynaslim.__all__:
        assert f'id="dynaslim.{name}"' in text, name


def test_every_verb_and_flag_is_in_the_reference(site):
    page = (site / "reference" / "cli" / "index.html").read_text()
    for verb in VERBS:
        assert f'id="{verb.replace(" ", "-")}"' in page
        assert f"dynaslim {verb} " in page
    assert "--save-every-s" in page


def test_links_to_examples_lead_to_their_page(site):
    assert 'href="../examples/#run_package"' in (site / "runtime" / "index.html").read_text()


def test_every_page_is_in_the_navigation():
    """The strict build refuses others too; here the page is named."""
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    listed = set(re.findall(r"^ +- .+: (\S+\.md)$", text, re.MULTILINE))
    assert listed == pages
    assert yaml.safe_load(text)["theme"]["font"] is False


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_names_in_the_documents_exist(path):
    """`dynaslim.a.b` in a sentence is something that can be imported."""
    for name in re.findall(r"`(dynaslim(?:\.\w+)+)", path.read_text()):
        assert _found(name), f"{path.name}: {name}"
    for name in re.findall(r"`(tests/[\w./]+|examples/[\w./]*|scripts/\w+\.py)`", path.read_text()):
        assert (ROOT / name).exists(), f"{path.name}: {name}"


def _found(name):
    parts = name.split(".")
    value, at = dynaslim, "dynaslim"
    for part in parts[1:]:
        at = f"{at}.{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(at)
            except ImportError:
                return False
    return True


def test_the_drawing_is_what_its_script_draws():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import draw_concepts
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    assert (ROOT / "docs" / "img" / "concepts.svg").read_text() == draw_concepts.picture()


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_lists_stand_alone(path):
    """The site's Markdown takes a list right behind a paragraph for more of it; others do not."""
    is_code = False
    before = ""
    for number, line in enumerate(path.read_text().split("\n"), 1):
        is_code ^= line.startswith("```")
        begins = re.match(r"(- |\d+\. )", line) is not None
        follows = re.match(r"$|- |\d+\. |  |#|<!--", before) is not None
        assert is_code or not begins or follows, f"{path.name}:{number}"
        before = line
