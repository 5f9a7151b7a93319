"""A headless Chromium for tests of HTML pages, where one is installed."""

import contextlib
import pathlib
import shutil
import socket

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextlib.contextmanager
def browser(downloads: pathlib.Path | None = None, dark: bool = False, width: int = 1200):
    """Yields a selenium driver; its messages of level SEVERE are `severe(driver)`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--window-size={width},900"):
        options.add_argument(flag)
    if dark:
        options.add_argument("--force-dark-mode")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if downloads:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER, port))
    try:
        yield driver
    finally:
        driver.quit()


def severe(driver):
    """Returns what the page's console says of errors."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
