"""The dashboard in a real browser (Debian's chromium): no errors, live updates, and completions shown as text."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from grpo.runtime.messages import visible
from grpo.tools.chat_models import load_chat_models, stream_answers
from grpo.tools.dashboard import completions_tab
from grpo.tools.dashboard.app import serve
from grpo.tracking.curves import CURVES
from grpo.tracking.drawing import readable
from tests.fakes import tiny_folder
from tests.test_trainer import arguments
from tests.tools.test_dashboard import HOSTILE, add_step, write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
KEYS = {
    "Each reward": ["reward/accuracy/mean", "reward/xml_format/mean"],
    "Clipped, truncated, flat": ["policy/clip_fraction", "rollout/truncated_fraction", "reward/zero_std_fraction"],
    "Seconds per phase": ["time/rollout", "time/reward", "time/reference", "time/update"],
}
PATIENCE = 120_000
"""Milliseconds: a machine may be busy. What is waited for comes within 5 s on one that is not."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("gradio", reason='pip install -e ".[dashboard]"')
    playwright = pytest.importorskip("playwright.sync_api", reason='pip install -e ".[browser]"')
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visit:
    """A browser page that collects its errors."""

    def __init__(self, browser: Any, address: str, colors: str = "light", width: int = 1400) -> None:
        self.page = browser.new_page(color_scheme=colors, viewport={"width": width, "height": 1000})
        self.page.set_default_timeout(PATIENCE)
        self.wrong: list[str] = []
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.on("response", lambda got: self.wrong.append(got.url) if got.status >= 400 else None)
        self.page.on(
            "request",
            lambda sent: None if sent.url.startswith((address, "data:", "blob:")) else self.wrong.append(sent.url),
        )
        self.page.goto(f"{address}?__theme={colors}")
        self.page.wait_for_selector("#numbers .number")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def shows(self, text: str) -> None:
        self.page.locator("#numbers").get_by_text(text, exact=True).wait_for()


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_every_page_loads_and_a_hostile_completion_stays_text(tmp_path: Path, browser: Any, colors: str) -> None:
    run = write_run(tmp_path / "runs" / "<b>hostile", completion=HOSTILE)
    write_run(tmp_path / "runs" / "other", seed=HOSTILE)
    finding = {"step": 5, "name": "dead:x", "text": f"reward 'x' has been 0 {HOSTILE}", "mend": "mend it"}
    for name in ("<b>hostile", "other"):
        (tmp_path / "runs" / name / "findings.jsonl").write_text(json.dumps(finding) + "\n")
    feedback = tmp_path / "feedback.jsonl"
    page, address = serve(tmp_path / "runs", feedback, block=False)
    try:
        visit = Visit(browser, address, colors)
        browser_page = visit.page
        browser_page.locator("#findings li").first.wait_for()
        assert HOSTILE in browser_page.locator("#findings").inner_text()
        browser_page.locator("#runs input").click()
        for name in ("<b>hostile", "other"):
            if not browser_page.locator("#runs").get_by_text(name, exact=True).count():
                browser_page.get_by_role("option", name=name).click()
        browser_page.keyboard.press("Escape")
        visit.tab("Compare")
        browser_page.get_by_text("Where their configs differ").wait_for()
        assert HOSTILE in browser_page.locator(".table").last.inner_text()

        visit.tab("Completions")
        browser_page.locator("#completions-run input").click()
        browser_page.get_by_role("option", name="<b>hostile").click()
        cell = browser_page.locator("#completions").get_by_text(HOSTILE[:30]).locator("visible=true").first
        cell.wait_for()
        box = cell.bounding_box()
        browser_page.mouse.click(box["x"] + 5, box["y"] + 5)
        browser_page.locator(".card textarea").nth(3).wait_for()
        assert browser_page.locator(".card textarea").nth(3).input_value() == f"{HOSTILE} #3"
        assert browser_page.locator(".card.right").count() == 2 and browser_page.locator(".card.wrong").count() == 2

        browser_page.get_by_label("The right answer").locator("visible=true").fill("4 = 2+2")
        browser_page.get_by_role("button", name="correct it").locator("visible=true").click()
        browser_page.get_by_text("Thank you.").wait_for()
        [said] = [json.loads(line) for line in feedback.read_text().splitlines()]
        assert (said["verdict"], said["correction"], said["pair_id"]) == ("correct", "4 = 2+2", 11)
        assert said["completion"] == f"{HOSTILE} #0" and said["consent"] is False

        browser_page.locator("#search textarea, #search input").first.fill("#3")
        browser_page.locator("#scope input").click()
        browser_page.get_by_role("option", name="all steps").click()
        browser_page.get_by_text("6 completions of steps 0 to 6.").wait_for()  # sample 3 of each of 6 steps
        browser_page.get_by_label("wrong", exact=True).locator("visible=true").click()
        browser_page.get_by_text("No completion of steps 0 to 6 fits.").wait_for()

        visit.tab("Curves")
        add_step(run, 7)
        visit.tab("Chat")
        assert browser_page.title() == "GRPO runs"
        assert browser_page.locator("img[src='x']").count() == 0
        assert not browser_page.evaluate("[...document.scripts].some(script => script.text.includes('owned'))")
        assert visit.wrong == []
    finally:
        page.close()


