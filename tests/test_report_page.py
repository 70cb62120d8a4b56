"""The page that `ddinfer report` writes, in a headless browser."""

import os
import re
import shlex
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from ddinfer.request import Request
from ddinfer.storage.images import image_path
from ddinfer.storage.media import Formats
from tests.browser import WITHOUT, browser, has_browser, set_screen
from tests.report_jobs import (
    HOSTILE,
    failed,
    large_job,
    made,
    real_job,
    report,
    sound,
    various_job,
    video,
    write_job,
)
from tests.storage_jobs import make_requests

pytestmark = pytest.mark.skipif(not has_browser(), reason=WITHOUT)

#: Where to write screenshots; by hand: REPORT_SCREENSHOTS=docs/images pytest tests/test_report.py
SCREENSHOTS = os.environ.get("REPORT_SCREENSHOTS")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def visit(driver, out, width=1280, height=800, **screen):
    """Open a job's page, anew."""
    set_screen(driver, width, height, **screen)
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get(Path(out, "report.html").resolve().as_uri())
    wait_for(driver, "return document.querySelectorAll('.cell').length > 0")


def wait_for(driver, script, seconds=10):
    return WebDriverWait(driver, seconds, poll_frequency=0.02).until(
        lambda driver: driver.execute_script(script)
    )


def all_of(driver, selector):
    return driver.find_elements("css selector", selector)


def text_of(driver, selector):
    return [element.text for element in all_of(driver, selector)]


def press(driver, *keys):
    ActionChains(driver).send_keys(*keys).perform()


def shown_indices(driver):
    """Of the cells, in the order of the gallery."""
    return driver.execute_script("""
        const place = (cell) => new DOMMatrix(cell.style.transform);
        return [...document.querySelectorAll(".cell")]
            .map((cell) => [place(cell).f, place(cell).e, Number(cell.dataset.row)])
            .sort((a, b) => a[0] - b[0] || a[1] - b[1]).map((found) => found[2])
    """)


def no_complaints(driver):
    assert [line["message"] for line in driver.get_log("browser")] == []


def test_search_filters_and_order(driver, tmp_path):
    out = various_job(tmp_path / "out")
    report(out)
    visit(driver, out)
    assert shown_indices(driver) == list(range(12))
    is_shown = "(image) => image.naturalWidth > 0"
    images = "[...document.querySelectorAll('.cell img')]"
    wait_for(driver, f"return {images}.filter({is_shown}).length === 10")
    filters = {"failed": [3, 7], "flagged": [5], "inexact": [6], "pending": []}
    for filtered, expected in filters.items():
        all_of(driver, f"[data-filter={filtered}]")[0].click()
        assert shown_indices(driver) == expected
    assert all_of(driver, "#nothing")[0].is_displayed()
    all_of(driver, "[data-filter=all]")[0].click()
    searches = {
        "house": [3, 7, 11],
        "BLUE star": [2, 6, 10],
        '"red circle" -seed=100': [1, 4, 5, 8, 9],
        "steps>10 red": [8, 9],
        "eta=0.5": [8],
        "rank:1 circle": [],
        "rank:1": [2, 3, 6, 7, 10, 11],
        "mine-": [0, 3, 6, 9],
        "<b>by</b>": [3, 7, 11],
        "nothing:like this": [],
    }
    for text, expected in searches.items():
        look_for(driver, text)
        assert shown_indices(driver) == expected, text
    look_for(driver, "")
    choose(driver, "parameter", "num_inference_steps")
    choose(driver, "value", "11")
    assert shown_indices(driver) == [6, 7, 8, 9, 10, 11]
    choose(driver, "parameter", "")
    choose(driver, "sort", "-seconds")
    assert shown_indices(driver)[0] == 8
    assert shown_indices(driver)[-2:] == [3, 7]
    no_complaints(driver)


def look_for(driver, text):
    """Type a search, in place of the one before."""
    field = all_of(driver, "[name=text]")[0]
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(Keys.BACKSPACE, text)


def choose(driver, name, value):
    Select(all_of(driver, f"[name={name}]")[0]).select_by_value(value)


