"""The page of `ovlfs layers --html` in a real browser: what a click shows, and that a hostile image runs nothing.

make_screenshot.py makes screenshot.png beside this file, from the same fixture image.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_chromium import Browser
from layers_images import Layer

pytestmark = pytest.mark.slow
Run = Callable[..., Any]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A browser that must have nothing to complain about, and must have loaded nothing but files that it was given."""
    with Browser(tmp_path / "profile") as one:
        yield one
        assert one.problems == []
        assert all(url.startswith("file://") for url in one.requests)


@pytest.fixture
def show(ovlfs: Run, scratch: Path, browser: Browser) -> Callable[[Path], None]:
    """`show(image)` writes the image's page and opens it."""

    def open_page(image: Path) -> None:
        page = scratch / "page.html"
        ovlfs("layers", image, "--html", page)
        browser.open(page)

    return open_page


def rows(browser: Browser) -> list[str]:
    """The names of the rows in sight, hidden ones in brackets."""
    found: list[str] = browser.run(
        "[...document.querySelectorAll('.row')].map(row => row.classList.contains('ghost')"
        " ? `[${row.querySelector('bdi').textContent}]` : row.querySelector('bdi').textContent)"
    )
    return found


def choose(browser: Browser, *names: str) -> None:
    """Click on rows by name, one after the other."""
    for name in names:
        place = browser.run(
            "(() => { const row = [...document.querySelectorAll('.row')].find("
            f"row => row.querySelector('bdi').textContent === {json.dumps(name)}); return row?.dataset.place; }})()"
        )
        assert place is not None, f"{name} is not in sight: {rows(browser)}"
        browser.click(f".row[data-place='{place}'] bdi")


def walk(browser: Browser) -> list[tuple[str, str]]:
    """The steps of the walk: (layers, what); ("", text) for the line where it stops."""
    steps: list[list[str]] = browser.run(
        "[...document.querySelectorAll('#walk li')].map(item => item.matches('.end') ? ['', item.textContent]"
        " : [item.querySelector('.badge').textContent, item.querySelector('.what').textContent])"
    )
    return [(step[0], step[1]) for step in steps]


def verdict(browser: Browser) -> str:
    return str(browser.run("document.querySelector('#verdict').textContent"))


def test_a_file_over_a_directory_shows_who_wins_and_what_is_hidden(
    show: Callable[[Path], None], real_image: Path, browser: Browser
) -> None:
    """Layer 8 replaced a directory of layer 4 by a file: the walk stops at layer 8, and layer 4 is never asked."""
    show(real_image)
    choose(browser, "opt/", "shape/", "dir-to-file")
    assert verdict(browser) == "You see a file of layer 8, 11 B."
    assert walk(browser) == [
        ("9", "has no /opt/shape, is not asked"),
        ("8", "file, 11 B"),
        ("", "the lookup stops here"),
        ("7\u20135", "not asked"),
        ("4", "directory"),
        ("3\u20131", "not asked"),
    ]


def test_a_whiteout_and_what_lies_below_it(
    show: Callable[[Path], None], image_of: Callable[..., Path], browser: Browser
) -> None:
    """Hidden names are shown when asked for; their walk ends at the whiteout, or never comes to them."""
    layers: list[Layer] = [
        [(b"etc", None), (b"etc/conf", None), (b"etc/conf/a", b"12"), (b"etc/motd", b"hello")],
        [(b"etc/.wh.conf", b"")],
        [(b"etc/motd", b"bye")],
    ]
    show(image_of(layers, ["RUN one", "RUN two", "RUN three"]))
    assert rows(browser) == ["/", "etc/", "motd"]
    browser.click("#ghosts")
    assert rows(browser) == ["/", "etc/", "[conf]", "motd"]
    choose(browser, "conf")
    assert verdict(browser) == "There is no such name: layer 2 has a whiteout for it."
    assert walk(browser) == [
        ("3", "says nothing"),
        ("2", "whiteout"),
        ("", "the lookup stops here"),
        ("1", "directory"),
    ]
    choose(browser, "a")
    assert verdict(browser) == "A lookup does not come here: /etc/conf is gone."
    assert walk(browser)[0] == ("", "the lookup does not come here")
    choose(browser, "motd")
    assert verdict(browser) == "You see a file of layer 3, 3 B."
    assert [what for _, what in walk(browser)] == ["file, 3 B", "the lookup stops here", "not asked", "file, 5 B"]
    choose(browser, "etc/")
    assert verdict(browser) == "A directory, merged from layers 3, 2 and 1."
    assert walk(browser)[-1] == ("", "no layer is left to ask")