def test_completions_are_those_of_the_step_shown_and_a_group_closes(
    tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer about an older step that arrives late is not shown. Equal answers are one card."""
    run = write_run(tmp_path / "runs" / "one", steps=20)
    rows = (run / "rollouts.jsonl").read_text()
    (run / "rollouts.jsonl").write_text(
        re.sub(r'"4 #[012]"', '"the same"', rows.replace('"reward": 0.5', '"reward": 1'))
    )
    whole = completions_tab.find

    def slow(board: Any, name: Any, at: int, *rest: Any) -> Any:
        time.sleep(2.0 if at < 20 else 0.0)
        return whole(board, name, at, *rest)

    monkeypatch.setattr(completions_tab, "find", slow)
    page, address = serve(tmp_path / "runs", tmp_path / "feedback.jsonl", block=False)
    try:
        for _ in range(3):
            visit = Visit(browser, address)
            visit.tab("Completions")
            visit.page.get_by_text("4 completions of step 20.").wait_for()
            visit.page.wait_for_timeout(3000)  # longer than an answer about an older step takes
            assert visit.page.locator("#step input").first.input_value() == "20"
            assert "4 completions of step 20." in visit.page.locator("#found").inner_text()
        cell = visit.page.locator("#completions").get_by_text("the same").locator("visible=true").first
        box = cell.bounding_box()
        visit.page.mouse.click(box["x"] + 5, box["y"] + 5)
        visit.page.get_by_text("Step 20: 4 completions, 2 different. Green: right. Red: wrong.").wait_for()
        assert visit.page.locator(".card").count() == 2
        assert visit.page.locator(".card").first.inner_text().startswith("#0 and 2 like it")
        visit.page.locator("#search textarea, #search input").first.fill("nowhere")
        visit.page.get_by_text("No completion of step 20 fits.").wait_for()
        visit.page.locator(".card").first.wait_for(state="detached")
        assert visit.wrong == []
    finally:
        page.close()


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_a_narrow_screen(tmp_path: Path, browser: Any, colors: str) -> None:
    """At 390 pixels nothing is wider than the page, every tab is in the bar, and four columns are left to read."""
    write_run(tmp_path / "runs" / "one", completion="An answer of some words that goes on")
    page, address = serve(tmp_path / "runs", tmp_path / "feedback.jsonl", block=False)
    try:
        visit = Visit(browser, address, colors, width=390)
        tabs = visit.page.get_by_role("tab").all()
        assert [tab.inner_text() for tab in tabs if tab.is_visible()] == ["Curves", "Completions", "Compare", "Chat"]
        boxes = [tab.bounding_box() for tab in tabs]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
        visit.tab("Completions")
        visit.page.locator("#completions [role=gridcell]").first.wait_for(state="attached")
        shown = [cell for cell in visit.page.locator("#completions th").all() if cell.is_visible()]
        assert [cell.inner_text().split()[0] for cell in shown] == ["prompt", "completion", "reward", "right"]
        cells = visit.page.locator("#completions .virtual-row").first.locator("[role=gridcell]").all()
        widths = [cell.bounding_box()["width"] for cell in cells if cell.is_visible()]
        assert len(widths) == 4 and widths[1] > 110 and min(widths) > 36
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert visit.wrong == []
    finally:
        page.close()


def test_asking_a_model_beside_its_base(tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "runs" / "one")
    tiny_folder(run / "final", seed=0)
    tiny_folder(tmp_path / "base", seed=1)
    (run / "environment.json").write_text(json.dumps({"derived": {"base_model": str(tmp_path / "base")}}))
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"system_prompt": None}, "steps": 10}))
    *_, expected = stream_answers(
        load_chat_models(str(run / "final"), str(tmp_path / "base")), "1+2=", max_completion_length=256
    )
    assert expected["base"] != expected["trained"]
    feedback = tmp_path / "feedback.jsonl"
    page, address = serve(tmp_path / "runs", feedback, block=False)
    try:
        visit = Visit(browser, address)
        visit.tab("Chat")
        visit.page.locator("#question textarea, #question input").first.fill("1+2=")
        visit.page.locator("#ask").click()
        for name, wanted in (("base", expected["base"]), ("trained", expected["trained"])):
            visit.page.wait_for_function(
                "([name, wanted]) => document.querySelector(`#${name}-answer textarea`).value === wanted",
                arg=[name, visible(wanted)],
            )
        visit.page.get_by_role("button", name="✓ right").locator("visible=true").click()
        visit.page.get_by_text("Thank you.").locator("visible=true").wait_for()

        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError(HOSTILE)

        monkeypatch.setattr("grpo.tools.chat_models.stream_answers", broken)
        visit.page.locator("#ask").click()
        visit.page.get_by_text("RuntimeError: <img").wait_for()

        monkeypatch.setattr(
            "grpo.tools.chat_models.stream_answers", lambda *_, **__: iter([{"base": HOSTILE, "trained": HOSTILE}])
        )
        visit.page.locator("#ask").click()
        visit.page.wait_for_function(
            "wanted => document.querySelector('#base-answer textarea').value === wanted", arg=HOSTILE
        )
        visit.page.get_by_label("The right answer").locator("visible=true").fill("3")
        visit.page.get_by_label("May be used to train").locator("visible=true").check()
        visit.page.get_by_role("button", name="correct it").locator("visible=true").click()
        while feedback.read_text().count("\n") < 2:
            visit.page.wait_for_timeout(200)
        first, second = (json.loads(line) for line in feedback.read_text().splitlines())
        assert (first["verdict"], first["prompt"], first["completion"]) == ("accept", "1+2=", expected["trained"])
        assert (second["verdict"], second["completion"], second["correction"]) == ("correct", HOSTILE, "3")
        assert first["consent"] is False and second["consent"] is True
        assert first["checkpoint_sha"] == second["checkpoint_sha"] and first["checkpoint_sha"]
        assert visit.page.title() == "GRPO runs" and visit.wrong == []
    finally:
        page.close()


def test_a_broken_model_says_what_it_lacks(tmp_path: Path, browser: Any) -> None:
    run = write_run(tmp_path / "runs" / "one")
    (tiny_folder(run / "final") / "config.json").unlink()
    page, address = serve(tmp_path / "runs", tmp_path / "feedback.jsonl", block=False)
    try:
        visit = Visit(browser, address)
        visit.tab("Chat")
        visit.page.locator("#question textarea, #question input").first.fill("1+2=")
        visit.page.locator("#ask").click()
        visit.page.get_by_text("the folder holds no config.json").wait_for()
        (run / "final" / "config.json").write_text("{}")
        (run / "final" / "tokenizer.json").unlink()
        (run / "final" / "tokenizer_config.json").unlink()
        visit.page.locator("#ask").click()
        visit.page.get_by_text("its tokenizer cannot be loaded").wait_for()
        assert visit.wrong == []
    finally:
        page.close()


def test_85_000_steps_are_shown_whole(tmp_path: Path, browser: Any) -> None:
    """Times are printed, not asserted: pytest -s -m slow tests/tools/test_dashboard_browser.py -k 85_000"""
    last = write_long_run(tmp_path / "runs" / "long", steps=85_000)
    page, address = serve(tmp_path / "runs", tmp_path / "feedback.jsonl", block=False)
    try:
        for turn in ("first", "second"):
            start = time.perf_counter()
            visit = Visit(browser, address)
            visit.page.wait_for_function("document.querySelectorAll('#curves .area').length === 13")
            print(f"\n{turn} visit: {time.perf_counter() - start:.1f} s until everything was shown", flush=True)
        visit.shows("85000")
        reward = visit.page.locator("#curves .curve").first
        assert readable(last) in reward.locator(".legend").inner_text()
        assert " 20L" in str(reward.locator(".band").get_attribute("d"))  # the one step that reached the top
        box = reward.locator(".area").bounding_box()
        visit.page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 20)
        reward.locator(".tip").wait_for()
        assert reward.locator(".tip").inner_text().startswith("step 84,")
        visit.page.mouse.move(0, 0)
        reward.locator(".tip").wait_for(state="detached")
        assert visit.wrong == []
    finally:
        page.close()


def write_long_run(folder: Path, steps: int) -> float:
    """Write 90 MB of metrics: 30 numbers per step, noise except one step's reward. Return the last reward."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"steps": steps}))
    keys = [key for curve in CURVES for key in KEYS.get(curve.title, [curve.keys])]
    keys += [f"my/number_{index}" for index in range(30 - len(keys))]
    noise = np.random.default_rng(0).random(steps)
    noise[steps // 3] = 9.0
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step} | dict.fromkeys(keys, float(noise[step - 1]))) + "\n")
    return float(noise[-1])


