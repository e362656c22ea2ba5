"""The built site, opened in headless Chromium: no errors, no broken or foreign request, search works, figures are drawn."""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
for folder in ("tools", "docs"): sys.path.insert(0, str(ROOT / folder))

import bench_page
import build
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
    "--no-first-run", "--disable-dev-shm-usage", "--disable-features=OptimizationHints,MediaRouter"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass
    def copyfile(self, source, outputfile):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError): super().copyfile(source, outputfile) # the browser may have left the page


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The site that `make test` has just built; one built here where pytest runs alone."
    if built := os.environ.get("PFTSLEEP_SITE"): return Path(built)
    out = tmp_path_factory.mktemp("site") / "docs"
    subprocess.run([sys.executable, "docs/build.py", "--out", str(out)], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module")
def url(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER): pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1400,1000"]: options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)
    driver.implicitly_wait(10) # an element that is asked for may still be on its way
    yield driver
    driver.quit()


def load(browser, address: str) -> None:
    "Chromium's driver comes back from large pages before all of them is there, on a busy machine."
    from selenium.webdriver.support.wait import WebDriverWait
    browser.get(address)
    WebDriverWait(browser, 60).until(lambda b: b.execute_script("return document.readyState === 'complete' && location.href === arguments[0] && !!document.querySelector('footer')", address))


def pages(site: Path) -> list[str]: return sorted(p for p in (p.relative_to(site).as_posix() for p in site.rglob("*.html")) if not p.startswith("_static"))


def traffic(browser) -> tuple[list[str], list[str]]: # addresses asked for; what went wrong
    "What happened on the network since the last call."
    asked, failed = {}, []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        params = message["params"]
        match message["method"]:
            case "Network.requestWillBeSent": asked[params["requestId"]] = params["request"]["url"]
            case "Network.responseReceived" if params["response"]["status"] >= 400: failed.append(f"{params['response']['status']} {params['response']['url']}")
            case "Network.loadingFailed" if not params.get("canceled"): failed.append(f"{params['errorText']} {asked.get(params['requestId'], '?')}")
    return list(asked.values()), failed


def eager_images(browser) -> None:
    "Pictures below the fold are loaded late; ask for all, and wait."
    browser.execute_async_script("""
        const done = arguments[0], images = [...document.images];
        images.forEach(i => i.loading = "eager");
        Promise.all(images.map(i => i.decode().catch(() => 0))).then(() => done(1));""")


def test_every_page_loads_without_error_and_asks_nobody_else(browser, site, url):
    problems, seen = [], 0
    browser.get("about:blank")
    browser.get_log("performance"), browser.get_log("browser") # what the browser's own first page did
    for page in pages(site):
        load(browser, url + page)
        eager_images(browser)
        asked, failed = traffic(browser)
        seen += any(a == url + page for a in asked)
        foreign = [a for a in asked if not a.startswith((url, "data:", "blob:"))]
        severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        broken = browser.execute_script("return [...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
        problems += [f"{page}: {p}" for p in [*failed, *(f"asked {a}" for a in foreign), *severe, *(f"no picture: {b}" for b in broken)]]
        if not browser.find_elements("css selector", "h1"): problems.append(f"{page}: no heading")
    assert not problems, "\n".join(problems)
    assert seen == len(pages(site)) >= 8 # the log was really read


def test_links_between_pages_lead_somewhere(browser, site, url):
    "Also to the places within pages, which a web server can't refuse."
    targets, broken = {}, []
    for page in pages(site):
        load(browser, url + page)
        targets[page] = browser.execute_script("return [...document.querySelectorAll('[id], [name]')].map(e => e.id || e.name)"), \
            browser.execute_script("return [...document.querySelectorAll('a[href]')].map(a => a.href).filter(h => h.startsWith(arguments[0]))", url)
    for page, (_, links) in targets.items():
        for link in links:
            path, _, place = link.removeprefix(url).partition("#")
            path = path.partition("?")[0] or "index.html"
            if path not in targets and not (site / path).is_file(): broken.append(f"{page} -> {path}")
            elif place and path in targets and place not in targets[path][0]: broken.append(f"{page} -> {path}#{place}")
    assert not broken, "\n".join(sorted(set(broken)))


@pytest.mark.parametrize("name", ["Hypnogram", "read_edf"])
def test_search_finds_a_public_name(browser, url, name):
    from selenium.webdriver.support.ui import WebDriverWait
    browser.get(f"{url}search.html?q={name}")
    hits = lambda b: b.execute_script("return [...document.querySelectorAll('ul.search li a')].map(a => a.href)") # in one go, since they come one after the other
    found = WebDriverWait(browser, 60).until(lambda b: [h for h in hits(b) if h.endswith(f".{name}")], f"no entry of {name}")
    load(browser, found[0])
    shown = browser.find_elements("css selector", f"dt[id$='.{name}']")
    assert shown and shown[0].is_displayed()


def test_a_search_without_hits_says_so(browser, url):
    from selenium.webdriver.support.ui import WebDriverWait
    browser.get(f"{url}search.html?q=zzqqxxyy")
    WebDriverWait(browser, 20).until(lambda b: "did not match any documents" in b.find_element("id", "search-results").text)


def test_the_start_page_shows_a_figure_and_the_wings(browser, url):
    from selenium.webdriver.support.ui import WebDriverWait
    load(browser, f"{url}index.html")
    eager_images(browser)
    figures = browser.execute_script("return [...document.querySelectorAll('.cell_output img')].map(i => [i.naturalWidth, i.getBoundingClientRect().width])")
    assert figures and all(natural > 100 and shown > 100 for natural, shown in figures), figures
    cards = browser.find_elements("css selector", ".wings .sd-card")
    assert len(cards) >= 3
    cards[0].click()
    WebDriverWait(browser, 20).until(lambda b: b.current_url.endswith("/data/index.html"))


def test_parameters_are_a_table_with_meanings(browser, url):
    load(browser, f"{url}data/recording.html")
    table = browser.find_element("xpath", "//dt[contains(@id, '.array_channel')]/following-sibling::dd//table")
    rows = {row.find_element("css selector", "td").text: [cell.text for cell in row.find_elements("css selector", "td")] for row in table.find_elements("css selector", "tbody tr")}
    assert rows["fs"] == ["fs", "float", "Hz"]
    assert rows["**kwargs"][-1].startswith("further fields")
    assert browser.find_elements("css selector", "dt[id$='.Channel'] ~ dd dt[id$='.Channel.samples']"), "the methods of a class are missing"


def test_source_links_lead_to_the_line(browser, url):
    load(browser, f"{url}data/recording.html")
    link = browser.find_element("xpath", "//dt[contains(@id, '.array_channel')]/following-sibling::dd//a[contains(@href, 'recording.py#L')]").get_attribute("href")
    line = int(link.rpartition("#L")[2])
    assert (ROOT / "pftsleep/data/recording.py").read_text().splitlines()[line - 1].startswith("def array_channel(")


@pytest.mark.parametrize("width", [390, pytest.param(1400, marks=pytest.mark.slow)])
def test_no_page_is_wider_than_the_window(browser, site, url, width):
    "Wide code and tables scroll in their own boxes."
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600))
    try:
        wide = []
        for page in pages(site):
            load(browser, url + page)
            if (needs := browser.execute_script("return document.documentElement.scrollWidth")) > width + 1: wide.append(f"{page} needs {needs} px")
        assert not wide, wide
    finally: browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_start_page_answers_in_one_screen(browser, site, url):
    "What it does, the figure, the three commands, and the first of the four readers, without scrolling."
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=1200, height=800, deviceScaleFactor=1, mobile=False))
    try:
        load(browser, f"{url}index.html")
        eager_images(browser)
        bottom = lambda css: browser.execute_script("return document.querySelector(arguments[0]).getBoundingClientRect().bottom", css)
        assert max(bottom(css) for css in (".lead", ".tag_hero img", ".hero-note ~ div[class*='highlight-']", ".readers tbody tr")) <= 800
        assert len(browser.find_elements("css selector", ".readers tbody tr")) == 4
    finally: browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_side_bar_has_groups(browser, url):
    load(browser, f"{url}tutorials/index.html")
    assert browser.execute_script("return [...document.querySelectorAll('.bd-sidebar-primary .caption')].map(e => e.textContent.trim())")[:2] == ["Start here", "Nights"]


