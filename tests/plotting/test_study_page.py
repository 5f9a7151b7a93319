"""diffusion.plotting.study_page in a browser: by keys, clicks and touch, and without storage."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from diffusion.plotting.study_page import StudyPairs, picture_uri, study_id, study_page
from tests.browser import browser, needs_browser, severe
from tests.runs import run

pytestmark = [needs_browser, pytest.mark.slow]
WAIT_S = 20


def wait(driver, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, WAIT_S, 0.03).until(condition)


def element(driver, name):
    from selenium.webdriver.common.by import By

    return driver.find_element(By.ID, name)


def is_ready(driver):
    return element(driver, "pair").get_attribute("aria-busy") == "false"


def answers_so_far(driver):
    return driver.execute_script("return state.answers")


def press(driver, key):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(driver).send_keys(key).perform()


def choose(driver, side, how):
    """Answers with the left (0) or right (1) picture, in one of WAYS, once it can be."""
    from selenium.webdriver.common.keys import Keys

    wait(driver, is_ready)
    name = ("left", "right")[side]
    if how == "arrow":
        press(driver, (Keys.ARROW_LEFT, Keys.ARROW_RIGHT)[side])
    elif how == "digit":
        press(driver, "12"[side])
    elif how == "click":
        element(driver, name).click()
    elif how == "twice":  # a key as soon as the next pair is there is no answer to it
        driver.execute_async_script(PRESS_TWICE, "12"[side])
    elif how == "enter":
        element(driver, name).send_keys(Keys.ENTER)
    else:
        driver.execute_script("arguments[0].focus()", element(driver, name))
        press(driver, Keys.SPACE)


WAYS = ("arrow", "digit", "click", "twice", "enter", "space")

PRESS_TWICE = """
const [key, done] = arguments, pair = document.getElementById('pair');
const press = () => document.dispatchEvent(new KeyboardEvent('keydown', {key}));
press();
const observer = new MutationObserver(() => {
  if (pair.classList.contains('covered')) return;
  observer.disconnect();
  press();
  done();
});
observer.observe(pair, {attributes: true});
"""


def side_of(driver, uri):
    """Returns on which side a picture is."""
    images = [element(driver, side).find_element("tag name", "img") for side in ("left", "right")]
    return [image.get_attribute("src") for image in images].index(uri)


def two_pairs(seconds=0.0):
    """A study of two pairs of noise, without practice."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    uris = [picture_uri(image) for image in noise]
    return StudyPairs([(uris[0], uris[1]), (uris[2], uris[3])], [], [], seconds)


def write_page(path, shown):
    path.write_text(study_page(shown))
    return path.as_uri()


def test_forty_pairs_by_keys_and_clicks_give_the_rate_of_the_rule(trained, tmp_path):
    """A person who takes the generated picture of every fifth pair for real, and reloads once."""
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    options = "--config.study.num=40", "--config.study.checks=4", "--config.study.practice=2"
    run("--mode=study", f"--workdir={workdir}", *options)
    folder = workdir / "study" / "00000008"
    key = json.loads((folder / "study.json").read_text())
    counted = [i for i, pair in enumerate(key["pairs"]) if pair["condition"] == 0]
    wrong = {*counted[::5]}
    downloads = tmp_path / "downloads"
    with browser(downloads) as driver:
        driver.get((folder / "study.html").as_uri())
        name = element(driver, "person")
        name.clear()
        name.send_keys("two words")
        element(driver, "begin").click()
        assert element(driver, "trial").get_attribute("hidden")  # the name is refused
        name.clear()
        name.send_keys("reader-1")
        element(driver, "begin").click()
        for i, pair in enumerate(key["practice"]):
            assert element(driver, "count").text == f"Practice {i + 1} of 2"
            shown = driver.execute_script("return STUDY.practice[trial.practice]")
            wait(driver, is_ready)
            right = side_of(driver, shown[pair["real"]])
            choose(driver, right if i else 1 - right, WAYS[i])
            verdict = ("No", "Yes")[i]
            text = f"{verdict}: the {('left', 'right')[right]} one is real."
            assert element(driver, "feedback").text == text
            assert element(driver, ("left", "right")[right]).get_attribute("class") == "real"
            press(driver, "1")  # answers nothing while the answer is shown
            element(driver, "next").click()
        order = []
        for i in range(44):
            if i == 20:
                driver.refresh()
                assert element(driver, "begin").text == "Continue"
                assert element(driver, "person").get_attribute("value") == "reader-1"
                element(driver, "begin").click()
            assert element(driver, "count").text == f"Pair {i + 1} of 44"
            wait(driver, is_ready)
            pair = driver.execute_script("return trial.pair")
            order.append(pair)
            real = key["pairs"][pair]["real"]
            shown = driver.execute_script("return STUDY.pairs[trial.pair]")
            side = side_of(driver, shown[1 - real if pair in wrong else real])
            choose(driver, side, WAYS[i % len(WAYS)])
        assert sorted(order) == [*range(44)] and order != sorted(order)
        element(driver, "download").click()
        path = downloads / "answers-reader-1.json"
        wait(driver, lambda _: path.exists())
        assert element(driver, "text").get_attribute("value") == path.read_text()
        driver.refresh()
        assert element(driver, "thanks").is_displayed()
        assert severe(driver) == []
    stored = json.loads(path.read_text())
    assert [answer["pair"] for answer in stored["answers"]] == order
    assert 5 < sum(answer["left"] for answer in stored["answers"]) < 39
    run("--mode=study", f"--workdir={workdir}", f"--input={path}")
    results = json.loads((folder / "results.json").read_text())
    assert results["people"] == ["reader-1"]
    assert results["conditions"][0]["rate"] == len(wrong) / 40 == 0.2