def test_curves_move_while_a_run_is_training(tmp_path: Path, browser: Any) -> None:
    flags = arguments(tmp_path, "runs/live", steps=400, save_every=0, eval_every=0, **{"scoring.workers": 0})
    training = subprocess.Popen(
        [sys.executable, "launch/train.py", *flags], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    page = None
    try:
        metrics = tmp_path / "runs" / "live" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert training.poll() is None, training.stderr.read().decode()  # type: ignore[union-attr]
            time.sleep(0.5)
        page, address = serve(tmp_path / "runs", tmp_path / "feedback.jsonl", block=False)
        visit = Visit(browser, address)
        step = visit.page.locator("#numbers .number b").first
        curve = visit.page.locator("#curves .plot").first
        curve.wait_for()
        before, drawn = step.inner_text(), curve.screenshot()
        visit.page.wait_for_function(
            "before => (document.querySelector('#numbers .number b')?.innerText ?? before) !== before",
            arg=before,
        )
        for _ in range(PATIENCE // 500):  # the curve is drawn a moment after the numbers
            if curve.screenshot() != drawn:
                break
            visit.page.wait_for_timeout(500)
        assert curve.screenshot() != drawn
        assert int(before.split(" /")[0]) < int(step.inner_text().split(" /")[0]) <= 400
        assert visit.wrong == []
    finally:
        training.kill()
        training.wait()
        if page is not None:
            page.close()
