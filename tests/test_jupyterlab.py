"""The stepper in a real JupyterLab, in headless Chromium."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

pytestmark = pytest.mark.slow

CELL = """
import torch
from torch import nn

import fxopt
from fxopt.transformations import EliminateDropout

layers = [layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.1))]
inputs = (torch.randn(2, 4),)
gm = fxopt.capture(nn.Sequential(*layers).eval(), inputs)
EliminateDropout()(gm)
fxopt.step_through(gm, inputs)
"""


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def until(ask, what, seconds=90):
    """What ``ask`` returns, once that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := ask():
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {what} in {seconds} s")


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab on a folder with one notebook."""
    pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install jupyterlab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.strip())])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, tmp_path / "step.ipynb")
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--notebook-dir={tmp_path}"]
    paths = {f"JUPYTER_{n}_DIR": str(tmp_path / f".{n}") for n in ("CONFIG", "RUNTIME")}
    environment = {**os.environ, **paths, "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / ".settings")}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            until(lambda: answers(address), f"answer from JupyterLab ({tmp_path / 'server.log'})")
            yield address
        finally:
            server.terminate()
            server.wait(30)


def answers(address):
    try:
        return urllib.request.urlopen(f"{address}/api/status").status == 200
    except OSError:
        return False


@pytest.fixture
def browser():
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(argument)
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def test_the_widget_in_jupyterlab(lab, browser, tmp_path):
    from selenium import webdriver

    browser.get(f"{lab}/lab/tree/step.ipynb")

    def one(selector):
        found = browser.find_elements("css selector", selector)
        return found[0] if found else None

    until(lambda: one(".jp-Notebook .cm-content"), "notebook")
    until(lambda: one("[data-status=idle]"), "kernel")
    until(lambda: one(".jp-Notebook .cm-line") and one(".jp-Notebook .cm-line").is_displayed(), "visible cell")
    keys = webdriver.Keys

    def run():
        """Run the cell; what comes too early for JupyterLab is lost, so it is asked until the prompt says so."""
        if one(".jp-InputPrompt").text.strip() == "[ ]:":
            one(".jp-Notebook .cm-line").click()
            webdriver.ActionChains(browser).key_down(keys.SHIFT).send_keys(keys.ENTER).key_up(keys.SHIFT).perform()
            time.sleep(2)
        return one(".jp-InputPrompt").text.strip() != "[ ]:"

    until(run, "running cell")
    until(lambda: one(".fxopt-stepper .fxopt-status"), "widget")

    def status():
        return one(".fxopt-status").text

    def press(label):
        buttons = browser.find_elements("css selector", ".fxopt-button")
        next(b for b in buttons if b.text == label).click()

    assert status().startswith("4 of 4: EliminateDropout()")
    press("◀")
    until(lambda: status().startswith("3 of 4"), "step back")
    assert "dropout" in one(".fxopt-diff").text
    press("undo")
    until(lambda: "undone" in status(), "undone rewrite")
    press("apply")
    until(lambda: "undone" not in status(), "rewrite made again")
    press("verify")
    until(lambda: "verified on" in one(".fxopt-answer").text, "verification")
    for mark in ("bad", "good", "bad"):  # at 3, 1 and 2
        before = status()
        press(mark)
        until(lambda before=before: status() != before, "next position")
    assert status().startswith("found: EliminateDropout()@")
    browser.save_screenshot(str(tmp_path / "stepper.png"))
    severe = [e for e in browser.get_log("browser") if e["level"] == "SEVERE" and "fxopt" in str(e)]
    assert not severe
