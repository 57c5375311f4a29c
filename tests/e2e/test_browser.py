"""The UI as a person uses it: `internvl up`, and Chromium that clicks through a run, its results and a cancel.

In the order of the file: one `up` serves all tests. How the pages looked is kept in runs/screenshots.
"""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import find_ranks, list_processes, wait_until
from servers_up import Up, is_committed, start_up, wait_for_training

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: see `make e2e`")

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "runs" / "screenshots"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
SUBMISSIONS = 5
RUN_LIMIT_MS = 240_000
CANCEL_LIMIT_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("Chromium is not installed: see `make e2e`")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as running, running.chromium.launch(executable_path=program, args=options) as it:
        yield it


@pytest.fixture(scope="module")
def up(browser: playwright.Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with start_up(tmp_path_factory.mktemp("servers"), until="Ctrl-C stops") as started:
        yield started


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture
def page(browser: playwright.Browser, request: pytest.FixtureRequest) -> Iterator[playwright.Page]:
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        # Prefect's UI asks its makers for settings of their statistics, which `up` has switched off.
        context.route(re.compile(r"^https?://(?!127\.0\.0\.1:)"), lambda route: route.abort())
        page = context.new_page()
        yield page
        take_picture(page, request.node.name.removeprefix("test_"))


def take_picture(page: playwright.Page, name: str) -> None:
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def start_run(page: playwright.Page, up: Up, workspace: Path, *, steps: int) -> None:
    """Fill the form of `smoke` with its first stage and some overrides, send it, and open the run's page."""
    overrides = {
        "workspace": str(workspace),
        "launcher.nproc_per_node": 1,
        "arguments.logging_steps": 1,
        "stages.stage1.arguments.max_steps": steps,
    }
    page.goto(up.api_url.replace("/api", "/v2/deployments"))
    page.get_by_role("link", name="smoke", exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    form = page.get_by_role("main")
    form.get_by_role("tab", name="list").click()
    form.get_by_role("button", name="Add item").click()
    form.get_by_role("tabpanel", name="list").get_by_role("textbox").fill("stage1")
    # The one editor of JSON; it is no input element.
    page.locator(".cm-content").click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text(json.dumps(overrides))
    take_picture(page, "form")
    submit(page)


def submit(page: playwright.Page) -> None:
    """Send the form until the server takes it, and follow the link to the run."""
    taken = page.get_by_role("link", name="View run")
    # SQLite turns away one of two that write at once, with 503: Prefect's clients try again, its UI does not.
    refused = page.get_by_text("Unknown error while creating flow run.")
    for _ in range(SUBMISSIONS):
        page.get_by_role("button", name="Submit").click()
        # A message stays as long as the mouse is over it.
        page.mouse.move(0, 0)
        taken.or_(refused).first.wait_for()
        if taken.is_visible():
            return taken.click()
        refused.wait_for(state="hidden")
    pytest.fail(f"the server refused the form {SUBMISSIONS} times")


def wait_for_end(page: playwright.Page, *, limit_ms: float) -> str:
    """Watch a run's page, without loading it again, until it shows that the run has ended; return how."""
    shown = page.get_by_role("main").get_by_text(re.compile(r"^(Completed|Cancelled|Failed|Crashed)$")).first
    shown.wait_for(timeout=limit_ms)
    return str(shown.inner_text())


def test_a_run_of_the_form_is_watched_to_its_end_and_shows_its_stages(
    up: Up, page: playwright.Page, workspace: Path
) -> None:
    start_run(page, up, workspace, steps=2)
    assert wait_for_end(page, limit_ms=RUN_LIMIT_MS) == "Completed"
    take_picture(page, "run")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_role("tabpanel").get_by_role("link", name="stages-smoke").click()
    page.locator("a[href*='/artifacts/artifact/']").click()
    page.get_by_role("row", name=re.compile("^stage1 trained 2 ")).wait_for()
    assert page.get_by_role("img", name="Training loss").evaluate("image => image.naturalWidth") > 0


def test_the_report_shows_the_stages_and_asks_nobody_for_anything(page: playwright.Page, workspace: Path) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((workspace / "report.html").as_uri())
    headings = page.get_by_role("heading").all_inner_texts()
    assert headings[0].startswith("smoke: ")
    assert page.get_by_role("cell", name="stage1", exact=True).first.is_visible()
    assert asked
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_a_cancel_of_the_ui_commits_and_leaves_no_process_of_the_run(
    up: Up, page: playwright.Page, workspace: Path, tmp_path: Path
) -> None:
    # Made by the first run.
    for name in ("data", "components"):
        shutil.copytree(workspace / name, tmp_path / name)
    start_run(page, up, tmp_path, steps=100_000)
    wait_for_training(tmp_path)
    assert find_ranks(tmp_path)
    page.get_by_role("main").get_by_role("button", name="Open menu").click()
    page.get_by_role("menuitem", name="Cancel").click()
    page.get_by_role("alertdialog").get_by_role("button", name="Cancel Flow Run").click()
    assert wait_for_end(page, limit_ms=CANCEL_LIMIT_MS) == "Cancelled"
    # Cancelled is said when the last rank is gone, not before.
    assert not list_processes(tmp_path, "--attempt_dir=")
    wait_until(lambda: not list_processes(tmp_path), lambda: f"left: {list_processes(tmp_path)}", deadline_s=10)
    assert is_committed(tmp_path), "the stop did not commit"


def test_after_ctrl_c_no_process_is_left(up: Up) -> None:
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(180) == 0
    wait_until(lambda: not list_processes(up.directory), lambda: f"left: {list_processes(up.directory)}", deadline_s=10)
