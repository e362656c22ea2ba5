"""`pftsleep embed`, as somebody uses it who has never seen it: broken files, wrong paths, Ctrl-C, resuming, and every kind of source."""
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pftsleep.apps import embedding
from pftsleep.apps.cli import main
from pftsleep.apps.embedding import EmbedJob, Item, Preparation, embed_items, find_items, load_encoder, standardisers
from pftsleep.data.edf import write_edf
from pftsleep.data.nhanes import write_weeks
from pftsleep.data.recording import Recording, array_channel
from pftsleep.data.signals import Recipe
from pftsleep.data.standardise import column_zscore, save_standardiser
from pftsleep.data.store import create_store
from pftsleep.data.weeks import WEEK, Week
from pftsleep.errors import ConfigError, ModelError, PFTSleepError, ReadError, StoreError
from pftsleep.models.sleepfm import SleepFMConfig, SleepFMEncoder
from pftsleep.models.transformer import PatchConfig, PatchTransformer

SHARED = Path(__file__).parents[2] / "shared"
MONDAY = datetime(2024, 1, 1)


def run(*arguments, code=0, env=None):
    done = subprocess.run([sys.executable, "-c", "import sys; from pftsleep.apps.cli import main; sys.exit(main())", *map(str, arguments)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}), timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def week(k: int, unit="counts", gap=0) -> Week:
    x = np.random.default_rng(k).gamma(1., 100., WEEK).astype("float32")
    pad = np.zeros(WEEK, bool)
    pad[:gap] = True
    x[pad] = np.nan
    return Week(f"p{k:03d}_w1", f"p{k:03d}", "nhanes-2005-06", x, pad, MONDAY, unit)


def saved(encoder, folder: Path) -> Path:
    return encoder.save_pretrained(folder)


def tiny(**changes) -> PatchTransformer:
    torch.manual_seed(0)
    return PatchTransformer(PatchConfig(**dict(channels=("Activity",), rate=1 / 60, patch=720, d_model=16, n_layers=1, n_heads=2, d_ff=32, embedding="shared", position="sine", instance_norm=False) | changes)).eval()


def sleeper(**changes) -> PatchTransformer:
    torch.manual_seed(0)
    return PatchTransformer(PatchConfig(**dict(channels=("EEG", "EOG"), rate=20., patch=100, d_model=16, n_layers=1, n_heads=2, d_ff=32) | changes), recipe=Recipe.default(["EEG", "EOG"], 20.).to_dict()).eval()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A file of weeks, the numbers of its cohort, a model; and CSV files of which one is broken."
    root = tmp_path_factory.mktemp("embed")
    weeks = [week(k, gap=2000 * (k == 2)) for k in range(5)]
    write_weeks(weeks, root / "weeks.h5")
    save_standardiser(column_zscore(weeks), root / "numbers.npz")
    saved(tiny(), root / "model")
    (root / "files").mkdir()
    for k in range(3):
        stamps = pd.date_range(MONDAY + timedelta(hours=9), periods=8 * 1440, freq="min")
        x = np.random.default_rng(k).integers(0, 500, len(stamps))
        pd.DataFrame(dict(timestamp=stamps.strftime("%Y-%m-%d %H:%M:%S"), date=stamps.strftime("%Y-%m-%d"), activity=x)).to_csv(root / "files" / f"person_{k}.csv", index=False)
    (root / "files" / "broken.csv").write_text("timestamp,date,activity\n2024-01-01 00:00:00,2024-01-01,many\n")
    return root


def test_a_folder_with_a_broken_file_and_again(work, tmp_path):
    "One row for each that can be read, the other in the ledger; the second run reads only what failed."
    command = "embed", work / "files", work / "model", "--out", tmp_path / "out", "--standardise", work / "numbers.npz"
    done = run(*command, code=1)
    assert "3 done, 0 skipped, 1 failed" in done.stdout and "broken" in done.stdout and "many" in done.stdout
    table, ledger = pd.read_parquet(tmp_path / "out/embeddings.parquet"), pd.read_csv(tmp_path / "out/ledger.csv")
    assert table["id"].tolist() == ["person_0", "person_1", "person_2"] and [c for c in table if c[0] == "e"] == [f"e{k:03d}" for k in range(16)]
    assert set(table["start"]) == {"2024-01-02T00:00:00"} and (table["coverage"] == 1).all() and not table["off_distribution"].any()
    assert table["caveats"].str.contains("no cohort|depresjon|were standardised by").all() # another cohort than that of the numbers
    assert ledger.set_index("id").loc["broken", "error"] == "ReadError" and ledger["trace"].isna().all()
    (work / "files" / "broken.csv").rename(work / "files" / "broken.txt")
    done = run(*command)
    assert "0 done, 3 skipped, 0 failed" in done.stdout
    (work / "files" / "broken.txt").rename(work / "files" / "broken.csv")