def test_the_panel_of_an_image(driver, tmp_path):
    out = various_job(tmp_path / "it's here")
    report(out)
    visit(driver, out)
    press(driver, "/")
    press(driver, Keys.ENTER, Keys.RIGHT, Keys.ENTER)
    names, values = text_of(driver, ".details th"), text_of(driver, ".details td")
    facts = dict(zip(names, values, strict=True))
    assert text_of(driver, ".details .prompt") == ["a red circle"]
    assert (facts["seed"], facts["num_inference_steps"], facts["width"]) == ("101", "10", "48")
    assert facts["made by"] == "rank 0, attempt 1"
    assert facts["pipeline time"] == "0.50 s"
    wait_for(driver, "return document.querySelector('.size').textContent === '48 × 32'")
    (command,) = text_of(driver, ".command")
    assert shlex.split(command) == ["ddinfer", "replay", f"{out}/{image_path(1)}"]
    assert "Made in one batch with 1 other" in text_of(driver, ".details h2")
    assert driver.current_url.endswith("#image=1")
    press(driver, Keys.RIGHT, Keys.RIGHT)
    assert text_of(driver, ".details h2")[0] == "ValueError: no such thing"
    assert text_of(driver, ".details pre")[0].startswith("Traceback (most recent call last)")
    (command,) = text_of(driver, ".command")
    assert shlex.split(command) == ["ddinfer", "retry-failed", out]
    press(driver, Keys.LEFT, "c")  # left, to image 2; its prompt side by side
    captions = text_of(driver, "#compare figcaption")
    assert captions[0] == "seed 102 · num_inference_steps 10"
    assert len(captions) == 3
    press(driver, Keys.ESCAPE)
    wait_for(driver, "return !document.querySelector('#compare').open")
    press(driver, Keys.ESCAPE)
    wait_for(driver, "return !document.querySelector('dialog[open]')")
    wait_for(driver, "return document.activeElement.matches('.cell[data-row=\"2\"]')")
    no_complaints(driver)


def test_an_animated_image_plays_and_pauses(driver, tmp_path):
    requests = make_requests(1)
    out = write_job(tmp_path / "out", requests, video, formats=Formats(video="apng"))
    report(out)
    visit(driver, out)
    all_of(driver, "[data-row='0']")[0].click()
    source = "return document.querySelector('.stage img').getAttribute('src')"
    assert driver.execute_script(source) == image_path(0)
    all_of(driver, ".play")[0].click()
    assert driver.execute_script(source).startswith("thumbnails/0000/00000000-")
    all_of(driver, ".play")[0].click()
    assert driver.execute_script(source) == image_path(0)


@pytest.mark.parametrize("ending", ["mp4", "webm", "wav", "flac"])
def test_videos_and_sound_are_played(ending, driver, tmp_path):
    is_sound = ending in ("wav", "flac")
    formats = Formats(audio=ending) if is_sound else Formats(video=ending)
    results = sound if is_sound else video
    out = write_job(tmp_path / "out", make_requests(1), results, formats=formats)
    report(out)
    visit(driver, out)
    if is_sound:
        assert text_of(driver, ".cell .note") == ["♪"]
    else:  # the thumbnail is the first frame
        wait_for(driver, "return document.querySelector('.cell img').naturalWidth === 32")
        assert text_of(driver, ".cell .badge") == ["▶ 4"]
    all_of(driver, "[data-row='0']")[0].click()
    player = f"document.querySelector('.stage {'audio' if is_sound else 'video'}')"
    source = driver.execute_script(f"return {player}.getAttribute('src')")
    assert source == f"images/0000/00000000.{ending}"
    wait_for(driver, f"return {player}.readyState >= 3")
    driver.execute_script(f"{player}.muted = true; {player}.play()")
    wait_for(driver, f"return {player}.currentTime > 0.05")
    if not is_sound:
        assert driver.execute_script(f"return {player}.videoWidth") == 32
    no_complaints(driver)


def test_failures_times_and_job(driver, tmp_path):
    out = various_job(tmp_path / "out")
    report(out)
    visit(driver, out)
    press(driver, "2")
    assert text_of(driver, ".failure h3") == ["ValueError: no such thing"]
    assert text_of(driver, ".failure li button") == ["mine-3", "00000007"]
    press(driver, "3")
    groups = text_of(driver, ".seconds td:first-child")
    assert groups == ["48 × 32, 10 steps", "48 × 32, 11 steps"]
    # It gets its size and is drawn in one task, once the browser has laid out the page. It is read
    # once: Chromium complains of a canvas that is read repeatedly.
    wait_for(
        driver,
        """
        const canvas = document.querySelector("canvas");
        return canvas.clientWidth > 0 && canvas.width === canvas.clientWidth * devicePixelRatio
            && canvas.height === canvas.clientHeight * devicePixelRatio
        """,
    )
    num_colors = driver.execute_script(
        """
        const canvas = document.querySelector("canvas");
        const drawn = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(drawn.data.buffer)).size
        """
    )
    assert num_colors > 3
    press(driver, "4")
    assert "float32" in text_of(driver, "#job table")[0]
    no_complaints(driver)


