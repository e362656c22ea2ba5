"""The page of `pftsleep serve` in a real browser, against the real server."""
import base64
import json
import re
import shutil
import time
import zlib
from datetime import datetime, timedelta

import pandas as pd
import pyedflib
import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra 'dev')")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")

from serving import Running, night_edf, registry_with, week_values

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NIGHT = dict(name="night.edf", mimeType="application/octet-stream", buffer=b"")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with Running(registry_with(folder), folder / "data") as running: yield running


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(server, browser):
    "Opens pages; afterwards: nothing was asked of others, and no script failed."
    contexts, urls, errors = [], [], []
    def opened(role=None, **options):
        context = browser.new_context(accept_downloads=True, **{"viewport": {"width": 1200, "height": 900}, **options})
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda r: urls.append(r.url))
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") and "Failed to load resource" not in m.text else None) # Chromium says that of every refusal
        page.goto(server.url)
        if role: sign_in(page, server.key(role))
        return page
    yield opened
    for context in contexts: context.close()
    assert urls and all(u.startswith((server.url + "/", f"blob:{server.url}/")) for u in urls), urls
    assert not errors, errors


@pytest.fixture(scope="module")
def staged(server):
    "A finished night, ten epochs long."
    from serving import finished
    with server.client("clinician") as client:
        sent = client.post("/v1/nights?model=stages", content=night_edf())
        assert sent.status_code == 202, sent.text
        assert finished(client, sent.json()["id"])["state"] == "done"
    return sent.json()["id"]


def sign_in(page, key):
    page.fill("#key", key)
    page.keyboard.press("Enter")
    until(page, "!document.getElementById('main').hidden && document.getElementById('model-night').value")


def until(page, condition, argument=None):
    "As `wait_for_function`, which the page's policy forbids: it would evaluate text."
    end = time.monotonic() + 20
    while not page.evaluate(condition, argument):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def focused(page): return page.evaluate("document.activeElement.id || document.activeElement.tagName")


def open_night(page, id):
    page.focus(f"#job-{id} button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#night:not([hidden])")


def cells(page, table): return {row.locator("th").inner_text(): row.locator("td").first.inner_text() for row in page.locator(f"#{table} tbody tr").all()}


def drop(page, zone, name, data):
    "As somebody does who drags a file from a folder."
    transfer = page.evaluate_handle("""([name, data]) => { const t = new DataTransfer(), raw = Uint8Array.from(atob(data), c => c.charCodeAt(0)); t.items.add(new File([raw], name)); return t; }""", [name, base64.b64encode(data).decode()])
    for event in ("dragover", "drop"): page.dispatch_event(zone, event, {"dataTransfer": transfer})


def week_csv(column="counts", gap=()):
    start, values = datetime(2026, 3, 2, 9), [("" if i in gap else v) for i, v in enumerate(week_values())]
    return (f"timestamp,{column}\n" + "".join(f"{start + timedelta(minutes=i):%Y-%m-%dT%H:%M:%S},{v}\n" for i, v in enumerate(values))).encode()


def ink(page, canvas): return page.evaluate("id => { const c = document.getElementById(id); return new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size; }", canvas)


def test_signing_in_and_out(visit, server, staged):
    page = visit()
    assert focused(page) == "key" and page.is_hidden("#main")
    page.keyboard.type("pfts_000000000000_" + "A" * 43)
    page.keyboard.press("Enter")
    page.wait_for_selector("#message.error")
    assert page.is_hidden("#main") and focused(page) == "key" and page.evaluate("sessionStorage.length") == 0
    sign_in(page, server.key("clinician"))
    assert focused(page) == "main" and page.inner_text("#whoami") == "main: clinician" and "not a medical device" in page.inner_text("#statement")
    assert server.key("clinician") not in page.content()
    page.reload()
    page.wait_for_selector("#main:not([hidden])") # the key lives as long as the tab
    open_night(page, staged)
    page.click("#sign-out")
    assert focused(page) == "key" and page.evaluate("sessionStorage.length") == 0 and page.is_hidden("#main")
    left = page.inner_html("#main")
    assert staged not in left and "epochs of" not in left and "Total sleep time" not in left and page.evaluate("night.result") is None and ink(page, "hypnogram") == 1


def test_what_a_role_may_not_do_is_not_offered(visit, staged):
    page = visit("auditor")
    assert page.is_hidden("#drop-night") and page.is_hidden("#drop-week") and page.is_hidden("#jobs") and "may neither" in page.inner_text("#message")
    page = visit("researcher")
    open_night(page, staged)
    assert page.is_hidden("#scores") and page.is_hidden("#correct-help")
    page.focus("#night-view")
    page.keyboard.press("u")
    assert page.evaluate("night.result.corrections.length") == 0