@pytest.mark.parametrize("line, says", [
    ("{w}/nowhere {w}/model --standardise subject", "no such file or folder"), ("{w}/weeks.h5 {w}/nothing --standardise subject", "nothing"),
    ("{w}/weeks.h5 {w}/files --standardise subject", "no encoder here"), ("{w}/weeks.h5 {w}/model", "--standardise FILE"), ("{w}/weeks.h5 {w}/model --standardise {w}/weeks.h5", "can't be read as a standardiser"),
    ("{w}/weeks.h5 {w}/model --standardise {w}/none.npz", "none.npz"), ("{w}/weeks.h5 {w}/model --standardise subject --batch 0", "a batch of 0"), ("{w}/weeks.h5 {w}/model --standardise subject --cohort nobody", "no cohort 'nobody'"),
    ("{w}/model {w}/model --standardise subject", "no .agd"), ("{w}/weeks.h5 {w}/weeks.h5", "weeks.h5"), ("{w}/weeks.h5 {w}/model --standardise subject --which ekg", "no choice"), ("{w}/weeks.h5 {w}/model --device cuda", "cuda" if torch.cuda.is_available() else "no GPU")])
def test_what_is_typed_wrongly(work, tmp_path, line, says, capfd):
    if torch.cuda.is_available() and "--device" in line: pytest.skip("this machine has a GPU")
    assert main(["embed", *line.format(w=work).split(), "--out", str(tmp_path / "out")]) == 1
    err = capfd.readouterr().err
    assert says in err and "Traceback" not in err


def test_arguments_are_missing(capfd):
    assert main(["embed"]) == 2
    assert "source, model" in capfd.readouterr().err