def test_an_opaque_directory_ends_the_walk(
    show: Callable[[Path], None], image_of: Callable[..., Path], browser: Browser
) -> None:
    """What an opaque directory hides is told apart from what a whiteout hides."""
    layers: list[Layer] = [
        [(b"d", None), (b"d/old", b"12")],
        [(b"d", None), (b"d/.wh..wh..opq", b""), (b"d/new", b"1")],
    ]
    show(image_of(layers, []))
    browser.click("#ghosts")
    choose(browser, "d/")
    assert walk(browser) == [("2", "opaque directory"), ("", "the lookup stops here"), ("1", "directory")]
    choose(browser, "old")
    assert verdict(browser) == "There is no such name: the directory shows layer 2 only, and what is below is hidden."
    assert walk(browser) == [("2", "says nothing"), ("", "the lookup stops here"), ("1", "file, 2 B")]


def test_a_file_between_directories_ends_the_walk(
    show: Callable[[Path], None], image_of: Callable[..., Path], browser: Browser
) -> None:
    """A directory on top shows; a file below it cannot merge, and hides the directory further down."""
    layers: list[Layer] = [[(b"d", None), (b"d/old", b"12")], [(b"d", b"1")], [(b"d", None)]]
    show(image_of(layers, []))
    choose(browser, "d/")
    assert verdict(browser) == "A directory of layer 3 alone."
    assert walk(browser) == [
        ("3", "directory"),
        ("2", "file, 1 B"),
        ("", "the lookup stops here"),
        ("1", "directory"),
    ]


def test_a_layer_filters_the_tree(show: Callable[[Path], None], real_image: Path, browser: Browser) -> None:
    """Choosing layer 2, which only deletes, leaves what it hides."""
    show(real_image)
    browser.click("[data-layer='2']")
    shown = rows(browser)
    assert "[lintian]" in shown
    assert "srv/" not in shown
    assert browser.run("document.querySelector(\"[data-layer='2']\").getAttribute('aria-pressed')") == "true"
    browser.click("[data-layer='2']")
    assert "srv/" in rows(browser)


def test_finding_a_path(show: Callable[[Path], None], real_image: Path, browser: Browser) -> None:
    """What is typed leaves the paths that have it, with the directories above them."""
    show(real_image)
    browser.click("#filter")
    browser.type("shape/was-symlink/")
    assert rows(browser) == ["/", "opt/", "shape/", "was-symlink/", "new"]
    assert browser.run("document.querySelector('#tree-note').textContent") == "1 path fits."
    choose(browser, "new")
    assert verdict(browser).startswith("You see a file of layer")


def test_the_tree_by_keyboard(show: Callable[[Path], None], real_image: Path, browser: Browser) -> None:
    """Arrows open, close and move, as the ARIA practices have it for a tree; the active row is named."""
    show(real_image)
    browser.run("document.querySelector('#tree').focus()")
    browser.key("ArrowDown")
    browser.key("ArrowDown")
    browser.key("ArrowDown")

    def active(attribute: str) -> Any:
        return browser.run(
            "document.getElementById(document.querySelector('#tree').getAttribute('aria-activedescendant'))"
            f".getAttribute('{attribute}')"
        )

    assert (active("aria-level"), active("aria-expanded"), active("aria-posinset")) == ("2", "false", "3")
    browser.key("ArrowRight")
    assert active("aria-expanded") == "true"
    browser.key("ArrowRight")
    assert active("aria-level") == "3"
    browser.key("ArrowLeft")
    browser.key("ArrowLeft")
    assert (active("aria-level"), active("aria-expanded")) == ("2", "false")
    assert active("aria-selected") == "true"
    assert verdict(browser).startswith("A directory")


def test_the_map_has_the_bytes_that_the_table_has(
    show: Callable[[Path], None], image_of: Callable[..., Path], browser: Browser
) -> None:
    """Areas are proportional to bytes, what is seen and what is wasted apart; a click selects the path."""
    layers: list[Layer] = [
        [(b"big", b"x" * 6000), (b"d", None), (b"d/gone", b"x" * 1000), (b"d/small", b"x" * 2000)],
        [(b"d/.wh.gone", b"")],
    ]
    show(image_of(layers, []))
    tiles = "Object.fromEntries([...document.querySelectorAll('#map button')].map(tile => [tile.title, \
        tile.offsetWidth * tile.offsetHeight]))"
    areas = browser.run(tiles)
    whole = browser.run("document.querySelector('#map').clientWidth * document.querySelector('#map').clientHeight")
    assert set(areas) == {"/big, 6 kB, layer 1", "/d, 2 kB", "/d/small, 2 kB, layer 1"}
    assert abs(areas["/big, 6 kB, layer 1"] / whole - 0.75) < 0.02
    browser.click("#by-waste")
    assert set(browser.run(tiles)) == {"/d, 1 kB", "/d/gone, 1 kB, layer 1, hidden since layer 2"}
    browser.click("#map button[title^='/d/gone']")
    assert verdict(browser) == "There is no such name: layer 2 has a whiteout for it."
    assert rows(browser) == ["/", "big", "d/", "[gone]", "small"]