def test_no_chapter_is_lost_by_grouping():
    from processed import Chapter
    own = [Chapter(Path(f"data/{i:02}_{name}.ipynb"), name, "", {}) for i, name in enumerate(["edf", "alignment", "brand_new"])]
    assert {title: [c.title for c in found] for title, found in build.grouped("data", own).items()} == {"The data model": ["alignment"], "Reading nights": ["edf"], "More": ["brand_new"]}
    for wing, groups in build.GROUPS.items():
        names = [n for group in groups.values() for n in group]
        assert len(names) == len(set(names)), f"{wing}: a page stands in docs/groups.yml twice"


def test_llms_txt_lists_pages_that_exist(site):
    text = (site / "llms.txt").read_text()
    links = [line.partition("](")[2].partition(")")[0] for line in text.splitlines() if line.startswith("- [")]
    assert len(links) >= 8
    for link in links: assert (site / link.partition(".github.io/")[2].partition("/")[2]).is_file(), link
    assert "- `pftsleep stage`: recordings" in text and "- `pftsleep demo`" in text
    full = (site / "llms-full.txt").read_text()
    assert full.startswith(text) and "- `read_edf(path, channels=None, keep_identity=False)" in full and len(full) < 400_000


# --- the page of benchmarks

MACHINE = dict(cpu="Some CPU", cores=4, memory_gib=16.0, gpu=None, os="Linux", python="3.11.7", torch="2.13.0", threads=1)


