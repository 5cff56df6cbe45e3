"""The page of a comparison, in a browser: it sorts and filters, asks nobody for anything, and shows texts as texts."""

import json
import re

import pytest

from tests.sweep import browser, fake_runs
from tests.sweep.fake_runs import IA3, LORA
from tuning.sweep import compare, page, runs

HOSTILE = "</script><img src=x onerror=document.title='broken'>&amp;"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of two methods at two learning rates with three seeds each, a run that is not finished, and one with a hostile name."""
    root = tmp_path_factory.mktemp("page")
    fake_runs.seeds(root / "runs", "lora", LORA, [1.0, 1.2, 1.1])
    fake_runs.seeds(root / "runs", "lora,fast", LORA, [2.0, 2.2, 2.4], optimizer__learning_rate=0.1)
    fake_runs.seeds(root / "runs", "ia3", IA3, [1.5, 1.9, 1.7])
    fake_runs.seeds(root / "runs", "ia3,fast", IA3, [1.4, 1.6, 1.3], optimizer__learning_rate=0.1)
    fake_runs.write(root / "runs" / "stopped", fake_runs.config(LORA, 3), fake_runs.lines([3.0, None]))
    fake_runs.write(root / "runs" / "hostile", fake_runs.config(LORA, 0, method__targets=[HOSTILE]), fake_runs.lines([3.0, 2.5, 1.8]))
    c = compare.compare(runs.find([root / "runs"])[0], by="method")
    (root / "page.html").write_text(page.page(c, HOSTILE))
    return root / "page.html"


def test_the_page_names_no_address_and_holds_the_data_as_they_are(made):
    text = made.read_text()
    addresses = set(re.findall(r"https?://[^\s\"']+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a namespace, which nobody fetches
    assert not re.search(r"<link|<img|\bsrc=[\"']|@import|url\(|fetch\(|innerHTML|eval\(", text)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    found = json.loads(data)
    assert found["title"] == HOSTILE and len(found["runs"]) == 14 and len(found["rows"]) == 5
    assert [row["best"] for row in found["rows"]].count(True) == 3  # the method section has three values: targets are its keys too
    steps, means, errors = found["curves"]["eval/loss"][0]
    assert (steps, means) == ([0, 10, 20], [3.0, 2.5, 1.1]) and errors[2] == pytest.approx(0.1 / 3**0.5, rel=1e-6)


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path):
    lines = [{"step": step, "eval/loss": 1 / (step + 1)} for step in range(1001)]
    fake_runs.write(tmp_path / "a", fake_runs.config(LORA, 0, train__steps=1000), lines)
    c = compare.compare(runs.find([tmp_path])[0])
    steps, _, _ = page._curve(c.rows[0], "eval/loss")
    assert len(steps) <= page.POINTS and steps[-1] == 1000 and steps[1] - steps[0] == 6


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    if browser.MISSING:
        pytest.skip(browser.MISSING)
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def shown(window, made):
    """The page, opened anew."""
    window.open(made.as_uri())
    return window


CELLS = "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].map((line) => line.cells[arguments[1]].textContent)"
CLICK = "[...document.querySelectorAll(`#${arguments[0]} th`)].find((cell) => cell.textContent === arguments[1]).click()"
FILTER = "const box = document.getElementById('filter'); box.value = arguments[0]; box.dispatchEvent(new Event('input'))"
COUNT = "return document.getElementById('count').textContent"


def test_everything_is_shown_as_text_and_nothing_is_asked_for(shown):
    assert shown.run("return document.title") == HOSTILE == shown.run("return document.getElementById('title').textContent")
    assert shown.run("return document.querySelectorAll('img').length") == 0
    assert shown.run("return performance.getEntriesByType('resource').length") == 0 and shown.complaints() == []
    assert shown.run(COUNT) == "14 of 14 runs, 5 of 5 settings"
    assert HOSTILE in shown.run(CELLS, "rows", 1) and "unfinished: step 10 of 20" in shown.run(CELLS, "runs", 1)
    assert shown.run("return document.querySelectorAll('#curves path[stroke-width]').length") == 5
    assert shown.run("return document.querySelectorAll('#parallel path').length") == 14
    assert shown.run("return [...document.querySelectorAll('#parallel [stroke-dasharray=\"4 4\"]')].map((x) => x.textContent)") == [
        "stopped"
    ]
    assert "1 of 14 runs is in no mean:" in shown.run("return document.getElementById('notes').textContent")


def test_a_column_sorts_by_its_numbers_and_back(shown):
    assert shown.run(CELLS, "runs", 6)[:3] == ["1.00", "1.20", "1.10"]  # by settings, then by seeds
    shown.run(CLICK, "runs", "eval/loss")
    rising = shown.run(CELLS, "runs", 6)
    assert rising[:-1] == sorted(rising[:-1]) and len(set(rising)) > 10 and rising[-1] == "–"
    shown.run(CLICK, "runs", "eval/loss")
    assert shown.run(CELLS, "runs", 6) == [*rising[-2::-1], "–"]  # what has no number stays last
    assert shown.run("return document.querySelector('#runs th[aria-sort]').getAttribute('aria-sort')") == "descending"


@pytest.mark.parametrize(
    "words, left",
    [
        ("method=ia3", "6 of 14 runs, 2 of 5 settings"), ("learning_rate>0.05 method=lora", "3 of 14 runs, 1 of 5 settings"),
        ("eval/loss<=1.1", "2 of 14 runs, 1 of 5 settings"), ("unfin", "1 of 14 runs, 1 of 5 settings"),
        ("seed=1 FAST", "2 of 14 runs, 2 of 5 settings"), ("nothing", "0 of 14 runs, 0 of 5 settings"),
    ],
)  # fmt: skip
def test_words_and_bounds_filter_tables_and_curves(shown, words, left):
    shown.run(FILTER, words)
    assert shown.run(COUNT) == left
    settings = int(left.split(", ")[1].split()[0])
    assert len(shown.run(CELLS, "rows", 0)) == settings
    assert len(shown.run("return [...document.querySelectorAll('#legend span:not(.dot)')].map((x) => x.textContent)")) == settings
    assert shown.complaints() == []


DRAG = """
const [name, from, to] = arguments, svg = document.getElementById("parallel"), box = svg.getBoundingClientRect();
const axis = () => [...svg.querySelectorAll("rect.hit")].find((node) => node.dataset.axis === name);
const at = (place) => ({clientX: box.left, clientY: box.top + (300 - place * 250) * box.height / 340, bubbles: true});
axis().dispatchEvent(new PointerEvent("pointerdown", at(from)));
dispatchEvent(new PointerEvent("pointermove", at(to)));
dispatchEvent(new PointerEvent("pointerup", at(to)));
"""


def test_a_range_of_an_axis_is_chosen_by_dragging_and_let_go_by_a_click(shown):
    shown.run(DRAG, "eval/loss", -0.02, 0.3)  # from 1.0 at the bottom to 2.4 at the top: up to 1.42
    assert shown.run(COUNT) == "5 of 14 runs, 2 of 5 settings"
    shown.run(DRAG, "method", 0.9, 1.02)  # ia3 is at the bottom
    assert shown.run(COUNT) == "3 of 14 runs, 1 of 5 settings"
    assert shown.run("return document.querySelectorAll('#parallel .brush').length") == 2
    shown.run(DRAG, "eval/loss", 0.5, 0.5)
    assert shown.run(COUNT) == "8 of 14 runs, 3 of 5 settings"
    shown.run("document.getElementById('clear').click()")
    assert shown.run(COUNT) == "14 of 14 runs, 5 of 5 settings" and shown.complaints() == []


def test_another_metric_is_drawn_when_it_is_chosen(shown):
    options = shown.run("return [...document.getElementById('metric').options].map((option) => option.value)")
    assert options == ["eval/loss", "train/loss"]
    before = shown.run("return document.querySelector('#curves path').getAttribute('d')")
    shown.run("const box = document.getElementById('metric'); box.value = 'train/loss'; box.dispatchEvent(new Event('change'))")
    assert shown.run("return document.querySelector('#curves path').getAttribute('d')") != before
