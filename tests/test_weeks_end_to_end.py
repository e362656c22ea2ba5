"""From a watch's file to tokens, figures and metrics of its weeks: simulated studies in their real layout, and the real files where they are."""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pftsleep.data.actigraphy import depresjon_scores, read_actigraphy, read_nhanes_r
from pftsleep.data.cohorts import find_nights
from pftsleep.data.convert import convert, read_night
from pftsleep.data.nhanes import PHQ9, TASKS, label_counts, nhanes_file, nhanes_labels, nhanes_weeks, phq9_scores, read_nhanes_header, read_table, read_weeks, write_weeks
from pftsleep.data.signals import Recipe
from pftsleep.data.simulate_nhanes import simulate_nhanes
from pftsleep.data.standardise import caveats, check_no_leak, column_zscore, load_standardiser, save_standardiser, standardise, subject_zscore
from pftsleep.data.store import open_store
from pftsleep.data.studies import COHORTS, simulate_files
from pftsleep.data.weeks import WEEK, WeekRule, cut_weeks, mark_nonwear, stack_weeks, to_minutes, wear_by_day
from pftsleep.errors import ChannelError, ConfigError, PFTSleepError, SignalError, SplitError
from pftsleep.evaluation.actogram import actogram, plot_mean_day
from pftsleep.evaluation.discrimination import auc, auc_interval, average_precision, bootstrap_interval, delong, delong_test, discrimination
from pftsleep.evaluation.explanations import attention_profile, plot_week
from pftsleep.evaluation.plots import figure_png
from pftsleep.evaluation.rhythm import cosinor, rest_activity, worn_activity
from pftsleep.evaluation.sleep_wake import SleepWake, cole_kripke, night_statistics, rescore, sleep_periods, sleep_regularity, sleep_timing
from pftsleep.models.pat import PAT
from pftsleep.models.transformer import PatchTransformer
from pftsleep.models.weights import load_published
from pftsleep.training.finetune import Examples, FinetuneConfig, finetune, guard_benchmark, label_curve, finetuning, plain_scaler, scaler_of, stratified_split, wavelets

SHARED = Path(__file__).parents[2] / "shared"
WATCHES, XPT, PUBLISHED = SHARED / "realdata/actigraphy", SHARED / "realdata/nhanes_xpt", SHARED / "fixtures/pat/PAT-S_random_weights.h5"
real = pytest.mark.skipif(not (WATCHES.exists() and PUBLISHED.exists()), reason="../shared isn't here")
FORWARD = datetime(2003, 3, 30, 2) # when clocks were put forward, in the real Depresjon and in the simulated one


def one_thread(cohort, source, store, recipe):
    with ThreadPoolExecutor(1) as pool: return convert(cohort, source, store, recipe, pool)


def is_drawn(png: bytes) -> bool: return png.startswith(b"\x89PNG") and len(png) > 5000


def embedded(encoder, values, pad):
    with torch.no_grad(): return encoder.pool(encoder.encode(torch.from_numpy(values)[:, None], torch.from_numpy(pad)))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return PatchTransformer(PAT.S).eval()


# --- a study of watches, simulated

