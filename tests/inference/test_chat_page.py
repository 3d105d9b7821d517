"""The page to chat, clicked in Chromium where that is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from intarsia.model import InferenceModel, LanguageModel, presets
from support.serving import NAME, TOKENIZER, running, served

webdriver = pytest.importorskip("selenium.webdriver")
chromium = shutil.which("chromium") or shutil.which("google-chrome")
chromedriver = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium is None or chromedriver is None, reason="Chromium is not installed"),
]


@pytest.fixture
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=900,700"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.implicitly_wait(5)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.mark.parametrize("chat", [True, False])
def test_a_dialogue(browser: Any, chat: bool) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    made = LanguageModel(presets.get("kimi-linear-nano", vocab_size=TOKENIZER.vocab_size))
    made.init_weights(0)

    def shown(name: str) -> str:
        text: str = browser.find_element("id", name).text
        return text

    def wait(condition: Any) -> None:
        WebDriverWait(browser, 30).until(condition)

    with running(served(InferenceModel(made), chat=chat, most_tokens=40)) as address:
        browser.get(address)
        wait(lambda _: shown("model") == NAME)
        browser.find_element("id", "text").send_keys("hello")
        browser.find_element("id", "send").click()
        wait(lambda _: shown("context") not in ("", "0") and shown("send") == "Send")
        first = int(shown("context"))
        assert float(shown("speed")) > 0
        browser.find_element("id", "text").send_keys("and then?\n")
        wait(lambda _: shown("send") == "Send" and int(shown("context").replace(",", "")) > first)
        assert int(shown("cached")) > 0
        assert " of " in shown("cache")
        said = [each.get_attribute("class") for each in browser.find_elements("css selector", "#log > div")]
        assert said == ["said user", "said assistant"] * 2
        browser.find_element("id", "clear").click()
        assert browser.find_elements("css selector", "#log > div") == [] or shown("log") == ""
        assert browser.get_log("browser") == []