def test_ctrl_c_and_again(work, tmp_path):
    "What was finished is kept and not computed again; the table is that of a run in one piece."
    n, x = 150, np.random.default_rng(0).gamma(1., 100., WEEK).astype("float32")
    many = [Week(f"q{k:03d}_w1", f"q{k:03d}", "nhanes-2005-06", np.roll(x, k), np.zeros(WEEK, bool), MONDAY, "counts") for k in range(n)]
    write_weeks(many, tmp_path / "many.h5")
    command = "embed", tmp_path / "many.h5", work / "model", "--out", tmp_path / "out", "--standardise", work / "numbers.npz", "--batch", 1, "--tokens"
    process = subprocess.Popen([sys.executable, "-c", "import sys; from pftsleep.apps.cli import main; sys.exit(main())", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob("out/parts/*.parquet"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in said[1] and "Traceback" not in said[1], said
    before = pd.read_parquet(tmp_path / "out/embeddings.parquet")
    assert 3 <= len(before) < n and not list(tmp_path.glob("out/parts/*"))
    stamps = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("out/tokens/*.npz")}
    job = EmbedJob(Preparation(load_encoder(work / "model"), standardisers(str(work / "numbers.npz"), tiny())), tmp_path / "out", True, 64)
    outcomes = list(embed_items(find_items(tmp_path / "many.h5", True), job))
    assert sum(o.status == "skipped" for o in outcomes) == len(before) and not any(o.status == "failed" for o in outcomes)
    table = pd.read_parquet(tmp_path / "out/embeddings.parquet")
    assert len(table) == n and table["id"].is_unique and set(before["id"]) <= set(table["id"])
    assert all(p.stat().st_mtime_ns == stamps[p.name] for p in tmp_path.glob("out/tokens/*.npz") if p.stem in set(before["id"]))
    whole = list(embed_items(find_items(tmp_path / "many.h5", True), EmbedJob(job.preparation, tmp_path / "whole", False, 50)))
    assert len(whole) == n
    columns = [c for c in table if c[0] == "e"]
    np.testing.assert_allclose(table[columns], pd.read_parquet(tmp_path / "whole/embeddings.parquet")[columns], atol=1e-5)


def test_a_kill_between_parts_loses_nothing(work, tmp_path):
    "Parts that nobody gathered are taken up."
    job = EmbedJob(Preparation(load_encoder(work / "model"), {}), tmp_path, batch=2)
    items = find_items(work / "weeks.h5", True)
    running = embed_items(items, job)
    for _ in range(2): next(running)
    parts = [(p.name, p.read_bytes()) for p in tmp_path.glob("parts/*.parquet")]
    running.close() # gathers
    (tmp_path / "embeddings.parquet").unlink()
    for name, data in parts: (tmp_path / "parts" / name).write_bytes(data) # as a SIGKILL leaves them
    (tmp_path / "parts" / ".cut.parquet.1.part").write_bytes(b"PAR1") # and something half-written
    assert [o.status for o in embed_items(items, job)] == ["skipped"] * 2 + ["done"] * 3
    assert len(pd.read_parquet(tmp_path / "embeddings.parquet")) == 5


def test_models_and_preparations_are_never_mixed(work, tmp_path):
    items, first = find_items(work / "weeks.h5", True), Preparation(tiny(), {})
    list(embed_items(items, EmbedJob(first, tmp_path)))
    other = tiny()
    other.blocks[0].norm1.weight.data += .1
    for changed, says in ((Preparation(other, {}), "model"), (Preparation(tiny(), standardisers(str(work / "numbers.npz"), other)), "prepared, recipe"), (Preparation(tiny(), {}, embedding.WeekRule("latest")), "prepared, recipe")):
        with pytest.raises(ConfigError, match=says): list(embed_items(items, EmbedJob(changed, tmp_path)))
    (tmp_path / "embedding.json").write_text("[]")
    with pytest.raises(ConfigError, match="everything"): list(embed_items(items, EmbedJob(first, tmp_path)))
    (tmp_path / "embedding.json").write_text("{")
    with pytest.raises(StoreError): list(embed_items(items, EmbedJob(first, tmp_path)))


def test_a_changed_file_is_embedded_again(work, tmp_path):
    write_weeks([week(k) for k in range(3)], tmp_path / "w.h5")
    job = EmbedJob(Preparation(tiny(), {}), tmp_path / "out")
    list(embed_items(find_items(tmp_path / "w.h5", True), job))
    old = pd.read_parquet(tmp_path / "out/embeddings.parquet")
    items = [Item("p001_w1", "another state", lambda: week(100)), *find_items(tmp_path / "w.h5", True)[2:]]
    assert [o.status for o in embed_items(items, job)] == ["skipped", "done"]
    new = pd.read_parquet(tmp_path / "out/embeddings.parquet")
    assert (new["e000"] != old["e000"]).tolist() == [False, True, False] and new["id"].tolist() == old["id"].tolist()


def test_gaps_are_padding_and_batch_mates_don_t_matter(work, tmp_path):
    by = standardisers(str(work / "numbers.npz"), tiny())
    items = find_items(work / "weeks.h5", True)
    for batch in (1, 5): list(embed_items(items, EmbedJob(Preparation(tiny(), by), tmp_path / str(batch), batch=batch)))
    one, all_ = (pd.read_parquet(tmp_path / str(b) / "embeddings.parquet") for b in (1, 5))
    columns = [c for c in one if c[0] == "e"]
    np.testing.assert_allclose(one[columns], all_[columns], atol=1e-6)
    assert one["coverage"].tolist() == pytest.approx([1, 1, 1 - 2000 / WEEK, 1, 1], abs=1e-6)


def test_every_week_of_a_long_recording(tmp_path):
    x = np.random.default_rng(0).gamma(1., 100., 22 * 1440)
    item = Item("long", "", lambda: Recording("long", {"Activity": array_channel("Activity", x, 1 / 60, "counts", "ACTIVITY")}, start=MONDAY))
    assert {o.status for o in embed_items([item], EmbedJob(Preparation(tiny(), {}, embedding.WeekRule("all")), tmp_path))} == {"done"}
    table = pd.read_parquet(tmp_path / "embeddings.parquet")
    assert table["id"].tolist() == ["long_w1", "long_w2", "long_w3"] and set(table["recording"]) == {"long"} and table["start"].tolist()[1] == "2024-01-08T00:00:00"
    assert [o.status for o in embed_items([item], EmbedJob(Preparation(tiny(), {}, embedding.WeekRule("all")), tmp_path))] == ["skipped"]


# nights

def night(k: int, seconds=600., channels=("EEG", "EOG"), fs=40.) -> Recording:
    rng = np.random.default_rng(k)
    return Recording(f"n{k}", {c: array_channel(c, 30 * rng.standard_normal(int(seconds * fs)), fs, "uV", c) for c in channels}, start=datetime(2024, 1, 1, 22))


def test_a_folder_of_nights_one_of_which_lacks_a_channel(tmp_path):
    (tmp_path / "edf").mkdir()
    for k in range(3): write_edf(night(k, 600. + 60 * (k == 2), ("EEG", "EOG") if k != 1 else ("EEG",)), tmp_path / "edf" / f"n{k}.edf")
    (tmp_path / "edf" / "cut.edf").write_bytes((tmp_path / "edf" / "n0.edf").read_bytes()[:200])
    saved(sleeper(), tmp_path / "model")
    assert main(["embed", str(tmp_path / "edf"), str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--tokens"]) == 1
    table, ledger = pd.read_parquet(tmp_path / "out/embeddings.parquet"), pd.read_csv(tmp_path / "out/ledger.csv").set_index("id")
    assert table["id"].tolist() == ["n0", "n2"] and set(ledger.index[ledger["status"] == "failed"]) == {"n1", "cut"} and ledger["trace"].isna().all()
    with np.load(tmp_path / "out/tokens/n2.npz") as f: assert f["tokens"].shape == (2, 132, 16) and f["rows"].tolist() == ["EEG", "EOG"] and f["seconds_per_token"] == 5 and str(f["start"]) == "2024-01-01T22:00:00"
    assert main(["embed", str(tmp_path / "edf"), str(tmp_path / "model"), "--out", str(tmp_path / "partly"), "--allow-missing"]) == 1
    table = pd.read_parquet(tmp_path / "partly/embeddings.parquet").set_index("id")
    assert table.loc["n1", "caveats"] == "without EOG" and table.loc["n1", "coverage"] == .5
    said = pd.read_csv(tmp_path / "out/ledger.csv").set_index("id").loc["n1", "message"]
    assert "n1" in said and "EO" in said


@pytest.mark.skipif(not SHARED.exists(), reason="../shared isn't here")
def test_a_real_night_whose_channels_have_other_names(tmp_path):
    "Five minutes of Sleep-EDF: the ledger says what to type, and then it works."
    saved(sleeper(channels=("EEG", "EOG")), tmp_path / "model")
    line = "embed", str(SHARED / "realdata/psg_edf/sleepedf_SC4001_5min.edf"), str(tmp_path / "model"), "--out"
    assert main([*line, str(tmp_path / "a")]) == 1
    assert "--channels 'EEG=" in pd.read_csv(tmp_path / "a/ledger.csv")["message"].item()
    assert main([*line, str(tmp_path / "b"), "--channels", "EEG=EEG Fpz-Cz,EOG=EOG horizontal"]) == 0
    assert pd.read_parquet(tmp_path / "b/embeddings.parquet")["samples"].item() == 300 * 20


@pytest.mark.skipif(not SHARED.exists(), reason="../shared isn't here")
def test_a_published_night_encoder(tmp_path):
    "PFTSleep's file format: read, windowed, tokens as the encoder itself gives them."
    encoder = load_encoder(SHARED / "fixtures/pftsleep/pft_encoder_tiny.ckpt")
    c = encoder.config
    rec = Recording("n", {n: array_channel(n, np.random.default_rng(k).standard_normal(int(c.max_patches * c.patch * 1.25)), c.rate, "uV") for k, n in enumerate(c.channels)}, provenance=dict(recipe_hash="x"))
    encoder.recipe = None
    assert [o.status for o in embed_items([Item("n", "", lambda: rec)], EmbedJob(Preparation(encoder), tmp_path, tokens=True))] == ["done"]
    with np.load(tmp_path / "tokens/n.npz") as f: tokens = f["tokens"]
    x = torch.stack([torch.from_numpy(rec[n].samples(0, c.max_patches * c.patch)) for n in c.channels])[None]
    with torch.inference_mode(): first = encoder.encode(x).values[0].numpy()
    n = tokens.shape[1] - c.max_patches # what no other window reads
    np.testing.assert_allclose(tokens[:, :n], first[:, :n], atol=1e-5)


def test_a_store_and_its_recipe(tmp_path):
    "As prepared, from an archive, and refused where it was prepared for something else."
    recipes = dict(same=Recipe.default(["EEG", "EOG"], 20.), archive=Recipe.native(), other=Recipe.default(["EEG", "EOG"], 10.))
    for name, recipe in recipes.items():
        store = create_store(tmp_path / name, recipe)
        for k in range(2): store.add(embedding.apply_recipe(night(k), recipe))
        store.sync()
    rows = {}
    for name in recipes:
        outcomes = list(embed_items(find_items(tmp_path / name, False), EmbedJob(Preparation(sleeper()), tmp_path / f"{name}-out")))
        if name == "other": assert {o.status for o in outcomes} == {"failed"} and "pftsleep prepare" in outcomes[0].message; continue
        assert {o.status for o in outcomes} == {"done"}
        rows[name] = pd.read_parquet(tmp_path / f"{name}-out/embeddings.parquet").filter(regex=r"^e\d")
    np.testing.assert_allclose(rows["same"], rows["archive"], atol=.01) # the store rounds


def test_another_family_of_encoders(tmp_path):
    "SleepFM's has one row of tokens for all channels, and windows; nobody asks for its class."
    torch.manual_seed(0)
    encoder = SleepFMEncoder(SleepFMConfig(("EEG", "EOG"), rate=20., patch=200, d_model=16), Recipe.default(["EEG", "EOG"], 20.).to_dict())
    saved(encoder, tmp_path / "model")
    item = Item("n0", "", lambda: night(0, 65.))
    assert [o.status for o in embed_items([item], EmbedJob(Preparation(load_encoder(tmp_path / "model")), tmp_path / "out", tokens=True))] == ["done"]
    with np.load(tmp_path / "out/tokens/n0.npz") as f: assert f["tokens"].shape == (1, 7, 16) and f["rows"].tolist() == ["EEG+EOG"]


def test_what_doesn_t_belong_together(tmp_path):
    items = [Item("w", "", lambda: week(0)), Item("odd", "", lambda: night(0, channels=("EEG", "EMG")))]
    outcomes = list(embed_items(items, EmbedJob(Preparation(sleeper()), tmp_path)))
    assert [o.status for o in outcomes] == ["failed"] * 2 and "week of minutes" in outcomes[0].message and not any(o.trace for o in outcomes)
    no_recipe = sleeper()
    no_recipe.recipe = None
    outcome, = embed_items([Item("n", "", lambda: night(0))], EmbedJob(Preparation(no_recipe), tmp_path / "b"))
    assert "nothing says how" in outcome.message


def test_a_mistake_of_ours_stands_in_the_ledger_with_its_trace(tmp_path):
    def fails(): raise ZeroDivisionError("oh")
    outcomes = list(embed_items([Item("a", "", fails), Item("b", "", lambda: week(0))], EmbedJob(Preparation(tiny(), {}), tmp_path)))
    assert [o.status for o in outcomes] == ["failed", "done"] and "ZeroDivisionError" in outcomes[0].trace and "oh" in outcomes[0].message


def test_a_recording_that_a_batch_stumbles_over(tmp_path):
    "An absurd value spoils its own row only."
    bad = week(1)
    bad.values[5] = np.float32(3e38)
    outcomes = list(embed_items([Item("a", "", lambda: week(0)), Item("b", "", lambda: bad), Item("c", "", lambda: week(2))], EmbedJob(Preparation(tiny(instance_norm=False), {}), tmp_path)))
    table = pd.read_parquet(tmp_path / "embeddings.parquet")
    assert np.isfinite(table.filter(regex=r"^e\d")).all(axis=None) and {"a", "c"} <= set(table["recording"]) and len(outcomes) == 3


def test_nobody_waits_for_or_needs_the_training_framework(work, tmp_path):
    "Without lightning: embed works, finetune says what to install."
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'lightning'\", name='lightning')")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}
    run("embed", work / "weeks.h5", work / "model", "--out", tmp_path / "out", "--standardise", "subject", env=env)
    table = pd.read_parquet(tmp_path / "out/embeddings.parquet")
    assert table["off_distribution"].all() and table["caveats"].str.contains("no published model").all()
    assert "pip install 'pftsleep[train]'" in run("finetune", "a", "b", "c", "d", "e", code=1, env=env).stderr


def test_the_help_page_imports_nothing_heavy():
    code = "import sys; from pftsleep.apps.cli import main; main(['--help']); print([m for m in ('torch', 'pandas', 'zarr', 'sklearn', 'lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and len(done.stdout.splitlines()) <= 40


@settings(max_examples=15)
@given(st.binary(max_size=400), st.sampled_from(["a.h5", "a.csv", "a.agd", "a.rdata", "a.gz", "a.bin", "a.cwa", "a.gt3x", "a.awd"]))
def test_garbage_is_a_line_in_the_ledger(tmp_path_factory, data, name):
    root = tmp_path_factory.mktemp("garbage")
    (root / name).write_bytes(data)
    try: items = find_items(root / name, True)
    except PFTSleepError: return
    assert all(o.status == "failed" and not o.trace for o in embed_items(items, EmbedJob(Preparation(tiny(), {}), root / "out")))


@settings(max_examples=25)
@given(st.one_of(st.binary(max_size=100), st.from_type(dict).map(lambda d: repr(d).encode()), st.sampled_from([b"[]", b"{}", b'{"class": 3}', b'{"class": "PatchTransformer"}', b"null"])))
def test_a_garbled_model_is_refused(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("model")
    (root / "config.json").write_bytes(data)
    with pytest.raises(ModelError): load_encoder(root)


# the real thing

@pytest.mark.skipif(not SHARED.exists(), reason="../shared isn't here")
def test_published_weights_on_real_people(tmp_path):
    "PAT's file layout (random weights) and 50 people of NHANES, 23 of whom have a whole week without gaps; the tokens are those of the model itself."
    pytest.importorskip("rdata")
    people, weights = SHARED / "realdata/actigraphy/nhanes_r/example_activity_data.RData", SHARED / "fixtures/pat/PAT-S_random_weights.h5"
    with pytest.raises(ConfigError, match="--standardise FILE"): embedding.embed(str(people), str(weights), str(tmp_path / "x"))
    assert main(["embed", str(people), str(weights), "--out", str(tmp_path / "out"), "--standardise", "subject", "--tokens", "--partial"]) == 0
    table = pd.read_parquet(tmp_path / "out/embeddings.parquet")
    assert len(table) == 50 and (table["coverage"] == 1).sum() == 23 and table.filter(regex=r"^e\d").shape[1] == 96 and table["off_distribution"].all()
    items, encoder = find_items(people, True), load_encoder(weights)
    piece, = Preparation(encoder, {}, embedding.WeekRule(partial=True)).pieces(items[-1])
    with torch.inference_mode(): expected = encoder(piece.x) if not piece.pad.any() else encoder.encode(piece.x[None], piece.pad[None]).values[0]
    with np.load(tmp_path / "out/tokens" / f"{piece.id}.npz") as f: np.testing.assert_allclose(f["tokens"], expected.numpy(), atol=1e-5)
    facts = json.loads((tmp_path / "out/embedding.json").read_text())
    assert set(table["model"]) == {facts["model"]} and facts["prepared"]["standardise"] == "subject"


@pytest.mark.skipif(not SHARED.exists(), reason="../shared isn't here")
def test_real_watches(tmp_path):
    "AGD, AWD, MESA and Depresjon files in one folder: what can be embedded is, what can't says why."
    files = [p for p in (SHARED / "realdata/actigraphy").rglob("*") if p.suffix.lower() in (".agd", ".awd") or p.name in ("condition_1.csv", "control_1.csv")]
    if not files: pytest.skip("no such files")
    items = [i for p in files for i in find_items(p, True)]
    outcomes = list(embed_items(items, EmbedJob(Preparation(tiny(), {}, embedding.WeekRule(partial=True)), tmp_path)))
    assert not any(o.trace for o in outcomes) and sum(o.status == "done" for o in outcomes) >= 1


def test_files_of_the_same_name(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.csv").write_text("t,a\n")
    with pytest.raises(ReadError, match="two recordings are called x"): find_items(tmp_path, True)


def test_the_results_are_not_taken_for_recordings(work, tmp_path):
    "The folder of the results may lie in the source."
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ledger.csv").write_text("id\n")
    (tmp_path / "p.csv").write_text("t,a\n")
    assert [i.id for i in find_items(tmp_path, True, skip=tmp_path / "out")] == ["p"]