@pytest.fixture(scope="module")
def depresjon(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depresjon")
    assert simulate_files("depresjon", folder / "files", n_subjects=4) == 4
    ledger = one_thread(COHORTS["depresjon"], folder / "files", folder / "store", Recipe.native())
    assert not ledger.failed and len(ledger.of("done")) == 4
    return folder


def test_every_minute_of_a_stored_week_is_that_of_the_file(depresjon):
    store = open_store(depresjon / "store")
    assert set(store.manifest["cohort"]) == {"depresjon"} and sorted(store.manifest["subject"]) == ["condition_1", "condition_2", "control_1", "control_2"]
    for id in store.manifest["id"]:
        rows = pd.read_csv(depresjon / f"files/{id.split('_')[0]}/{id}.csv", parse_dates=["timestamp"]).set_index("timestamp")["activity"]
        (week,) = cut_weeks(store[id])
        clock = pd.date_range(week.start, periods=WEEK, freq="min")
        want = rows.reindex(clock).to_numpy("float64")
        np.testing.assert_array_equal(week.values, want)
        assert week.at_midnight and week.start == datetime(2003, 3, 26) and week.pad.sum() == 60
        assert clock[np.flatnonzero(week.pad)[0]] == FORWARD, "the hour that never was is padding, at its place"


def test_the_study_is_converted_once(depresjon):
    again = one_thread(COHORTS["depresjon"], depresjon / "files", depresjon / "store", Recipe.native())
    assert len(again.of("skipped")) == 4


def test_counts_are_never_resampled(depresjon, tmp_path):
    ledger = one_thread(COHORTS["depresjon"], depresjon / "files", tmp_path / "store", Recipe.default())
    assert len(ledger.failed) == 4 and all("counts can't be resampled" in o.message and "recipe without a rate" in o.message for o in ledger.failed)


def test_a_week_to_tokens_metrics_and_figures(depresjon, encoder):
    store = open_store(depresjon / "store")
    people = depresjon_scores(depresjon / "files/scores.csv")
    recordings = {i: mark_nonwear(store[i]) for i in store.manifest["id"]}
    weeks = [w for r in recordings.values() for w in cut_weeks(r, WeekRule(valid_days=5))]
    values, pad = standardise(weeks, column_zscore(weeks))
    tokens = embedded(encoder, values, pad)
    assert tokens.shape == (4, 96) and tokens.isfinite().all() and (pad.sum(1) == 60).all()
    torch.testing.assert_close(embedded(encoder, np.where(pad, 1e4, values).astype("float32"), pad), tokens, msg="what stands in padding was seen")
    for id, r in recordings.items():
        x, epoch, start = worn_activity(r)
        stats, scores = rest_activity(x, epoch, start), cole_kripke(x)
        assert stats["IS"] > .2 and (stats["L5_onset_h"] > 22 or stats["L5_onset_h"] < 6) and 6 < stats["M10_onset_h"] < 14, id
        assert 13 < cosinor(x, epoch, start)["acrophase_h"] < 18 and (scores[np.isnan(x)] == SleepWake.UNSCORED).all()
        assert is_drawn(figure_png(actogram(x, epoch, start, scores).figure)) and is_drawn(figure_png(plot_mean_day(x, epoch, start).figure))
    m10 = {i: rest_activity(*worn_activity(r))["M10"] for i, r in recordings.items()}
    assert np.mean([m10[i] for i in people.index[people["depressed"]]]) < np.mean([m10[i] for i in people.index[~people["depressed"]]]), "so it was planted"


def test_nobody_knows_the_wear_of_a_file_without_flags(depresjon):
    rec = open_store(depresjon / "store")["condition_1"]
    with pytest.raises(ChannelError, match="mark_nonwear"): cut_weeks(rec, WeekRule(valid_days=4))
    worn = wear_by_day(mark_nonwear(rec))["worn"]
    assert worn[datetime(2003, 3, 28)] <= 16 * 60 and worn[datetime(2003, 3, 29)] <= 12 * 60, "the watch lay in a drawer from 16:00 to noon"
    (kept,), (cut,) = (cut_weeks(mark_nonwear(rec), WeekRule(non_wear=how)) for how in ("keep", "pad"))
    assert kept.pad.sum() == 60 and cut.pad.sum() >= 60 + 20 * 60


def test_masks_of_mesa_reach_the_store(tmp_path):
    "A blank of the file is NaN; the flag tells an empty wrist from rows that are missing."
    simulate_files("mesa_actigraphy", tmp_path / "files", n_subjects=2, hours=.1)
    cohort = COHORTS["mesa_actigraphy"]
    nights = find_nights(cohort, tmp_path / "files")
    assert [(n.id, n.subject) for n in nights] == [("mesa-sleep-0001", "0001"), ("mesa-sleep-0002", "0002")]
    assert {n.subject for n in nights} == {n.subject for n in find_nights(COHORTS["mesa"], tmp_path / "files")}, "a person has one key by day and by night"
    assert not one_thread(cohort, tmp_path / "files", tmp_path / "store", Recipe.native()).failed
    source, kept = read_night(nights[0], cohort), open_store(tmp_path / "store")["mesa-sleep-0001"]
    for name in ("Activity", "Off-wrist"): np.testing.assert_array_equal(kept[name].samples(), source[name].samples())
    off, x = kept["Off-wrist"].samples(), kept["Activity"].samples()
    assert (off == 1).any() and np.isnan(off).sum() == 120 and (np.isnan(x) == ((off == 1) | np.isnan(off))).all()
    assert kept.cohort == "mesa" and kept.start == source.start


# --- the survey, simulated: from XPT to a judged model

@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    "Cycle H: minutes of the wrist, labels, weeks of those that wore the monitor for five days."
    folder = tmp_path_factory.mktemp("nhanes")
    truth = simulate_nhanes(folder, "H", 48, seed=3)
    weeks = list(nhanes_weeks(nhanes_file(folder, "PAXMIN", "H"), WeekRule(valid_days=5), read_nhanes_header(nhanes_file(folder, "PAXHD", "H"))))
    return folder, truth, weeks, nhanes_labels(folder, "H")


def test_weeks_of_the_survey_meet_their_labels(survey, tmp_path):
    _, truth, weeks, labels = survey
    assert {int(w.subject) for w in weeks} <= set(truth.index[truth["worn"]]) and len(weeks) > 30 and all(w.at_midnight for w in weeks)
    counts = label_counts(labels, [int(w.subject) for w in weeks])
    assert list(counts.index) == list(TASKS) and (counts[["positive", "negative", "unlabelled"]].sum(axis=1) == len(weeks)).all()
    pd.testing.assert_series_equal(labels["depression"].reindex(truth.index), truth["depression"], check_names=False)
    assert write_weeks(iter(weeks), tmp_path / "weeks.h5") == len(weeks)
    for a, b in zip(weeks, read_weeks(tmp_path / "weeks.h5"), strict=True):
        assert (a.id, a.subject, a.start, a.unit) == (b.id, b.subject, b.start, b.unit)
        np.testing.assert_array_equal(a.values, b.values)


def examples(weeks, labels, values, pad):
    keep = [i for i, w in enumerate(weeks) if labels["ssri"].notna().get(int(w.subject), False)]
    y = labels["ssri"].reindex([int(weeks[i].subject) for i in keep]).to_numpy("int64")
    return Examples(values[keep], y, [weeks[i].id for i in keep], [weeks[i].subject for i in keep], pad[keep], "NHANES 2013-2014")


def test_a_probe_remembers_how_its_weeks_were_made(survey, encoder, tmp_path):
    _, _, weeks, labels = survey
    labels = labels.assign(ssri=labels["phq9"].gt(labels["phq9"].median()).astype("float64").where(labels["phq9"].notna())) # any label with enough of each; which is of no matter here
    known = [w for w in weeks if labels["ssri"].notna()[int(w.subject)]]
    who = pd.DataFrame([dict(id=w.id, subject=w.subject, label=int(labels["ssri"][int(w.subject)])) for w in known])
    split = stratified_split(who, {"train": .5, "val": .25, "test": .25}, seed=0)
    by = column_zscore([w for w in known if w.id in split.parts["train"]], split)
    save_standardiser(by, tmp_path / "by.npz")
    by = load_standardiser(tmp_path / "by.npz")
    check_no_leak(by, [w for w in known if w.id not in split.parts["train"]])
    with pytest.raises(SplitError): column_zscore(known, split)
    assert caveats(known, by) == []
    every = examples(known, labels, *standardise(known, by))
    train, val, test = (every.part(split, p) for p in ("train", "val", "test"))
    model = finetune(encoder, train, val, tmp_path / "run", FinetuneConfig(mode="frozen", learning_rate=1e-3, epochs=3), scaler=plain_scaler(by))
    p = model.predict(test)
    assert p.shape == (len(test),) and ((p > 0) & (p < 1)).all()
    again = scaler_of(model) # a stranger's week, prepared by what the model itself carries
    np.testing.assert_array_equal(standardise(known, again)[0], every.values)
    np.testing.assert_array_equal(again.mean, by.mean)


def test_too_few_for_a_figure_is_no_figure(survey, encoder, tmp_path):
    "Nothing is trained for a test set on which nothing can be said."
    _, _, weeks, labels = survey
    every = examples(weeks, labels, *standardise(weeks, subject_zscore("MIMS")))
    rare = np.flatnonzero(every.labels == 1)[:1].tolist() + np.flatnonzero(every.labels == 0)[:16].tolist()
    rest = [i for i in range(len(every)) if i not in rare]
    with pytest.raises(ConfigError, match="1 positive and 16 negative"):
        label_curve({"wavelet": wavelets(), "pat": finetuning(encoder, benchmark=False)}, every.take(rest), every.take(rare), tmp_path, sizes=(None,), seeds=(0,))
    assert not list(tmp_path.iterdir())


def test_weights_that_have_seen_the_people_are_no_benchmark(encoder):
    seen = PatchTransformer(PAT.S)
    seen.provenance = {"file": "PAT-S_29k_weights.h5", "sha256": ""}
    with pytest.raises(ConfigError, match="2013-2014"): guard_benchmark(seen, "NHANES 2013-2014")
    guard_benchmark(encoder, "NHANES 2013-2014")


# --- real: the hip monitor of NHANES 2003-2006

@pytest.fixture(scope="module")
def published():
    if not PUBLISHED.exists(): pytest.skip("../shared isn't here")
    return load_published(PUBLISHED)


@pytest.fixture(scope="module")
def hip():
    "Recordings by SEQN, and the PHQ-9 of those who have one."
    if not (WATCHES.exists() and XPT.exists()): pytest.skip("../shared isn't here")
    pytest.importorskip("rdata", reason="the extra 'wear' isn't installed")
    people = read_nhanes_r(WATCHES / "nhanes_r/example_activity_data.RData")
    phq9 = phq9_scores(read_table(XPT / "DPQ_D.xpt", ["SEQN", *PHQ9]))
    return people, phq9.reindex([int(k) for k in people]).dropna()


def test_seventeen_real_people_and_no_figure(hip):
    "One of seventeen has a PHQ-9 of 10 or more. Whatever would make a figure of that refuses."
    people, phq9 = hip
    y, score = (phq9 >= 10).to_numpy(int), np.linspace(.1, .9, len(phq9))
    assert (len(people), len(y), y.sum(), phq9.max()) == (50, 17, 1, 26)
    for figure in (auc, delong, auc_interval, average_precision, discrimination):
        with pytest.raises(ConfigError, match="1 positive and 16 negative"): figure(y, score)
    with pytest.raises(ConfigError, match="too few"): delong_test(y, score, score[::-1])
    with pytest.raises(ConfigError, match="too few"): bootstrap_interval(y, score, list(phq9.index))


def test_real_weeks_of_the_hip_to_tokens(hip, published):
    people, phq9 = hip
    keep = [w for k in phq9.index for w in cut_weeks(people[str(k)], WeekRule(partial=True))]
    cut = [w for k in phq9.index for w in cut_weeks(people[str(k)], WeekRule(partial=True, non_wear="pad"))]
    assert len(keep) == len(cut) == 17 and {w.subject for w in keep} == set(map(str, phq9.index))
    asleep = stack_weeks(keep, 0)[0].reshape(17, 7, 1440)[:, :, 120:300]
    assert (asleep == 0).mean() > .9 and np.mean([w.pad.mean() for w in cut]) > .4, "people take a belt off to sleep: what PAT was trained on has zeros there"
    for weeks in (keep, cut):
        by = column_zscore(weeks)
        values, pad = standardise(weeks, by)
        assert "without a split" in caveats(weeks, by)[0] and np.isfinite(values).all() and (values[pad] == 0).all()
        tokens = embedded(published, values, pad)
        assert tokens.shape == (17, 96) and tokens.isfinite().all()
        with torch.no_grad(): assert published(torch.from_numpy(values[:2])).shape == (2, 560, 96)


def test_real_rhythms_of_the_hip(hip, tmp_path):
    "Without wear at night there is no rhythm to be told, and it is said so; the one who wore it day and night has one."
    people, phq9 = hip
    told, refused = {}, []
    for k in phq9.index:
        x, epoch, start = worn_activity(people[str(k)])
        try: told[k] = rest_activity(x, epoch, start)
        except SignalError as e: refused.append(str(e))
    assert list(told) == [36432] and len(refused) == 16 and sum("ever measured in the clock hours" in r for r in refused) == 13 and sum("missing" in r for r in refused) == 3
    assert told[36432]["days"] == 7 and told[36432]["missing_percent"] == pytest.approx(7.113, abs=.01)
    x, epoch, start = worn_activity(people["36432"])
    (tmp_path / "hip.png").write_bytes(figure_png(actogram(x, epoch, start).figure))
    assert is_drawn((tmp_path / "hip.png").read_bytes())
    as_recorded = rest_activity(people["38119"]["Activity"].samples(), 60., start) # zeros for sleep, as the field does with hip monitors
    assert (as_recorded["L5_onset_h"] > 21 or as_recorded["L5_onset_h"] < 4) and as_recorded["RA"] > .9


# --- real: weeks of the wrist

def through(published, recording, folder, days=None):
    "What there is to say of a long recording: weeks, tokens, rhythm, nights, three figures."
    m = mark_nonwear(recording)
    x, epoch, start = worn_activity(m)
    x = x[:None if days is None else days * 1440] # the days that are looked at
    weeks = cut_weeks(m, WeekRule("all", valid_days=6, wear_hours=20))
    values, pad = standardise(weeks, subject_zscore("counts"))
    tokens = embedded(published, values, pad)
    look = attention_profile(published, torch.from_numpy(values[:1]), weeks[0].start)
    assert tokens.isfinite().all() and np.isclose(look.patch.sum(), 1)
    scores = rescore(cole_kripke(x))
    figures = dict(actogram=actogram(x, epoch, start, scores), day=plot_mean_day(x, epoch, start), week=plot_week(weeks[0].values, look.minute[0], weeks[0].start, weeks[0].pad))
    for name, ax in figures.items():
        (folder / f"{name}.png").write_bytes(figure_png(ax.figure))
        assert is_drawn((folder / f"{name}.png").read_bytes())
    return m, weeks, rest_activity(x, epoch, start), sleep_timing(sleep_periods(scores, start)), scores


@real
def test_depresjon_condition_1(published, tmp_path):
    m, weeks, rhythm, nights, scores = through(published, read_actigraphy(WATCHES / "depresjon/condition_1.csv"), tmp_path)
    assert [w.start for w in weeks] == [datetime(2003, 5, 8)] and m.duration / 86400 == pytest.approx(16.14, abs=.01)
    assert rhythm["RA"] > .9 and rhythm["L5_onset"] == "01:39" and rhythm["M10_onset"] == "10:03"
    assert 3 < nights["midpoint_h"] < 5 and 7 < nights["duration_h"] < 10.5 and sleep_regularity(scores, 60.)["pair_days"] > 10


@real
def test_depresjon_control_1_and_its_gap(published, tmp_path):
    "Thirty-six days, of which the watch was worn for fifteen; an hour is missing where clocks were put forward."
    rec = read_actigraphy(WATCHES / "depresjon/control_1.csv")
    x = rec["Activity"].samples()
    gap = np.flatnonzero(np.isnan(x))
    assert len(gap) == 60 and rec.start + timedelta(minutes=int(gap[0])) == FORWARD and "clocks are put forward" in rec.issues[0].problem
    with pytest.raises(SignalError, match="cut the part in which the watch was worn"): rest_activity(*worn_activity(mark_nonwear(rec)))
    m, weeks, *_ = through(published, rec, tmp_path, days=16)
    assert m["Off-wrist"].samples()[-14 * 1440:].mean() > .8, "constant counts above 0 are no wear either"
    assert [(w.start.day, w.start.month, int(w.pad.sum())) for w in weeks] == [(23, 3, 0)], "on 22 March one count stands for hours"
    weeks = cut_weeks(rec, "all")
    assert [(w.start.day, w.start.month, int(w.pad.sum())) for w in weeks[:2]] == [(19, 3, 0), (26, 3, 60)]
    assert len(cut_weeks(rec, "all")) == 5, "without a rule of wear, three weeks of an empty drawer come along"
    (latest,) = cut_weeks(rec, "latest")
    assert (latest.values < 10).mean() > .95 and cut_weeks(m, WeekRule("latest", valid_days=6, wear_hours=20))[0].start < datetime(2003, 3, 30), "the last week is the drawer; the last worn one isn't"
    rows = pd.read_csv(WATCHES / "depresjon/control_1.csv", parse_dates=["timestamp"]).set_index("timestamp")["activity"]
    clock = pd.date_range(weeks[1].start, periods=WEEK, freq="min")
    np.testing.assert_array_equal(weeks[1].values, rows.reindex(clock).to_numpy("float32"))


@real
def test_real_depresjon_by_its_cohort(tmp_path):
    for name in ("condition_1", "control_1"):
        (tmp_path / "files" / name.split("_")[0]).mkdir(parents=True)
        (tmp_path / "files" / name.split("_")[0] / f"{name}.csv").write_bytes((WATCHES / f"depresjon/{name}.csv").read_bytes())
    (tmp_path / "files/scores.csv").write_bytes((WATCHES / "depresjon/scores.csv").read_bytes())
    assert not one_thread(COHORTS["depresjon"], tmp_path / "files", tmp_path / "store", Recipe.native()).failed
    store = open_store(tmp_path / "store")
    people = depresjon_scores(tmp_path / "files/scores.csv")
    assert len(people) == 55 and people["depressed"].sum() == 23 and set(store.manifest["subject"]) <= set(people.index)
    for id in ("condition_1", "control_1"):
        source = read_actigraphy(WATCHES / f"depresjon/{id}.csv")
        np.testing.assert_array_equal(store[id]["Activity"].samples(), source["Activity"].samples())
        assert store[id].start == source.start and [str(i) for i in source.issues] == [str(i) for i in store[id].issues if "missing" in str(i)]


@real
def test_actiwatch(published, tmp_path):
    m, weeks, rhythm, *_ = through(published, read_actigraphy(WATCHES / "pyActigraphy/example_01.AWD"), tmp_path)
    assert [w.start.isoformat() for w in weeks] == ["1918-01-24T00:00:00"] and not weeks[0].pad.any()
    assert rhythm["L5_onset"] == "01:06" and rhythm["M10_onset"] == "07:30" and rhythm["IS"] > .5
    assert wear_by_day(m)["worn"].iloc[-2:].max() < 200, "the watch was off on the last two days"


# --- real: what is too short for a week

@real
def test_a_day_and_an_hour_is_no_week(published, tmp_path):
    "AGD, 25 h: no week, no rhythm, one night; each refusal names what is missing and the way out."
    rec = read_actigraphy(WATCHES / "actigraph_sleepr/GT3XPlus-RawData-Day01.agd")
    m = mark_nonwear(to_minutes(rec))
    x = m["Activity"].samples()
    assert rec["Activity"].fs == .1 and len(x) == 1500 and [cut_weeks(m, which) for which in ("midnight", "latest", "all", "start")] == [[]] * 4
    with pytest.raises(ConfigError, match="no week to fit on"): column_zscore(cut_weeks(m))
    with pytest.raises(SignalError, match="1.04 days of activity -> a rhythm needs at least 2 days"): rest_activity(x, 60., m.start)
    with pytest.raises(SignalError, match="regularity"): sleep_regularity(cole_kripke(x), 60.)
    (week,) = cut_weeks(m, WeekRule("start", partial=True))
    assert week.start == datetime(2012, 6, 27, 10, 54) and (~week.pad).sum() == np.isfinite(x).sum()
    tokens = embedded(published, *standardise([week], subject_zscore("counts")))
    assert tokens.isfinite().all() and "no published model was trained" in caveats([week], subject_zscore("counts"))[0]
    scores = cole_kripke(x)
    (night,) = sleep_periods(rescore(scores), m.start).itertuples()
    assert (night.in_bed, night.out_bed) == (datetime(2012, 6, 28, 0, 4), datetime(2012, 6, 28, 7, 24))
    stats = night_statistics(scores, 60., night.in_bed.to_pydatetime(), night.out_bed.to_pydatetime(), m.start)
    assert stats["tib_min"] == 440 and stats["sleep_efficiency_percent"] > 85
    assert is_drawn(figure_png(actogram(x, 60., m.start, scores).figure))


@real
def test_six_days_of_another_unit():
    "Axivity's mg: no complete week, no rule of non-wear for counts, yet a rhythm."
    m = to_minutes(read_actigraphy(WATCHES / "pyActigraphy/sample-timeSeries.csv.gz"))
    assert m["Activity"].unit == "mg" and not cut_weeks(m) and len(cut_weeks(m, WeekRule(partial=True))) == 1
    with pytest.raises(ChannelError, match="for counts"): mark_nonwear(m)
    stats = rest_activity(*worn_activity(m))
    assert stats["L5_onset"] == "03:05" and stats["RA"] > .8
    with pytest.raises(ConfigError, match="mg"): standardise(cut_weeks(m, WeekRule(partial=True)), subject_zscore("counts"))


@real
def test_four_rows_of_mesa():
    rec = read_actigraphy(WATCHES / "pyActigraphy/test_sample_mesa.csv")
    assert len(to_minutes(rec)["Activity"].samples()) == 2 and not cut_weeks(rec) and rec["Off-wrist"].samples()[0] == 1
    with pytest.raises(PFTSleepError, match="two|2 days"): rest_activity(*worn_activity(to_minutes(rec)))
    with pytest.raises(SignalError): cut_weeks(replace(rec, start=None))