@pytest.fixture
def results(tmp_path):
    quiet = dict(hardware=MACHINE, load=1.0, threads=1, measured="2026-11-21T10:00:00+00:00")
    lines = {"night": [dict(benchmark="night", way=way, hours=h, cpu_s=s, peak_mib=m, **quiet) for way, h, s, m in [("naive", 2, 8., 400.), ("ours", 2, 2., 100.), ("naive", 4, 32., 1600.), ("ours", 4, 8., 100.)]],
        "old": [dict(benchmark="old", way="ours", seconds=1.5, spread=[1.25, 2.0], load=7.5)],
        "sizes": [dict(benchmark="cohort", what="1000 / 10 recordings", write_ratio=1.1, **quiet)],
        "crowd": [dict(benchmark="crowd", what="naive / ours", time_ratio=3.25, **quiet | dict(load=9.0))]}
    for name, rows in lines.items(): (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def rows_of(text: str, first: str) -> list[list[str]]: return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(f"| {first}")]


def test_benchmarks_name_their_machine_and_mark_what_was_measured_under_load(results):
    text = bench_page.page(results)
    assert rows_of(text, "A ") == [["A", "Some CPU", "4", "16", "none", "none", "Linux", "3.11.7", "2.13.0"]]
    assert "Measured 2026-11-21." in text and "There are 7 figures of 4 runs here; 2 of them are marked" in text
    assert [row[-1] for row in rows_of(text, "ours") if row[1] == "1.5"] == ["not named, busy"] and "1.25 to 2" in text
    assert not rows_of(text, "[sizes]") and rows_of(text, "1000 / 10 recordings") # growth, and no ratio against a naive way
    assert rows_of(text, "[crowd]") == [["[crowd](#bench-crowd)", "naive / ours", "time ratio", "3.25", "A, busy"]]


def test_ratios_are_computed_where_a_script_printed_none(results):
    found = {(row[1], row[2]): row[3] for row in rows_of(bench_page.page(results).partition("## How cost grows")[0], "[night]")}
    assert found == {("ours, hours 2", "CPU: naive / ours"): "4", ("ours, hours 2", "peak: naive / ours"): "4", ("ours, hours 4", "CPU: naive / ours"): "4", ("ours, hours 4", "peak: naive / ours"): "16"}


def test_growth_is_a_power_of_the_size(results):
    grows = {(row[1], row[4]): row[6] for row in rows_of(bench_page.page(results).partition("## How cost grows")[2].partition("## Every figure")[0], "[night]")}
    assert grows == {("naive", "CPU, s"): "2.00", ("naive", "peak, MiB"): "2.00", ("ours", "CPU, s"): "2.00", ("ours", "peak, MiB"): "0.00"}


def test_a_broken_line_of_results_is_named(results):
    (results / "old.jsonl").write_text('{"benchmark": "old"}\n{"bench')
    with pytest.raises(SystemExit, match=r"old\.jsonl, line 2"): bench_page.page(results)


def test_the_committed_results_make_a_page():
    text = bench_page.page(ROOT / "benchmarks/results")
    assert "## Against the naive way" in text and all(f"(bench-{p.stem})=" in text for p in (ROOT / "benchmarks/results").glob("*.jsonl"))
