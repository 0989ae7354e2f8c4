"""Reports in a real browser: on a desk, on a phone, in the dark and on paper."""

import re

import pytest
from helpers import CONTRAST
from report_runs import Page

WIDTHS = {"desk": 1280, "phone": 390}


@pytest.fixture(scope="module")
def file(gate_page, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(gate_page.html, encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, file):
    """Opens the page; requests but for the file are refused and recorded, as are messages."""
    contexts = []

    def open_page(width, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, locale="en-GB"
        )
        contexts.append(context)
        page = context.new_page()
        page.requests, page.messages = [], []

        def refuse(route):
            page.requests.append(route.request.url)
            route.abort()

        context.route(lambda url: url != file.as_uri() and not url.startswith("data:"), refuse)
        page.on("console", lambda message: page.messages.append(message.text))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("dialog", lambda dialog: (page.messages.append(dialog.message), dialog.dismiss()))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_page_alone(opened, width, gate_page):
    """It requests nothing and logs nothing, all pictures are there, and nothing sticks out."""
    page = opened(width)
    assert page.requests == []
    assert page.messages == [], "not a word of a name that would be a script either"
    pictures = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(pictures) == sum(tag == "img" for tag, _ in Page(gate_page.html).elements) > 10
    assert all(done and wide > 0 for done, wide in pictures)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.scripts.length") == 0
    # with all tables open too
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_charts_can_be_read_on_a_phone(opened):
    """The smallest letters of the charts, and how much of the width the charts take."""
    page = opened(WIDTHS["phone"])
    sizes = page.evaluate(
        """[...document.querySelectorAll('figure > svg')].map(svg => {
             const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
             const sizes = [...svg.querySelectorAll('text')]
               .map(t => parseFloat(getComputedStyle(t).fontSize) * scale);
             return [Math.min(...sizes), svg.getBoundingClientRect().width];
           })"""
    )
    assert len(sizes) == 8
    assert min(size for size, _ in sizes) > 8.5
    assert all(width > 330 for _, width in sizes)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out(opened, scheme):
    page = opened(WIDTHS["desk"], scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    texts, lowest, where = page.evaluate(CONTRAST, "")
    assert texts > 300
    assert lowest >= 4.5, f"{lowest:.2f} in {where}"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    channels = [int(value) for value in re.findall(r"\d+", background)]
    assert max(channels) < 60 if scheme == "dark" else min(channels) > 240


def test_it_prints(opened, tmp_path):
    page = opened(WIDTHS["desk"], "dark")
    paper = page.pdf(format="A4")
    assert paper.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", paper))
    assert 1 < pages < 15
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.is_visible("nav")
    page.set_viewport_size({"width": 690, "height": 1000})  # A4 less its margins
    assert page.evaluate("document.documentElement.scrollWidth") <= 690


def test_links_and_tables_answer_the_keyboard(opened):
    page = opened(WIDTHS["desk"])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#costs"
    page.locator("nav a", has_text="Confusions").press("Enter")
    top = page.evaluate("document.getElementById('confusion').getBoundingClientRect().top")
    assert 0 <= top < 200, "the heading is not under the bar"
    page.locator("summary").first.press("Enter")
    assert page.locator("details[open] table").first.is_visible()
