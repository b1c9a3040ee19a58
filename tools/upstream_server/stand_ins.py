"""A plugin of pytest: upstream's server tests on models and pictures of this machine.

Their presets name models to download; those are found in a cache folder that the script beside has
made, so nothing is fetched.  What each test came to is written down, a line a test.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import requests
import utils  # of upstream's tests

OUTCOMES = "KVMERGE_OUTCOMES"
PICTURES = "KVMERGE_PICTURES"


def pytest_configure() -> None:
    """Fetch nothing, and do not wait for minutes where an answer does not come."""
    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.ServerProcess.n_threads = 1  # more wait for one another on a busy machine
    utils.ServerProcess.make_request.__defaults__ = (None, None, 120, None)
    plain = requests.get

    def get(url: str, *arguments: Any, **options: Any) -> requests.Response:
        """Return a picture of ours for one of upstream's."""
        if not url.startswith("https://huggingface.co/"):
            return plain(url, *arguments, **options)
        response = requests.Response()
        response.status_code = 200
        name = os.path.basename(url)
        with open(os.path.join(os.environ[PICTURES], name), "rb") as file:
            response._content = file.read()
        return response

    requests.get = get


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down what a test came to, in the process that all reports reach."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    said = "" if report.passed else str(report.longrepr)[-300:]
    with open(os.environ[OUTCOMES], "a", encoding="utf-8") as file:
        file.write(json.dumps([report.nodeid, report.outcome, said]) + "\n")
