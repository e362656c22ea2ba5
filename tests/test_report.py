"Reports and plots: escaping, self-containment, atomic writing, and what a browser makes of them."
import errno
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from pftsleep.data.alignment import align
from pftsleep.data.recording import Hypnogram, ReadIssue, Recording, array_channel
from pftsleep.errors import AlignmentError, ChannelError, ConfigError, SignalError, StoreError
from pftsleep.evaluation.metrics import compare_table, confusion_matrix, staging_metrics
from pftsleep.evaluation.plots import figure_png, plot_comparison, plot_confusion, plot_hypnodensity, plot_hypnogram, plot_spectrogram
from pftsleep.evaluation.report import RESEARCH_USE, Report, night_report
from pftsleep.evaluation.sleep_stats import sleep_statistics

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
START = datetime(2024, 3, 1, 22, 47)
EVIL = "\"'><script>alert(1)</script><img src=http://x/>&amp;"


def night(n=120, seed=0, start=START, **kwargs):
    rng = np.random.default_rng(seed)
    stages = np.repeat(rng.integers(-1, 5, n // 8 + 1), 8)[:n]
    p = rng.dirichlet(np.ones(5), n)
    p[stages < 0] = np.nan
    return Hypnogram(stages, 30, start=start, probabilities=p.astype("float32"), **kwargs)


def recording(h, fs=32., start=START, name="C4-M1", **kwargs):
    eeg = np.random.default_rng(1).normal(0, 20, round(h.duration * fs))
    flow = array_channel("Flow", np.zeros(round(h.duration)), 1, "", "RESP")
    return Recording("night-1", {name: array_channel(name, eeg, fs, "uV", "EEG"), "Flow": flow}, start=start, **kwargs)


class Page(html.parser.HTMLParser):
    "Tags of a page; raises where they aren't balanced."
    void = frozenset({"meta", "img", "br"})
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open, self.open
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void: self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.words.append(data)
    @property
    def text(self): return " ".join(" ".join(self.words).split())


@cache
def full_page():
    h = night()
    rec, h, how = align(recording(h, issues=(ReadIssue("dropped", "no unit", "Snore"),)), h)
    report = night_report(h, rec, how, spectrogram="C4-M1", provenance={"recipe": "default 1a2b", "seed": 3})
    other = np.where(np.arange(len(h)) % 9 == 0, 2, h.stages)
    report.heading("Agreement").figure(plot_comparison(h, replace(h, stages=other)).figure, "Two scorers", "Two hypnograms that differ in places")
    results = {"a": staging_metrics(h.stages, other), "b": staging_metrics([h.stages] * 3, [other, h.stages, other], "xyz")}
    report.table(compare_table(results), "Agreement of the two")
    return report.figure(plot_confusion(confusion_matrix(h.stages, other)).figure, "Confusion", "Confusion matrix")


def test_page_is_whole_and_needs_nothing():
    text = full_page().html()
    page = Page(text)
    tags = [t for t, _ in page.tags]
    assert tags.count("h1") == 1 and tags.count("main") == 1 and dict(page.tags)["html"] == {"lang": "en"}
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(tags)
    images = [a for t, a in page.tags if t == "img"]
    assert len(images) == 3 and all(a["src"].startswith("data:image/png;base64,") and a["alt"] for a in images)
    assert not re.search(r"@import|url\(|https?://", text)
    assert not any(k.startswith("on") for _, a in page.tags for k in a)
    assert "default-src 'none'" in text
    assert page.text.count(RESEARCH_USE) == 2
    for words in ("default 1a2b", "dropped: Snore: no unit", "offset", "Total sleep time", "AASM Manual 2.6"): assert words in page.text, words


def test_statistics_on_the_page_are_those_of_the_night():
    h = night()
    stats, text = sleep_statistics(h), Page(night_report(h).html()).text
    assert f"Total sleep time {stats['tst_min']:.1f} min" in text
    assert f"Awakenings {stats['awakenings']} " in text
    assert f"REM {stats['rem_min']:.1f} {stats['rem_percent']:.1f} {stats['rem_latency_min']:.1f}" in text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30) | st.just(EVIL))
def test_nothing_from_outside_becomes_markup(words):
    plain = Page(Report("t", {"a": 1}).heading("h").text("p").listing("l").table(pd.DataFrame({"c": ["v"]}, ["i"]), "k").html())
    r = Report(words, {words: words}).heading(words).text(f"p {words.strip()} p").listing(words).table(pd.DataFrame({words: [words]}, [words]), words)
    page = Page(r.html())
    assert {t for t, _ in page.tags} == {t for t, _ in plain.tags}
    if words == EVIL:
        assert page.text.count("<script>alert(1)</script>") >= 8 # shown as it is
        assert [t for t, _ in page.tags] == [t for t, _ in plain.tags]


def test_figure_text_is_escaped():
    page = Page(Report("x").figure(Figure(figsize=(1, 1)), EVIL, EVIL).html())
    (image,) = [a for t, a in page.tags if t == "img"]
    assert image["alt"] == EVIL and set(image) == {"class", "alt", "style", "src"}
    for alt in ("", "  "):
        with pytest.raises(ConfigError, match="alternative"): Report("x").figure(Figure(), "c", alt)