def test_hostile_names_run_nothing(show: Callable[[Path], None], hostile_image: Path, browser: Browser) -> None:
    """Every part of the page is drawn with every name; nothing is executed, asked for or complained about."""
    show(hostile_image)
    before = browser.run("document.querySelectorAll('script, img, svg, iframe, object, link, base').length")
    browser.click("#ghosts")
    choose(browser, "evil/")
    names = [name.strip("[]") for name in rows(browser)]
    assert "<script><script>window.owned=1<script>" in names
    assert "\\u202etxt.exe" in names
    assert "line\\nbreak\\ttab\\x1b[31m" in names
    assert "__proto__" in names
    for name in names[2:16]:
        choose(browser, name)
        assert browser.run("document.querySelector('#crumbs [aria-current]').textContent") == name.rstrip("/")
    for selector in ("[data-layer='1']", "[data-layer='1']", "#by-waste", "#by-size"):
        browser.click(selector)
    assert browser.run("document.querySelectorAll('script, img, svg, iframe, object, link, base').length") == before
    assert browser.run("typeof window.owned") == "undefined"
    assert browser.run("document.querySelector('#title').textContent") == "<b>evil's.tar (some:tag)"


def test_the_policy_stops_what_slips_through(
    show: Callable[[Path], None], real_image: Path, scratch: Path, tmp_path: Path
) -> None:
    """Were markup of a name ever put into the page, the policy would neither run it nor load what it names."""
    show(real_image)
    with Browser(tmp_path / "other") as browser:
        browser.open(scratch / "page.html")
        browser.run(
            'document.body.insertAdjacentHTML(\'beforeend\', \'<img src="https://example.org/x" onerror="owned=1">'
            '<iframe srcdoc="x"></iframe>\');'
            "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.owned = 1'}))"
        )
        browser.settle()
        assert browser.run("typeof window.owned") == "undefined"
        assert any("Content Security Policy" in problem for problem in browser.problems)


def test_fifty_thousand_files_draw_a_screenful(
    show: Callable[[Path], None], image_of: Callable[..., Path], browser: Browser
) -> None:
    """However many paths, only the rows in sight are elements, wherever the tree is scrolled to."""
    files = [f"d{number // 1000}/f{number:05}".encode() for number in range(50_000)]
    show(image_of([[(name, b"12") for name in files]], ["RUN many"]))
    browser.click("#filter")
    browser.type("f")
    assert browser.run("document.querySelector('#tree-note').textContent") == "50,000 paths fit."
    browser.run("document.querySelector('#tree').scrollTop = 1e9")
    browser.settle()
    assert rows(browser)[-1] == "f09999"  # sorted by name: d9 is the last directory
    assert browser.run("document.querySelectorAll('#tree *').length") < 400
    assert browser.run("document.querySelectorAll('#map *').length") < 4000


def test_dark_mode_has_contrast(ovlfs: Run, scratch: Path, real_image: Path, tmp_path: Path) -> None:
    """Text keeps 4.5 to 1 (WCAG AA) against what it stands on, in the light and in the dark."""
    page = scratch / "page.html"
    ovlfs("layers", real_image, "--html", page)
    measure = """(() => {
        const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        const light = colours => {
            for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
            const linear = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(
                v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        };
        const ground = element =>
            element ? [...ground(element.parentElement), getComputedStyle(element).backgroundColor] : ['white'];
        const low = [];
        for (const element of document.querySelectorAll('body *')) {
            const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
            if (!own || element.closest('script, noscript')) continue;
            const below = ground(element);
            const text = light([...below, getComputedStyle(element).color]);
            const [one, other] = [text, light(below)].sort((a, b) => b - a);
            const ratio = (one + 0.05) / (other + 0.05);
            if (ratio < 4.5) low.push([element.className, element.textContent.slice(0, 20), ratio]);
        }
        return low;
    })()"""
    for dark in (False, True):
        with Browser(tmp_path / f"dark-{dark}", dark=dark) as browser:
            browser.open(page)
            browser.click("[data-layer='8']")
            browser.click("[data-layer='8']")
            choose(browser, "etc/")
            assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark
            assert browser.run(measure) == []
            browser.click("[data-layer='3']")
            browser.click("#by-waste")
            assert browser.run(measure) == []
