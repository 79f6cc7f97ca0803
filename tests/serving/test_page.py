"""The page in a real browser: what it shows is what the API answers, live and saved, for every reader."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from conftest import PATIENCE, eventually
from stand_ins.http_server import serving
from stand_ins.vision import as_bytes, picture, write_vision_checkpoint

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.cli import main
from nemodiff.runtime.batching.batch import Batch
from nemodiff.runtime.events.events import as_dict
from nemodiff.runtime.planning.cost import CostCurve
from nemodiff.runtime.planning.pass_costs import PassCosts
from nemodiff.serving.http.page_export import PAGE, html

playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright: pip install "nemodiff[test]"')
expect = playwright.expect
expect.set_options(timeout=PATIENCE * 1000)
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; install it: scripts/debian-packages")

PROMPT = "Write JSON for Emil, age 31, from Oslo, who owns a yak."
DROP = """(data) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], "picture.png", { type: "image/png" }));
  document.querySelector("form").dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
}"""
HOSTILE = ["<img src=x onerror=hacked=1>", "</script><script>hacked=1</script>", "<!--<script>", "${hacked=1}'\"&lt;"]
FIGURES = ("tokens", "passes", "perPass", "perSecond", "accepted", "ms")
CONTRAST = """() => {
  const dot = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    dot.clearRect(0, 0, 1, 1);
    for (const colour of colours) { dot.fillStyle = colour; dot.fillRect(0, 0, 1, 1); }
    return [...dot.getImageData(0, 0, 1, 1).data].slice(0, 3).map((c) => c / 255);
  };
  const light = (rgb) => rgb.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!(hasText || element.dataset.mark) || !element.checkVisibility()) continue;
    const backgrounds = [];
    for (let e = element; e; e = e.parentElement) backgrounds.unshift(getComputedStyle(e).backgroundColor);
    const text = getComputedStyle(element, element.dataset.mark ? "::after" : null);
    const [a, b] = [light(over([...backgrounds, text.color])), light(over(backgrounds))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, parseFloat(text.fontSize), `${element.className} ${element.textContent.slice(0, 30)}`]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def engine(tiny_engine: Path) -> nemodiff.LoadedEngine:
    engine = nemodiff.load(tiny_engine, threads=1)
    # Fixed costs: where tokens are dear, as on a busy machine, quadratic_spec plans without drafts.
    costs = PassCosts(CostCurve(sizes=(1, 512), times=(1.0, 3.0)))
    vars(costs)["learn"] = lambda size, seconds: None
    vars(engine)["cost"] = costs
    return engine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(engine: nemodiff.LoadedEngine) -> Iterator[tuple[str, nemodiff.Scheduler]]:
    """The address of `nemodiff serve`, and its scheduler."""
    uvicorn = pytest.importorskip("uvicorn", reason='needs the serve extra: pip install "nemodiff[serve]"')
    from nemodiff.serving.http.app import Limits, Server

    with nemodiff.Scheduler(engine, rows=4) as scheduler:
        app = Server(engine, scheduler, Limits(), "tiny-chat", {"mode": "linear_spec"}).app
        process = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=process.run)
        thread.start()
        while not process.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{process.servers[0].sockets[0].getsockname()[1]}/", scheduler
        process.should_exit = True
        thread.join()


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page that must not complain, and must ask only its own server; its settings are the parameter."""
    settings = {"reduced_motion": "reduce", "viewport": {"width": 1280, "height": 800}} | getattr(request, "param", {})
    context = browser.new_context(**settings)
    page = context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    complaints: list[str] = []
    urls: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    yield page
    allowed = re.compile(r"(http://127\.0\.0\.1:\d+/|blob:http://127\.0\.0\.1:|file:///|data:)")
    assert [url for url in urls if not allowed.match(url)] == []
    assert sum(url.startswith("file:") for url in urls) <= 1
    assert [c for c in complaints if "Failed to load resource" not in c] == []
    context.close()


def run_live(page: Page, address: str, prompt: str = PROMPT) -> None:
    page.goto(address)
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Quadratic self-speculation").check()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#note")).to_have_text("Finished")


def lanes(page: Page) -> list[dict[str, Any]]:
    """What every lane shows."""
    shown: list[dict[str, Any]] = page.evaluate(
        """() => [...document.querySelectorAll(".lane")].map((lane) => ({
          mode: lane.querySelector(".mode").textContent,
          text: [...lane.querySelectorAll(".answer .token:not([hidden])")].map((t) => t.textContent).join(""),
          tokens: lane.querySelectorAll(".answer .token:not([hidden])").length,
          tail: [...lane.querySelectorAll(".tail .token")].map((t) => t.className.split(" ")[1]),
          masks: [...lane.querySelectorAll(".tail .mask")].map((t) => t.textContent + (t.dataset.mark ?? "")).join(""),
          kept: lane.querySelectorAll(".token.kept").length,
          figures: Object.fromEntries([...lane.querySelectorAll("[data-figure]")].map(
            (d) => [d.dataset.figure, d.dataset.value === "" ? null : Number(d.dataset.value)])),
          pass: lane.querySelector(".pass").textContent,
        }))"""
    )
    return shown


def figures(generation: dict[str, Any]) -> dict[str, Any]:
    tokens = len(generation["token_ids"])
    ms = generation["timings_ms"]["total"]
    passes = sum(generation["nfe"].values())
    values = tokens, passes, generation["decode_tpf"], tokens / ms * 1e3, generation["acceptance"]["mean"], ms
    return dict(zip(FIGURES, values, strict=True))


def write_trace(path: Path, answer: list[str | bytes], *, passes: int | None = None) -> list[dict[str, Any]]:
    """A trace of mode ar whose tokens, from id 0, are as given; each pass decides as many."""
    many = 1 if passes is None else len(answer) // passes
    common = {"request": 0, "at": 0.0}
    text = {i: piece for i, piece in enumerate(answer) if isinstance(piece, str)}
    parts = {i: piece.hex() for i, piece in enumerate(answer) if isinstance(piece, bytes)}
    events: list[dict[str, Any]] = [
        {
            **common,
            "event": "started",
            "mode": "ar",
            "block_length": 32,
            "prompt_tokens": 1,
            "reused_tokens": 0,
            "prompt": [0],
            "mask_id": -1,
        },
        {**common, "event": "pieces", "text": text, "bytes": parts, "special": {}},
    ]
    for first in range(0, len(answer), many):
        decided = [{"position": 1 + i, "token": i, "confidence": i % 10 / 10} for i in range(first, first + many)]
        step = {"event": "step", "seconds": 0.001, "rows": 1, "kind": "decode", "start": first, "before": [0]}
        step |= {"after": [first], "confidence": [0.5], "committed": decided, "emitted": first + many}
        events.append({**common, **step, "at": first / many * 0.001, "kept": None, "refused": []})
    whole = b"".join(p if isinstance(p, bytes) else p.encode() for p in answer).decode(errors="replace")
    generation = {"text": whole, "token_ids": list(range(len(answer))), "finish_reason": "stop", "mode": "ar"}
    generation |= {"nfe": {"decode": len(answer) // many}, "decode_tpf": float(many), "acceptance": {"mean": None}}
    events.append({**common, "event": "finished", "generation": {**generation, "timings_ms": {"total": 5.0}}})
    path.write_text(html([("made", events)]))
    return events


def test_live_runs_show_the_answers_and_figures_of_the_api(
    page: Page, server: tuple[str, nemodiff.Scheduler], engine: nemodiff.LoadedEngine
) -> None:
    page.add_init_script("""addEventListener("DOMContentLoaded", () => {
      const push = Run.prototype.push;
      globalThis.pushed = {};
      Run.prototype.push = function (event) { (pushed[this.name] ??= []).push(event); push.call(this, event); };
    })""")
    run_live(page, server[0])
    runs = page.evaluate("pushed")
    seen = lanes(page)
    assert len(seen) == len(runs) == 4
    for lane, mode in zip(seen, nemodiff.MODES, strict=True):
        events = runs[mode]
        generation = events[-1]["generation"]
        assert lane["text"] == generation["text"] == nemodiff.generate(engine, PROMPT, mode=mode).text
        assert lane["figures"] == figures(generation)
        counted, ids = page.evaluate(
            "events => { const run = new Run(); events.slice(0, -1).forEach((e) => run.push(e));"
            "return [run.metrics(run.passes.length), run.answer.map((token) => token.id)]; }",
            events,
        )
        assert ids == generation["token_ids"]
        exact = ("tokens", "passes", "perPass", "accepted")
        assert {k: counted[k] for k in exact} == {k: figures(generation)[k] for k in exact}
        assert counted["nfe"] == {kind: n for kind, n in generation["nfe"].items() if n}


def test_what_a_merged_commit_decides_has_its_confidence(
    page: Page, engine: nemodiff.LoadedEngine, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"mode": "diffusion", "merge_commit": True, "block_length": 8, "max_new_tokens": 60}
    events = [as_dict(event) for event in nemodiff.events(engine, [PROMPT], steps=True, **options)]
    (tmp_path / "run.html").write_text(html([("merged", events)]))
    page.goto((tmp_path / "run.html").as_uri())
    tokens = page.evaluate(
        "events => { const run = new Run(); events.forEach((e) => run.push(e));"
        "return run.answer.map((token) => [token.id, token.confidence]); }",
        json.loads(json.dumps(events)),
    )
    assert any(e.get("kind") == "commit" and len(e["committed"]) > 1 for e in events)
    ends = engine.info.model.eos_ids
    assert [id for id, confidence in tokens if confidence is None and id not in ends] == []


def test_scrubbing_with_slider_and_keys_follows_every_pass(page: Page, server: tuple[str, nemodiff.Scheduler]) -> None:
    run_live(page, server[0], "Count from 3 to 9.")
    slider = page.get_by_label("Moment")
    end = lanes(page)
    slider.focus()
    page.keyboard.press("Home")
    expect(page.locator("#where")).to_have_text("start")
    assert [lane["tokens"] for lane in lanes(page)] == [0] * 4
    states: set[str] = set()
    refused = kept = beside = 0
    last = int(slider.get_attribute("max") or 0)
    for moment in range(1, last):
        page.keyboard.press("ArrowRight")
        expect(page.locator("#where")).to_have_text(f"pass {moment} of {last - 1}")
        for now, whole in zip(lanes(page), end, strict=True):
            assert whole["text"].startswith(now["text"])
            assert now["figures"]["tokens"] == now["tokens"]
            states.update(now["tail"])
            assert now["masks"] == ""
            verdict = re.match(r"Pass \d+, verify: (\d+) drafted kept, (\d+) refused", now["pass"])
            if verdict:
                assert now["kept"] == int(verdict[1])
                assert ("refused" in now["tail"]) == bool(int(verdict[2]))  # nothing is shown after a refused end
                assert now["tail"].count("refused") <= int(verdict[2])
                drafts = now["tail"].count("draft")  # the next ones, which a quadratic pass makes beside its verdict
                assert now["tail"].count("refused") + drafts == len(now["tail"])
                assert not drafts or now["mode"] == "Quadratic self-speculation"
                beside += drafts
                kept, refused = kept + now["kept"], refused + now["tail"].count("refused")
    assert states >= {"draft", "mask", "ahead", "refused"}
    assert min(kept, refused, beside) > 0
    page.keyboard.press("ArrowRight")
    assert lanes(page) == end
    slider.fill("1")
    assert [lane["figures"]["passes"] for lane in lanes(page)] == [1] * 4
    page.get_by_label("by time").check()
    slider.focus()
    page.keyboard.press("Home")
    done = [0] * 4
    for _ in range(int(slider.get_attribute("max") or 0)):
        page.keyboard.press("ArrowRight")
        now = [lane["figures"]["passes"] for lane in lanes(page)]
        assert all(a <= b for a, b in zip(done, now, strict=True))
        assert now != done or lanes(page) == end
        done = now
    assert lanes(page) == end


def test_tokens_tell_about_themselves_by_keyboard(page: Page, server: tuple[str, nemodiff.Scheduler]) -> None:
    run_live(page, server[0])
    page.locator(".text").nth(2).focus()
    for key, known in (("ArrowRight", '"{": confidence '), ("ArrowRight", r'"\n ": '), ("ArrowLeft", '"{": ')):
        page.keyboard.press(key)
        expect(page.locator(".readout").nth(2)).to_contain_text(known)
    expect(page.locator(".readout").nth(2)).to_contain_text("decided in pass 1 (prefill)")


@pytest.mark.parametrize("page", [{"reduced_motion": "no-preference"}], indirect=True)
def test_a_run_too_quick_to_see_is_replayed_where_motion_is_welcome(
    page: Page, server: tuple[str, nemodiff.Scheduler]
) -> None:
    run_live(page, server[0])
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Replay")).to_be_visible()
    assert lanes(page)[0]["figures"]["passes"] < 38
    page.get_by_label("Speed").select_option("60 passes/s")
    page.get_by_role("button", name="Replay").click()
    expect(page.locator("#where")).to_have_text("end")


def test_enter_sends_the_prompt_and_shift_enter_makes_a_line(
    page: Page, server: tuple[str, nemodiff.Scheduler]
) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.url.endswith("/events") else None)
    page.goto(server[0])
    title = page.get_by_role("button", name="Run").get_attribute("title")
    assert title == "Enter sends the prompt, Shift+Enter makes a new line"
    prompt = page.get_by_label("Prompt")
    prompt.fill("Count from")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("3 to 9.")
    expect(prompt).to_have_value("Count from\n3 to 9.")
    keyboard = page.context.new_cdp_session(page)
    keyboard.send("Input.imeSetComposition", {"text": "に", "selectionStart": 1, "selectionEnd": 1})
    page.keyboard.press("Enter")  # it accepts the word of the input method
    keyboard.send("Input.insertText", {"text": "に"})
    expect(page.locator("#runs")).to_be_hidden()
    assert sent == []
    written = prompt.input_value()
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_have_text("Finished")
    assert len(sent) == 3
    expect(prompt).to_have_value(written)


def test_cancel_stops_the_requests_on_the_server(
    page: Page, server: tuple[str, nemodiff.Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Batch.step

    steps = itertools.count()

    def slow(batch: Batch) -> Any:
        time.sleep(0.05 if next(steps) < 12 else 1)  # so that a slow browser has a minute
        return step(batch)

    monkeypatch.setattr(Batch, "step", slow)
    address, scheduler = server
    before = scheduler.statistics.cancelled
    page.goto(address)
    page.get_by_label("Prompt").fill("Count from 1 to 40.")
    page.get_by_label("Diffusion").uncheck()
    page.get_by_label("Self-speculation", exact=True).uncheck()
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".answer .token").nth(3)).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#note")).to_have_text("Cancelled")
    expect(page.locator(".status")).to_have_text("cancelled")
    eventually(lambda: scheduler.statistics.running == 0)
    assert scheduler.statistics.cancelled == before + 1
    assert 3 < lanes(page)[0]["tokens"] < 60
    expect(page.get_by_label("Moment")).to_be_visible()


def test_what_goes_wrong_is_one_line(page: Page, server: tuple[str, nemodiff.Scheduler]) -> None:
    page.goto(server[0])
    error = page.get_by_role("alert").first
    page.get_by_text("Options").click()
    page.get_by_label("Most tokens").fill("100000")
    page.get_by_role("button", name="Run").click()
    expect(error).to_contain_text("max_tokens is 100000")
    assert "\n" not in error.inner_text()
    expect(page.locator(".lane")).to_have_count(0)
    page.get_by_label("Most tokens").fill("")
    page.get_by_label("Prompt").fill(" ")
    page.get_by_role("button", name="Run").click()
    expect(error).to_have_text("Type a prompt first.")
    page.get_by_label("Prompt").fill("")
    page.get_by_label("Prompt").focus()
    page.keyboard.insert_text("7, " * 50_000)  # as by pasting, where a limit of the field would cut it silently
    assert len(page.get_by_label("Prompt").input_value()) == 150_000
    page.get_by_role("button", name="Run").click()
    expect(error).to_contain_text("the prompt is too long")
    page.get_by_label("Prompt").fill("hi")
    page.route("**/events", lambda route: route.abort())
    page.get_by_role("button", name="Run").click()
    expect(error).to_have_text("no answer; is nemodiff serve running?")
    page.unroute("**/events")
    body = 'data: {"error": {"message": "the engine\\nfailed"}}\n\n'
    page.route("**/events", lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body))
    page.get_by_role("button", name="Run").click()
    expect(error).to_have_text("the engine failed")
    page.unroute("**/events")
    page.route("**/events", lambda route: route.fulfill(status=401, body='{"error": {"message": "no valid key"}}'))
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_label("API key")).to_be_visible()


@pytest.mark.parametrize("page", [{"viewport": {"width": 320, "height": 640}, "has_touch": True}], indirect=True)
def test_a_small_screen_scrolls_down_only(page: Page, server: tuple[str, nemodiff.Scheduler]) -> None:
    page.goto(server[0])
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        run_live(page, server[0])
    page.get_by_label("Moment").fill("2")
    page.get_by_text("Options").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    for name in ("Run", "Replay", "Save as HTML"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box is not None
        assert box["height"] >= 40
        assert 0 <= box["x"] <= 320 - box["width"]


@pytest.mark.parametrize("page", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True, ids=str)
def test_text_is_large_and_has_contrast_in_light_and_dark(
    page: Page, server: tuple[str, nemodiff.Scheduler], tmp_path: Path
) -> None:
    run_live(page, server[0], "Count from 3 to 9.")
    for moment in ("2", "3", "4"):
        page.get_by_label("Moment").fill(moment)
        measured = page.evaluate(CONTRAST)
        assert len(measured) > 60
        assert [f for f in measured if f[0] < 4.5 or f[1] < 14 * 0.87] == []
    write_trace(tmp_path / "out.html", [f"{i} " for i in range(10)])  # every colour
    page.goto((tmp_path / "out.html").as_uri())
    assert {f"c{i}" for i in range(4)} <= {c for f in page.evaluate(CONTRAST) for c in f[2].split()}
    assert [f for f in page.evaluate(CONTRAST) if f[0] < 4.5] == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == page.evaluate(
        "matchMedia('(prefers-color-scheme: dark)').matches"
    )


def test_names_labels_and_order_for_assistive_technology(page: Page, server: tuple[str, nemodiff.Scheduler]) -> None:
    run_live(page, server[0])
    assert page.locator("html").get_attribute("lang") == "en"
    page.get_by_text("Options").click()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, [role], section, form, article")]
          .filter((e) => e.checkVisibility() && !["status", "alert"].includes(e.role))
          .filter((e) => !(e.labels?.[0]?.textContent.trim() || e.ariaLabel ||
            (e.tagName === "BUTTON" && e.textContent.trim()))).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map((e) => e.id)).size") == page.evaluate(
        "document.querySelectorAll('[id]').length"
    )
    page.get_by_label("Prompt").focus()
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        outline = page.evaluate(
            "e => { const f = document.activeElement, o = (x) => x && getComputedStyle(x).outlineStyle;"
            "return f === document.body || o(f) !== 'none' || o(f.closest('label')) !== 'none'; }"
        )
        assert outline, reached[-1]
    assert {"run", "text", "play", "moment", "speed", "save"} <= set(reached)
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#note")).to_have_text("Finished")


def test_exported_traces_open_from_a_file(page: Page, tiny_engine: Path, tmp_path: Path) -> None:
    files, answers = [], []
    for mode in ("diffusion", "linear_spec", "auto"):
        files.append(str(tmp_path / f"{mode}.jsonl"))
        command = ["run", str(tiny_engine), "-p", PROMPT, "--mode", mode, "--json", "--trace", files[-1]]
        answers.append(json.loads(CliRunner().invoke(main, command).stdout))
    out = tmp_path / "out.html"
    result = CliRunner().invoke(main, ["trace", "view", *files, "-o", str(out)])
    assert (result.exit_code, result.stdout) == (0, "")
    page.goto(out.as_uri())
    seen = lanes(page)
    assert [lane["text"] for lane in seen] == [answer["text"] for answer in answers]
    assert [lane["figures"] for lane in seen] == [figures(answer) for answer in answers]
    assert page.locator(".lane .mode").all_inner_texts() == ["Diffusion", "Self-speculation", "Automatic"]
    expect(page.locator("#shared-prompt .prompt")).to_contain_text(PROMPT)
    expect(page.locator("form")).to_have_count(0)
    page.get_by_label("Moment").fill("1")
    assert [lane["figures"]["passes"] for lane in lanes(page)] == [1] * 3
    assert out.stat().st_size < 300_000


def test_many_requests_of_one_trace_stand_side_by_side(page: Page, tiny_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Count from {i} to 9."}) + "\n" for i in (2, 5, 7))
    )
    trace = str(tmp_path / "t.jsonl")
    command = [
        "run",
        str(tiny_engine),
        "--input-file",
        str(tmp_path / "in.jsonl"),
        "--batch-size",
        "2",
        "--trace",
        trace,
    ]
    printed = CliRunner().invoke(main, command).stdout.splitlines()
    lines = Path(trace).read_text().splitlines()
    Path(trace).write_text("\n".join(lines[:-1]) + "\n")  # as if it had been killed
    CliRunner().invoke(main, ["trace", "view", trace, "-o", str(tmp_path / "out.html")])
    page.goto((tmp_path / "out.html").as_uri())
    assert [lane["text"] for lane in lanes(page)] == printed
    for number, first in enumerate((2, 5, 7)):
        lane = page.locator(".lane").nth(number)
        expect(lane.locator(".prompt")).to_contain_text(f"Count from {first} to 9.")
        expect(lane.locator(".which")).to_have_text(f"request {number}")
    assert page.locator(".status").all_inner_texts().count("not finished") == 1


def test_a_live_run_is_saved_as_the_same_file(
    page: Page, server: tuple[str, nemodiff.Scheduler], tmp_path: Path
) -> None:
    run_live(page, server[0])
    live = lanes(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as HTML").click()
    download.value.save_as(tmp_path / "saved.html")
    page.goto((tmp_path / "saved.html").as_uri())
    assert lanes(page) == live
    expect(page.locator("form")).to_have_count(0)


def test_calls_and_warnings_stand_beside_the_text(page: Page, xml_tool_engine: Path, tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "format": "town"}, "n": {"enum": [HOSTILE[0]]}},
    }
    tool = {"type": "function", "function": {"name": "weather", "parameters": {**schema, "required": ["n"]}}}
    loaded = nemodiff.load(xml_tool_engine, threads=1)
    options: dict[str, Any] = {"tools": [tool], "tool_choice": "weather", "max_new_tokens": 300}
    events = [as_dict(event) for event in nemodiff.events(loaded, [PROMPT], steps=True, **options)]
    generation = events[-1]["generation"]
    (tmp_path / "run.html").write_text(html([("calls", events)]))
    page.goto((tmp_path / "run.html").as_uri())
    shown = page.get_by_label("Calls of tools").get_by_role("listitem").all_text_contents()
    (call,) = generation["tool_calls"]
    assert [(text.split(" ")[0], json.loads(text.partition(" ")[2])) for text in shown] == [
        ("weather", json.loads(call["arguments"]))
    ]
    warnings = page.get_by_label("Warnings").get_by_role("listitem").all_text_contents()
    assert warnings == generation["warnings"] != []
    assert "<tool_call>" in lanes(page)[0]["text"]
    assert page.evaluate("[typeof hacked, document.images.length]") == ["undefined", 0]


def test_a_picture_is_dropped_shown_and_folded(page: Page, tmp_path: Path) -> None:
    engine = Builder(write_vision_checkpoint(tmp_path / "checkpoint"), tmp_path / "seeing").run()
    data = base64.b64encode(as_bytes(picture(30, 20))).decode()
    with serving(engine) as served:
        page.goto(served.url + "/")
        for _ in range(2):
            page.evaluate(DROP, data)
        pictures = page.get_by_title("Take this picture away")
        expect(pictures).to_have_count(2)
        assert (pictures.first.get_by_role("img").bounding_box() or {})["height"] >= 48  # however small the picture is
        pictures.first.click()
        expect(pictures).to_have_count(1)
        page.get_by_text("Options", exact=True).click()
        page.get_by_label("Most tokens").fill("4")
        page.get_by_label("Prompt").first.fill("What is this?")
        page.keyboard.press("Enter")
        expect(page.locator("#note")).to_have_text("Finished")
        with page.expect_download() as download:
            page.get_by_role("button", name="Save as HTML").click()
        download.value.save_as(tmp_path / "saved.html")
    page.goto((tmp_path / "saved.html").as_uri())
    marks = page.locator("#shared-prompt [data-mark]").evaluate_all("spans => spans.map(span => span.dataset.mark)")
    image = [mark for mark in marks if "image" in mark or "more" in mark]
    assert [image[0], image[-1]] == ["<|image_start|>", "<|image_end|>"]
    assert re.fullmatch(r"\d+\smore", image[1])
    assert len(image) == 3


def test_hostile_text_of_a_model_is_text(page: Page, tmp_path: Path) -> None:
    write_trace(tmp_path / "out.html", list(HOSTILE))
    page.goto((tmp_path / "out.html").as_uri())
    assert lanes(page)[0]["text"] == "".join(HOSTILE)
    for beside in (".calls", ".warnings"):
        expect(page.locator(beside)).to_be_hidden()
    page.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".readout")).to_contain_text("onerror")
    assert page.evaluate("[typeof hacked, document.images.length]") == ["undefined", 0]
    assert page.locator("script").count() == len(list(PAGE.glob("*.js"))) + 1


def test_characters_in_several_tokens_appear_when_they_are_whole(page: Page, tmp_path: Path) -> None:
    parrot = "🦜".encode()
    write_trace(tmp_path / "out.html", ["a ", parrot[:2], parrot[2:], "!", "é".encode()[:1]])
    page.goto((tmp_path / "out.html").as_uri())
    assert lanes(page)[0]["text"] == "a 🦜!�"
    shown = []
    for moment in range(5):
        page.get_by_label("Moment").fill(str(moment))
        shown.append(lanes(page)[0]["text"])
    assert shown == ["", "a ", "a ", "a 🦜", "a 🦜!"]


def test_a_step_of_a_long_run_touches_a_few_tokens(page: Page, tmp_path: Path) -> None:
    """2000 tokens in 1000 passes: what a step of the slider changes does not grow with the run."""
    write_trace(tmp_path / "out.html", [f"word{i} " for i in range(2000)], passes=1000)
    page.goto((tmp_path / "out.html").as_uri())
    page.get_by_label("Moment").fill("600")
    assert lanes(page)[0]["tokens"] == 1200
    changes = page.evaluate(
        """async () => {
          let count = 0;
          const watch = new MutationObserver((seen) => (count += seen.length));
          watch.observe(document.body, { subtree: true, attributes: true, childList: true, characterData: true });
          const slider = document.getElementById("moment");
          slider.value = 601;
          slider.dispatchEvent(new Event("input"));
          await new Promise(requestAnimationFrame);
          return count;
        }"""
    )
    assert lanes(page)[0]["tokens"] == 1202
    assert changes < 60