def test_a_night_from_file_to_exports(visit, server):
    page = visit("clinician")
    page.fill("#channels-night", "C4-M1=C4-M1, ")
    drop(page, "#drop-night", "first.edf", night_edf(seed=1))
    entry = page.locator("#job-list li", has_text="first.edf")
    sync_api.expect(entry.locator("progress")).to_be_visible()
    sync_api.expect(entry).to_contain_text("done", timeout=60_000)
    sync_api.expect(page.locator("#message")).to_have_text("first.edf is staged.")
    entry.locator("button").press("Enter")
    page.wait_for_selector("#night:not([hidden])")
    sync_api.expect(page.locator("#night-title")).to_be_focused()
    assert page.inner_text("#night-title") == "Night from first.edf" and all(ink(page, c) > 10 for c in ("hypnogram", "hypnodensity", "spectrogram"))

    view = page.locator("#night-view")
    page.keyboard.press("Tab")
    sync_api.expect(view).to_be_focused()
    for key, at in (("ArrowRight", 2), ("ArrowRight", 3), ("End", 10), ("ArrowRight", 10), ("ArrowLeft", 9), ("PageUp", 10), ("Home", 1)):
        page.keyboard.press(key)
        assert view.get_attribute("aria-valuenow") == str(at)
    assert page.inner_text("#epoch").startswith("Epoch 1 of 10, 22:30:05: ") and "The model: W" in page.inner_text("#epoch")
    box = page.locator("#hypnogram").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 20)
    assert page.inner_text("#epoch").startswith("Epoch 10 of 10") and view.get_attribute("aria-valuenow") == "1" # pointing only tells
    page.mouse.move(5, 5)

    before, stages = cells(page, "statistics"), page.evaluate("night.result.stages")
    scored = ["N2", "REM"] + ["W"] * 8
    for i, stage in enumerate(scored):
        page.keyboard.press({"N2": "2", "REM": "r", "W": "w"}[stage])
        until(page, "([i, s]) => !night.busy && night.result.stages[i] === s", [i, stage])
        sync_api.expect(view).to_be_focused()
        page.keyboard.press("ArrowRight")
    after = cells(page, "statistics")
    assert after["Total sleep time"] == "1 min" and after["Time in N2"] == "0.5 min" and after["Sleep efficiency"] == "20 %" and after != before
    changed = [i for i, s in enumerate(stages) if s != scored[i]]
    assert page.locator("#corrections li").count() == len(changed) > 1 and f"{len(changed)} epochs corrected" in page.inner_text("#night-summary")
    page.focus('#scores [data-stage="N3"]')
    page.keyboard.press("Enter")
    until(page, "night.result.stages[9] === 'N3' && !night.busy")
    assert page.evaluate("document.activeElement.dataset.stage") == "N3" and page.get_attribute('#scores [data-stage="N3"]', "aria-pressed") == "true"
    wanted = [*scored[:9], "N3"]

    saved = {}
    for format in ("csv", "edf", "pdf", "json"):
        with page.expect_download() as got: page.click(f'[data-format="{format}"]')
        assert got.value.suggested_filename == f"night-{page.evaluate('night.id')}.{format}"
        saved[format] = got.value.path()
    assert pd.read_csv(saved["csv"])["stage"].tolist() == wanted and pd.read_csv(saved["csv"])["model_stage"].tolist() == stages
    assert json.loads(saved["json"].read_text())["stages"] == wanted
    with pyedflib.EdfReader(str(saved["edf"])) as f: texts = f.readAnnotations()[2]
    assert [t.removeprefix("Sleep stage ") for t in texts if "stage" in t][:1] == ["N2"] and any("N3" in t for t in texts)
    pdf = saved["pdf"].read_bytes()
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", pdf)) == 2 and any(b"BT" in zlib.decompress(s) for s in re.findall(rb"FlateDecode.*?stream\r?\n(.*?)\r?\nendstream", pdf, re.S) if s[:1] == b"x")


def test_a_file_that_is_no_night(visit):
    page = visit("clinician")
    page.set_input_files("#file-night", files=[dict(name="holiday.edf", mimeType="image/png", buffer=b"\x89PNG" * 500)])
    page.wait_for_selector("#message.error")
    assert "EDF" in page.inner_text("#message") and page.locator("#job-list li", has_text="holiday").count() == 0
    page.set_input_files("#file-week", files=[dict(name="week.xlsx", mimeType="x/y", buffer=b"PK")])
    assert page.inner_text("#message").startswith("This is no CSV")
    drop(page, "footer", "lost.edf", b"0")
    assert "one of the two" in page.inner_text("#message") and page.url.rstrip("/").endswith(str(page.url.split(":")[-1].rstrip("/")))


def test_two_people_correct_the_same_night(visit, staged):
    one, two = visit("clinician"), visit("clinician")
    for page in (one, two): open_night(page, staged)
    stage = next(s for s in ("N1", "N2") if one.evaluate("night.result.stages[0]") != s)
    one.click(f'[data-stage="{stage}"]')
    until(one, "night.result.corrections.length === 1")
    two.focus("#night-view")
    two.keyboard.press("ArrowRight")
    two.keyboard.press("u")
    two.wait_for_selector("#message.error")
    assert "Somebody else" in two.inner_text("#message") and focused(two) == "night-view"
    assert two.evaluate("[night.result.corrections.length, night.result.stages[0], night.at]") == [1, stage, 1] # theirs is shown, ours isn't stored
    two.keyboard.press("u")
    until(two, "night.result.corrections.length === 2") # and now it can be