def test_evil_names_in_a_recording():
    h = night(start=None, scorer=EVIL)
    rec = replace(recording(h, name=EVIL), id=EVIL, start=None, issues=(ReadIssue("noted", EVIL, EVIL),))
    page = Page(night_report(h, rec, spectrogram=EVIL, provenance={EVIL: EVIL}).html())
    assert sum(t == "img" for t, _ in page.tags) == 1 and not any(t == "script" for t, _ in page.tags)


def test_tables_of_any_kind():
    frame = pd.DataFrame({"n": [1200, 3], "x": [.12345, np.nan], "t": pd.to_datetime(["2024-03-01", None]), "none": [None, "a"], "long": ["x" * 200, ""]})
    text = Page(Report("x").table(frame, "c").html()).text
    for cell in ("1200", "0.123", "n/a", "2024-03-01", "x" * 200): assert cell in text
    Page(Report("x").table(pd.DataFrame(), "empty").html())
    Page(Report("x").table(frame.groupby(["n", "long"]).agg({"x": ["mean", "max"]}), "two levels each").html())
    with pd.option_context("display.max_rows", 4, "display.max_columns", 2): # no setting of the caller may drop rows
        assert Report("x").table(pd.DataFrame(np.arange(400).reshape(40, 10)), "c").html().count("<td") == 400


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    assert Report("first").save(path) == path
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left") as caught: Report("second").save(path)
    assert caught.value.path == path and caught.value.remedy
    assert "first" in path.read_text() and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    Report("second").save(str(path))
    assert "second" in path.read_text() and list(tmp_path.iterdir()) == [path]
    with pytest.raises(StoreError): Report("x").save(tmp_path / "nowhere" / "r.html")
    with pytest.raises(StoreError): Report("x").save(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_same_night_same_bytes(): assert night_report(night()).html() == night_report(night()).html()


@pytest.mark.parametrize("h", [Hypnogram([], 30), Hypnogram([-1] * 4, 30), Hypnogram([0] * 4, 30), Hypnogram([2], 4),
    Hypnogram([3] * 4, 30, lights_off=-60., lights_on=600.), Hypnogram([2] * 20, 86400 / 20, start=START),
    Hypnogram([1, 4] * 2000, 30, start=START)], ids=lambda h: f"{len(h)}x{h.epoch_length:g}")
def test_odd_nights(h):
    page = Page(night_report(h).html())
    assert "nan" not in page.text.lower().split()


def test_spectrogram_that_cannot_be_drawn():
    h = night()
    with pytest.raises(ConfigError, match="needs the recording"): night_report(h, spectrogram="C4-M1")
    with pytest.raises(ChannelError, match="O2"): night_report(h, recording(h), spectrogram="O2")
    with pytest.raises(ConfigError, match="recording none"): night_report(h, replace(recording(h), start=None), spectrogram="C4-M1")
    with pytest.raises(SignalError, match="1 Hz"): night_report(h, recording(h), spectrogram="Flow")


# plots

def test_pyplot_is_never_touched():
    code = "import sys; from pftsleep.data.recording import Hypnogram; from pftsleep.evaluation.report import night_report; " \
        "night_report(Hypnogram([0, 2, 4], 30)).html(); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_plots_in_threads():
    results = {}
    def draw(i): results[i] = figure_png(plot_hypnogram(night(seed=i % 2)).figure)
    threads = [threading.Thread(target=draw, args=(i,)) for i in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(results) == 6 and len(set(results.values())) == 2 # as many pictures as nights


def drawn_levels(ax):
    "Stage bars of a hypnogram plot as (begin, end, level)."
    bars = [seg for c in ax.collections for seg in getattr(c, "get_segments", list)() if seg[0][1] == seg[1][1]]
    return sorted((round(a[0], 6), round(b[0], 6), -a[1]) for a, b in bars)


def test_hypnogram_bars_are_the_stages():
    h = Hypnogram([0, 0, 1, 2, 3, -1, 4], 1800, onset=3600)
    assert drawn_levels(plot_hypnogram(h)) == [(1, 2, 0), (2, 2.5, 2), (2.5, 3, 3), (3, 3.5, 4), (4, 4.5, 1)]
    assert plot_hypnogram(h).get_xlim() == (1, 4.5)


def test_hypnogram_on_the_clock():
    from matplotlib.dates import num2date
    h = Hypnogram([2, 3], 30, start=START)
    low, high = (num2date(x).replace(tzinfo=None) for x in plot_hypnogram(h).get_xlim())
    assert abs(low - START) < timedelta(milliseconds=1) and abs(high - START - timedelta(seconds=60)) < timedelta(milliseconds=1)


def test_hypnodensity_bands_are_the_probabilities():
    h = Hypnogram([0, 2], 3600, probabilities=np.array([[.5, .2, .1, .1, .1], [0, 0, 1, 0, 0]]))
    ax = plot_hypnodensity(h)
    heights = {c.get_label(): c.get_paths()[0].get_extents() for c in ax.collections}
    assert heights["N3"].y0 == 0 and heights["W"].y1 == pytest.approx(1, abs=1e-6)
    assert heights["N3"].y1 == pytest.approx(.1, abs=1e-6)


def test_comparison_marks_what_differs():
    a, b = Hypnogram([0, 1, -1, 2, 3], 3600), Hypnogram([0, 2, 2, -1, 3], 3600)
    ax = plot_comparison(a, b)
    assert ax.get_title(loc="left") == "2 of 4 scored epochs differ (50%)"
    marks = [p.get_extents() for c in ax.collections if not hasattr(c, "get_segments") for p in c.get_paths() if p.get_extents().y0 == -6]
    assert sorted((m.x0, m.x1) for m in marks) == [(1, 2), (3, 4)]
    for other in (replace(b, start=START), replace(b, onset=1.), replace(b, epoch_length=30), Hypnogram([0], 3600)):
        with pytest.raises(AlignmentError, match="different epochs"): plot_comparison(a, other)


@pytest.mark.parametrize("fs", [4, 4.05, 64, 100.01])
def test_spectrogram_finds_the_rhythm_and_keeps_time(fs):
    t = np.arange(int(7200 * fs)) / fs
    samples = np.where(t < 3600, np.sin(2 * np.pi * 1 * t), np.sin(2 * np.pi * min(10, fs / 2.5) * t)) + np.random.default_rng(0).normal(0, 1e-3, len(t))
    ax = plot_spectrogram(samples.astype("float32"), fs, start=1800.)
    mesh = ax.collections[0]
    edges, power = mesh.get_coordinates()[0, :, 0], mesh.get_array()
    np.testing.assert_allclose(np.diff(edges), round(30 * fs) / fs / 3600) # whole samples: 30.12 s at 4.05 Hz
    assert edges[0] == .5 and edges[-1] == pytest.approx(2.5, abs=31 / 3600)
    hz = (mesh.get_coordinates()[:-1, 0, 1] + mesh.get_coordinates()[1:, 0, 1]) / 2
    change = np.flatnonzero(np.diff(np.abs(hz[power.argmax(0)] - 1) > .2))
    assert len(change) <= 2 and abs(edges[change[0] + 1] - 1.5) <= 31 / 3600 # one hour after the start, to within a window


def test_spectrogram_scale_ignores_an_artefact():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 10, 100 * 3000)
    clean = plot_spectrogram(x, 100).collections[0].get_clim()
    x[:3000] *= 1e5
    assert np.allclose(plot_spectrogram(x, 100).collections[0].get_clim(), clean, atol=1.5)


@pytest.mark.parametrize("bad", [np.zeros(10), np.zeros(0)])
def test_spectrogram_of_too_little(bad):
    with pytest.raises(SignalError): plot_spectrogram(bad, 100)


def test_spectrogram_of_nothing_is_grey():
    ax = plot_spectrogram(np.full(6000, np.nan), 100)
    assert np.ma.getmaskarray(ax.collections[0].get_array()).all() or np.isnan(ax.collections[0].get_array()).all()
    figure_png(ax.figure)


# in a browser

def browser(tmp_path, *args):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--hide-scrollbars"]
    return subprocess.run([CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", *args], check=True, timeout=120, capture_output=True, text=True)


@needs_chromium
@pytest.mark.parametrize("width", [360, 1000])
def test_browser_shows_everything_and_nothing_overflows(tmp_path, width):
    "The page is put into a frame of the wanted width, and the page around it measures."
    framed = full_page().html().replace("&", "&amp;").replace('"', "&quot;")
    probe = f"""<iframe srcdoc="{framed}" style="border:0;width:{width}px;height:900px"></iframe><pre id="out">nothing</pre>""" + """<script>
    document.querySelector('iframe').onload = e => { const d = e.target.contentDocument, r = d.documentElement;
      const images = [...d.images].every(i => i.complete && i.naturalWidth > 400);
      const found = {scroll: r.scrollWidth, images: images, font: parseFloat(getComputedStyle(d.body).fontSize), h2: d.querySelectorAll('h2').length};
      document.getElementById('out').textContent = JSON.stringify(found) }
    </script>"""
    (tmp_path / "probe.html").write_text(probe, encoding="utf-8")
    dom = browser(tmp_path, "--virtual-time-budget=3000", "--dump-dom", (tmp_path / "probe.html").as_uri()).stdout
    found = json.loads(re.search(r'<pre id="out">(.*?)</pre>', dom).group(1))
    assert found == {"scroll": width, "images": True, "font": 16, "h2": 4}


@needs_chromium
def test_browser_fetches_nothing_and_complains_of_nothing(tmp_path):
    path = full_page().save(tmp_path / "report.html")
    done = browser(tmp_path, "--enable-logging=stderr", "--log-level=0", f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1000,1400", path.as_uri())
    assert "CONSOLE" not in done.stderr
    assert (tmp_path / "shot.png").stat().st_size > 30_000
