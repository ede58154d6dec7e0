"""The live page in a real browser, Debian's chromium; left out where there is none."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.pages import HOSTILE, growing, pixels

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
selenium = pytest.importorskip("selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its driver here")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1400,1200",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PAINTED = (
    "(c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v > 0))"
    "(document.querySelector(arguments[0]))"
)
CLICK = (
    "const c = document.querySelector('#tree'); c.setPointerCapture = () => {};"
    "const at = {clientX: arguments[0], clientY: arguments[1], pointerId: 1, bubbles: true};"
    "for (const e of ['pointerdown', 'pointerup']) c.dispatchEvent(new PointerEvent(e, at))"
)
PATIENCE = 60.0  # seconds for what takes one where nothing else runs


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def address(runs):
    """Where `treesearch serve` says that it listens."""
    command = [sys.executable, "-m", "treesearch", "serve", str(runs), "--port", "0"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as server:
        line = server.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", line)
        yield line
        server.terminate()


def until(browser, script, *given):
    """What a script returns once it is true."""
    end = time.monotonic() + PATIENCE
    while not (found := browser.execute_script(f"return {script}", *given)):
        assert time.monotonic() < end, f"never came: {script}; {text(browser, 'main')[:2000]}"
        time.sleep(0.05)
    return found


def text(browser, selector):
    return browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)


def open_run(browser, address, name):
    browser.get("about:blank")
    browser.get(f"{address}#{quote(name, safe='')}")


def complaints(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]


def test_a_run_is_watched_from_its_start_to_its_end(browser, address, runs):
    stream = growing(runs / "growing", iterations=60, wave=10)
    first = next(stream)
    open_run(browser, address, "growing")
    until(browser, "document.querySelector('#size')?.innerText === arguments[0]", f"{first.record['nodes'] - 1} nodes")
    assert text(browser, ".pill") == "running"
    offered = "document.querySelector('#resume').checkVisibility()"
    assert not browser.execute_script(f"return {offered}")  # nobody can go on with what is running
    for snapshot in stream:
        until(
            browser,
            "document.querySelector('#size').innerText === arguments[0]",
            f"{snapshot.record['nodes'] - 1} nodes",
        )
        last = snapshot
    until(browser, "document.querySelector('.pill').innerText === 'finished'")
    result = last.result()
    tiles = until(
        browser,
        "document.querySelector('.tiles').innerText.includes('60\\n') && document.querySelector('.tiles').innerText",
    )
    assert f"{last.cost.nfe}\n" in tiles
    until(browser, "document.querySelectorAll('#gallery .cell').length === 24")
    tree_hash = result.certificate().tree_hash
    until(browser, "document.querySelector('#certificate').innerText.includes(arguments[0])", tree_hash)
    assert browser.execute_script(f"return {offered}")
    assert text(browser, "#resume").startswith("treesearch resume ")
    assert all(browser.execute_script(f"return {PAINTED}", name) for name in ("#tree", "#curve-best", "#curve-ess"))
    assert not complaints(browser)


def test_a_dot_that_is_clicked_is_looked_at(browser, address, runs):
    pixels(runs / "seen", prompts=None, nfe=60)
    open_run(browser, address, "seen")
    until(browser, "document.querySelectorAll('#gallery .cell img').length")
    browser.execute_script("document.querySelector('#gallery .cell').click()")
    until(browser, "document.querySelector('.chosen img')?.naturalWidth")
    best = text(browser, ".chosen")
    where = browser.execute_script(
        "const b = document.querySelector('#tree').getBoundingClientRect(); return [b.x + b.width / 2, b.y + 22]"
    )
    browser.execute_script(CLICK, *where)  # the root: nothing is chosen
    until(browser, "document.querySelector('.chosen').innerText.startsWith('Click a dot')")
    assert "reward" in best
    assert not complaints(browser)


def test_the_wheel_looks_closer_and_a_button_goes_back(browser, address, runs):
    pixels(runs / "near", prompts=None, nfe=60)
    open_run(browser, address, "near")
    until(browser, "document.querySelectorAll('#gallery .cell img').length")
    picture = "document.querySelector('#tree').toDataURL()"
    wheel = "new WheelEvent('wheel', {deltaY: -800, clientX: 400, ctrlKey: true})"
    turn = f"document.querySelector('#tree').dispatchEvent({wheel})"
    until(browser, "performance.getEntriesByName('update').length >= 2")
    whole = until(browser, picture)
    browser.execute_script(turn)
    until(browser, f"{picture} !== arguments[0]", whole)
    browser.execute_script("document.querySelector('.tools button:last-child').click()")
    until(browser, f"{picture} === arguments[0]", whole)
    browser.execute_script(turn.replace(", ctrlKey: true", ""))  # moves the page: nobody clicked the tree
    assert (
        browser.execute_async_script(
            f"const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done({picture})))"
        )
        == whole
    )


def test_hostile_names_and_prompts_are_shown_as_they_are_and_do_nothing(browser, address, runs):
    name = '<img src=x onerror="window.owned=1">'
    pixels(runs / name, outputs=True)
    browser.get(address)
    until(browser, "[...document.querySelectorAll('.runs a')].some(a => a.innerText === arguments[0])", name)
    browser.execute_script(
        "[...document.querySelectorAll('.runs a')].find(a => a.innerText === arguments[0]).click()", name
    )
    until(browser, "document.querySelectorAll('#task option').length === 3")
    assert text(browser, "#where") == name
    options = browser.execute_script("return [...document.querySelectorAll('#task option')].map(o => o.textContent)")
    assert options == [f"{i}: {prompt}" for i, prompt in enumerate(HOSTILE)]
    browser.execute_script(
        "const s = document.querySelector('#task'); s.value = 1; s.dispatchEvent(new Event('change'))"
    )
    until(
        browser, "[...document.querySelectorAll('#gallery img')].some(i => i.src.includes('task=1') && i.naturalWidth)"
    )
    assert browser.execute_script("return window.owned === undefined")
    assert browser.execute_script("return document.querySelectorAll('script').length") == 1
    assert not complaints(browser)


def test_what_a_policy_forbids_a_browser_does_not_do(browser, address):
    browser.get(address)
    until(browser, "document.querySelectorAll('.runs').length")
    script = (
        "const done = arguments[0]; const s = document.createElement('div');"
        "try { s.innerHTML = '<b>x</b>'; done('parsed') } catch (e) { done(e.name) }"
    )
    assert browser.execute_async_script(script) == "TypeError"
    fetched = "const done = arguments[0]; fetch('http://localhost:9/').then(() => done('sent'), e => done(e.name))"
    assert browser.execute_async_script(fetched) == "TypeError"
    assert any("Content Security Policy" in line or "TrustedHTML" in line for line in complaints(browser))


def test_a_run_that_cannot_be_read_says_why(browser, address, runs):
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text("{}")
    open_run(browser, address, "broken")
    assert "this version reads format" in until(browser, "document.querySelector('main .error')?.innerText")
    complaints(browser)


def test_the_script_that_measures_it():
    from experiments.bench import page

    found = page.measure(page.Args(nodes=300, wave=32, updates=2, opened=1))
    assert found["nodes"] > 300
    assert 0 < found["first_paint"] <= found["first_paint_most"]
    assert 0 < found["update"] <= found["update_most"]