def test_no_text_of_a_job_is_taken_for_html(driver, tmp_path):
    requests = [
        Request(k, f"{k} {text[:40]}", text, k, negative_prompt=text, kwargs={"note": text})
        for k, text in enumerate(HOSTILE)
    ]
    out = write_job(
        tmp_path / "<img src=x onerror=window.hacked=8>",
        requests,
        lambda r: made(r, flags=(HOSTILE[0],)) if r.index % 2 else failed(r, HOSTILE[r.index]),
    )
    report(out)
    visit(driver, out)
    for key in "2341":
        press(driver, key)
    for index, text in enumerate(HOSTILE):
        driver.execute_script(f"document.querySelector('[data-row=\"{index}\"]').click()")
        (prompt,) = all_of(driver, ".details .prompt")
        assert prompt.get_property("textContent") == text
        driver.execute_script("document.querySelector('#picture').close()")
    elements = "return document.querySelectorAll('iframe, svg[onload], img[onerror], b').length"
    assert driver.execute_script(elements) == 0
    assert driver.execute_script("return window.hacked") is None
    no_complaints(driver)


def test_a_hundred_thousand_images(driver, tmp_path):
    out = large_job(tmp_path / "out", 100_000)
    assert report(out, "--no_thumbnails") == 0
    visit(driver, out)
    paint = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    assert wait_for(driver, paint) < 2000
    assert text_of(driver, "#found") == ["100,000 images"]
    press(driver, "/", Keys.ENTER, Keys.END)  # into the gallery, to its end
    assert driver.switch_to.active_element.get_attribute("data-row") == "99999"
    seen = shown_indices(driver)
    assert len(seen) < 100
    assert seen[-1] == 99_999
    press(driver, Keys.HOME)
    assert driver.switch_to.active_element.get_attribute("data-row") == "0"
    press(driver, "/", '"thing 4999" steps=21')
    found = [k for k in range(4999, 100_000, 5000) if k % 3 == 1]
    assert shown_indices(driver) == found
    driver.execute_script("document.activeElement.blur()")
    press(driver, "3")
    wait_for(driver, "return document.querySelectorAll('.seconds tr').length === 4")
    memory = renderer_bytes(driver)
    assert 0 < memory < 300e6
    print(f"first paint {driver.execute_script(paint):.0f} ms, {memory / 1e6:.0f} MB")
    no_complaints(driver)


def renderer_bytes(driver):
    """Memory of the largest process that draws a page, shared pages counted in part."""
    sizes = [0]
    for pid in descendants(driver.service.process.pid):
        if b"--type=renderer" in Path(f"/proc/{pid}/cmdline").read_bytes():
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            sizes.append(1024 * int(re.findall(r"^Pss: +(\d+) kB", rollup, re.M)[0]))
    return max(sizes)


def descendants(pid):
    """Processes that any thread of a process has started, and theirs."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield child
            yield from descendants(child)


def test_more_lines_than_a_browser_has_pixels_for(driver, tmp_path):
    out = write_job(tmp_path / "out", make_requests(400), lambda r: None, batch_size=1)
    report(out)
    page = Path(out, "report.html")
    text = page.read_text(encoding="utf-8")
    lower = text.replace("const MAX_HEIGHT = 8_000_000", "const MAX_HEIGHT = 2_000")
    policy = re.sub("script-src '[^']*'", "script-src 'unsafe-inline'", lower)
    page.write_text(policy, encoding="utf-8")
    visit(driver, out)
    press(driver, "/", Keys.ENTER, Keys.END)
    assert driver.switch_to.active_element.get_attribute("data-row") == "399"
    is_inside = driver.execute_script("""
        const cell = document.activeElement.getBoundingClientRect();
        const box = document.querySelector("#gallery").getBoundingClientRect();
        return cell.top >= box.top && cell.bottom <= box.bottom + 1
    """)
    assert is_inside
    assert shown_indices(driver)[-1] == 399
    driver.execute_script("document.querySelector('#gallery').scrollTop = 900")
    wait_for(driver, "return document.querySelector('.cell[data-row=\"270\"]')")
    assert 200 < shown_indices(driver)[0] < 270


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_and_the_dark(driver, tmp_path, dark):
    out = various_job(tmp_path / "out")
    report(out)
    visit(driver, out, 390, 844, phone=True, dark=dark)
    back = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) is dark
    fits = "return document.documentElement.scrollWidth <= innerWidth"
    assert driver.execute_script(fits)
    columns = {element.location["x"] for element in all_of(driver, ".cell")}
    assert len(columns) == 2
    all_of(driver, ".cell")[0].click()
    image, details = all_of(driver, ".stage")[0], all_of(driver, ".details")[0]
    assert image.size["width"] == details.size["width"] == 390
    assert details.location["y"] >= image.size["height"]
    assert driver.execute_script(fits)


@pytest.mark.skipif(SCREENSHOTS is None, reason="writes docs/images; set REPORT_SCREENSHOTS")
def test_a_screenshot_of_the_demonstration(driver, tmp_path):
    out = real_job(tmp_path / "demo-out", ranks=2, limit=None)
    visit(driver, out, 1120, 640)
    wait_for(driver, "return [...document.querySelectorAll('.cell img')].every(i => i.complete)")
    driver.save_screenshot(str(Path(SCREENSHOTS, "report.png")))