def test_a_week(visit):
    page = visit("clinician")
    page.set_input_files("#file-week", files=[dict(name="week.csv", mimeType="text/csv", buffer=week_csv("value", range(3000, 3120)))])
    page.wait_for_selector("#message.error")
    assert "unit" in page.inner_text("#message") and focused(page) == "unit-week" and page.is_hidden("#week") # nobody guesses it
    page.select_option("#unit-week", "counts")
    page.wait_for_selector("#week:not([hidden])")
    sync_api.expect(page.locator("#week-title")).to_be_focused()
    assert "2026-03-02, 09:00" in page.inner_text("#week-title") and "120 minutes missing" in page.inner_text("#week-about") and "pat 1.0" in page.inner_text("#week-about")
    found = cells(page, "rhythm")
    assert 0 < float(found["Interdaily stability (IS)"]) <= 1 and found["Onset of L5"].count(":") == 1 and ink(page, "actogram") > 10 and "18 minutes" in page.inner_text("#attention")
    view = page.locator("#week-view")
    page.keyboard.press("Tab")
    sync_api.expect(view).to_be_focused()
    for key, at in (("ArrowRight", 2), ("ArrowDown", 26), ("End", 168), ("ArrowUp", 144), ("Home", 1)):
        page.keyboard.press(key)
        assert view.get_attribute("aria-valuenow") == str(at)
    assert page.inner_text("#hour").startswith("Hour from 2026-03-02 09:00: mean activity") and view.get_attribute("aria-valuetext") == page.inner_text("#hour")
    page.evaluate("moveWeek(50)")
    assert "nothing was measured" in page.inner_text("#hour")
    values, bars = week_values(), page.evaluate("week.rhythm.activity.values")
    assert bars[300:312] == [None] * 12 and bars[5] == pytest.approx(sum(values[50:60]) / 10, rel=1e-5)


def test_a_phone_in_the_dark(visit, staged):
    page = visit("clinician", viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True, color_scheme="dark")
    page.set_input_files("#file-week", files=[dict(name="week.csv", mimeType="text/csv", buffer=week_csv())])
    page.wait_for_selector("#week:not([hidden])")
    open_night(page, staged)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    wide = page.evaluate("[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 376 && !e.closest('.pick, thead')).map(e => e.id || e.tagName)")
    assert not wide, wide
    low = page.evaluate("[...document.querySelectorAll('button, select')].filter(e => e.offsetHeight && e.offsetHeight < 36).map(e => e.textContent)")
    assert not low, low # for thumbs
    page.tap("#later")
    assert page.get_attribute("#night-view", "aria-valuenow") == "2"
    assert page.evaluate("color('paper')") == "#14171b"


def test_what_a_screen_reader_is_told(visit, staged):
    page = visit("clinician")
    open_night(page, staged)
    bare = page.evaluate("""[...document.querySelectorAll('input, select, button, [tabindex="0"]')].filter(e => !(e.labels?.length || e.textContent.trim() && e.tagName === 'BUTTON' || e.getAttribute('aria-label'))).map(e => e.outerHTML)""")
    assert not bare, bare
    assert page.evaluate("[...document.querySelectorAll('canvas')].every(c => c.getAttribute('aria-hidden') === 'true')")
    told = page.get_attribute("#night-view", "aria-valuetext")
    assert told.startswith("epoch 1, 22:30:05, ") and told.endswith("% sure")
    assert [e.get_attribute("role") for e in page.locator("#statistics tbody tr").first.locator("> *").all()] == ["rowheader", "cell", "cell"]
    assert page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id).length === new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size")


def contrast(a, b):
    def light(c): return sum(w * (v / 12.92 if v <= .04045 else ((v + .055) / 1.055) ** 2.4) for w, v in zip((.2126, .7152, .0722), (int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)), strict=True))
    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + .05) / (low + .05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, scheme):
    page = visit(color_scheme=scheme)
    colors = {n: (c if len(c) == 7 else "#" + "".join(2 * d for d in c[1:])) for n in ("ink", "paper", "soft", "warn", "strong", "focus", "edge", "bar") if (c := page.evaluate("n => color(n)", n))}
    for front, back, least in (("ink", "paper", 7), ("ink", "soft", 7), ("warn", "paper", 4.5), ("paper", "strong", 4.5), ("focus", "paper", 4.5), ("edge", "paper", 3), ("bar", "paper", 3)):
        assert contrast(colors[front], colors[back]) >= least, (front, back)


def test_the_page_asks_nobody_else():
    "Not even in a comment of the files: no address but its own."
    from pathlib import Path

    import pftsleep
    folder = Path(pftsleep.__file__).parent / "apps" / "web"
    assert {p.name for p in folder.iterdir()} == {"index.html", "style.css", "draw.js", "night.js", "week.js", "app.js", "icon.svg"}
    for path in folder.iterdir():
        text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//[a-z]+\.[a-z]|@import|innerHTML|document\.write|eval\(|localStorage|on(click|load)=", text), path.name