def test_people_get_orders_of_their_own(tmp_path):
    page = write_page(tmp_path / "page.html", two_pairs())
    script = "return shuffled(40, generator(arguments[0]))"
    with browser() as driver:
        driver.get(page)
        orders = [driver.execute_script(script, f"person-{i}") for i in range(200)]
        again = driver.execute_script(script, "person-7")
    assert orders[7] == again and len({*map(tuple, orders)}) == 200
    assert all(sorted(order) == [*range(40)] for order in orders)
    # Every pair comes at every place, 100 +- 40 times in each half.
    first_half = np.bincount(np.concatenate([order[:20] for order in orders]), minlength=40)
    assert abs(first_half - 100).max() < 40


def test_page_works_where_nothing_can_be_stored(tmp_path):
    """And forgets the answers of one person for another."""
    page = write_page(tmp_path / "page.html", two_pairs())
    refuse = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('no'); }})"
    with browser() as driver:
        command = "Page.addScriptToEvaluateOnNewDocument"
        driver.execute_cdp_cmd(command, {"source": refuse})
        driver.get(page)
        element(driver, "begin").click()
        for side in (0, 1):
            choose(driver, side, "arrow")
        wait(driver, lambda driver: element(driver, "thanks").is_displayed())
        stored = json.loads(element(driver, "text").get_attribute("value"))
        assert stored["study"] == study_id(two_pairs()) and len(stored["answers"]) == 2
        element(driver, "another").click()
        driver.switch_to.alert.accept()
        assert element(driver, "begin").is_displayed() and answers_so_far(driver) == []
        assert element(driver, "person").get_attribute("value") != stored["person"]
        assert severe(driver) == []


def test_a_short_look_ends_and_can_still_be_answered(tmp_path):
    page = write_page(tmp_path / "page.html", two_pairs(seconds=0.3))
    with browser() as driver:
        driver.get(page)
        assert "shown for 0.3 seconds" in element(driver, "intro").text
        element(driver, "begin").click()
        picture = element(driver, "left").find_element("tag name", "img")
        wait(driver, is_ready)
        wait(driver, lambda _: picture.value_of_css_property("visibility") == "hidden")
        choose(driver, 0, "arrow")
        choose(driver, 1, "digit")
        wait(driver, lambda driver: element(driver, "thanks").is_displayed())
        assert severe(driver) == []


@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_a_phone_and_can_be_touched(tmp_path, dark):
    page = write_page(tmp_path / "page.html", two_pairs())
    with browser(dark=dark) as driver:
        size = {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        driver.get(page)
        element(driver, "begin").click()
        wait(driver, is_ready)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
        box = element(driver, "right").rect
        assert box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
        assert min(box["width"], box["height"]) >= 100
        point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        touch = {"type": "touchStart", "touchPoints": [point]}
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        (answer,) = wait(driver, answers_so_far)
        assert answer["choice"] == 1 - answer["left"]
        colour = element(driver, "question").value_of_css_property("color")
        assert (int(colour.split("(")[1].split(",")[0]) > 128) == dark
        assert severe(driver) == []


def test_a_page_needs_no_other_file(tmp_path):
    text = pathlib.Path(tmp_path / "page.html")
    write_page(text, two_pairs())
    assert "http" not in text.read_text().replace("http-equiv", "")
