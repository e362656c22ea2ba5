"""The page of benchmarks, made from benchmarks/results/*.jsonl. Nothing is measured here.

    python tools/bench_page.py [FOLDER]    # the page as Markdown

The scripts print whatever figures they have, so the page is made by rules: a line's settings, its figures, the machine that it names, and how busy that machine was. Ratios are those that a script printed for one run; where
it printed the naive way and ours without a ratio, the ratio is computed here.
"""
import ast
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
ABOUT = {"benchmark", "hardware", "measured", "load", "cpu", "torch"} # of the run, and not of the figure
MACHINE = {"cpu": "processor", "cores": "cores", "memory_gib": "memory, GiB", "gpu": "GPU", "bf16": "bf16 instructions", "os": "system", "python": "Python", "torch": "torch"}
SETTINGS = {"way", "form", "what", "size", "preset", "precision", "embedding", "file", "people", "channels", "hours", "rate", "tokens", "windows", "batch", "animals", "cohorts", "recordings", "nights", "candidates", "mode", "modalities",
    "width", "workers", "ranks", "threads", "repeats", "calls", "frugal", "recipe", "server", "module", "codec", "signals", "seconds", "rows", "mib", "edf_mb", "epochs", "parameters"}
RATIO = re.compile(r"(^|_)ratio$|^faster|^times_|naive_over|(memory|cpu)_share$")
SIZES = re.compile(r"recordings?|nights?|people") # 'what' of a line that compares sizes and not ways
NAIVE = {"naive", "original", "plain", "pandas"} # ways that others are compared with
GROWS = ("nights", "recordings", "people", "hours", "channels", "animals", "tokens", "candidates", "workers", "ranks")
UNITS = {"s": "s", "ms": "ms", "mib": "MiB", "mb": "MB", "gflops": "GFLOP/s"}
Row = dict[str, object]


def read_results(folder: Path) -> dict[str, list[Row]]:
    "Lines of each file, by its name. Stops at a line that isn't JSON."
    found: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for n, line in enumerate(path.read_text().splitlines(), 1):
            try: found.setdefault(path.stem, []).append(json.loads(line))
            except json.JSONDecodeError as e: raise SystemExit(f"{path.name}, line {n}: {e} -> measure again: python tools/bench.py {path.stem}") from e
    return found


def scripts() -> dict[str, str]: # name -> the first sentence of its docstring
    return {p.stem: (ast.get_docstring(ast.parse(p.read_text())) or "").split("\n\n")[0].replace("\n", " ").split(" Prints ")[0] for p in sorted(BENCHMARKS.glob("[!_]*.py"))}


def machines(results: dict[str, list[Row]]) -> dict[str, str]: # hardware as JSON -> letter
    "The machines that are named, each with a letter. Threads are a setting of the run and not of the machine."
    named = dict.fromkeys(_machine(row) for rows in results.values() for row in rows if row.get("hardware"))
    return {m: chr(ord("A") + i) for i, m in enumerate(named)}


def _machine(row: Row) -> str: return json.dumps({k: v for k, v in dict(row["hardware"]).items() if k in MACHINE}, sort_keys=True)


def trust(row: Row, letters: dict[str, str]) -> str: # such as 'A', 'A, busy', 'not named, load unknown'
    "Where a figure was measured, and whether something else was at work there."
    machine = letters[_machine(row)] if row.get("hardware") else "not named"
    if row.get("load") is None: return f"{machine}, load unknown"
    return f"{machine}, busy" if float(row["load"]) > int(row.get("threads") or 1) + 1 else machine


def shown(value: object) -> str:
    "A cell of a table."
    if value is None: return ""
    if isinstance(value, bool): return "yes" if value else "no"
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value): return f"{shown(value[0])} to {shown(value[1])}"
    if isinstance(value, list | tuple): return ", ".join(shown(v) for v in value)
    if isinstance(value, dict): return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    if isinstance(value, int): return f"{value:,}".replace(",", " ") if abs(value) >= 10_000 else str(value)
    if isinstance(value, float): return f"{value:,.0f}".replace(",", " ") if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", r"\|")


def heading(key: str) -> str: # 'peak_mib' -> 'peak, MiB'
    name, _, unit = key.rpartition("_")
    if unit in UNITS and name and not name.endswith("per"): return f"{_words(name)}, {'rows/s' if name.endswith('rows') else UNITS[unit]}".replace(" rows, rows/s", ", rows/s")
    return _words(key)


def _words(key: str) -> str: return re.sub(r"\b(mib)\b", "MiB", re.sub(r"\bcpu\b", "CPU", key.replace("_", " ")))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    right = [all(re.match(r"^[-\d. ]*$", row[i]) for row in rows) for i in range(len(columns))]
    line = lambda cells: f"| {' | '.join(cells)} |"
    return "\n".join([line(columns), line(["---:" if r else ":---" for r in right]), *(line(row) for row in rows)])


def case(row: Row, without: Sequence[str] = ()) -> dict[str, object]:
    return {k: v for k, v in row.items() if k in SETTINGS and k not in without}


def ratios(rows: list[Row]) -> Iterator[tuple[Row, str, float]]: # the line, what is compared, how many times
    "Printed ratios; where a naive way stands beside ours without one, ratios of its seconds of the processor and of its memory."
    printed = [(row, k, v) for row in rows for k, v in row.items() if RATIO.search(k) and isinstance(v, int | float) and row.get("what") != "codec" and not SIZES.search(str(row.get("what", "")))]
    yield from ((row, _words(k), float(v)) for row, k, v in printed if row.get("way", row.get("form")) not in NAIVE)
    if printed: return
    same = lambda row: json.dumps(case(row, ("way", "form", "precision", "repeats")), sort_keys=True)
    naive = {same(row): row for row in rows if row.get("way", row.get("form")) in NAIVE}
    for row in rows:
        base = naive.get(same(row))
        if base is None or base is row: continue
        for key in ("total_cpu_s", "encoder_cpu_s", "cpu_s", "peak_mib"):
            if key in row and key in base and row[key]: yield row, f"{heading(key).split(',')[0]}: naive / ours", round(float(base[key]) / float(row[key]), 2)


def growth(rows: list[Row]) -> Iterator[tuple[dict[str, object], str, list[tuple[float, Row]], str]]: # what is fixed, what grows, its values with lines, the cost
    "Series of lines that differ in one size only, with at least two sizes, and the figures that are costs."
    for size in GROWS:
        series: dict[str, list[Row]] = {}
        for row in rows:
            if isinstance(row.get(size), int | float): series.setdefault(json.dumps([row.get("benchmark"), case(row, (size, "parameters", "repeats", "rows", "mib", "edf_mb"))], sort_keys=True), []).append(row)
        for found in series.values():
            by_size = dict(sorted((float(row[size]), row) for row in found))
            by_size.pop(0., None) # such as 0 workers, which is another way and no size
            if len(by_size) < 2: continue
            for key in found[0]:
                if re.search(r"(^|_)(total_cpu_s|encoder_cpu_s|cpu_s|cpu_ms|median_s|cpu_rows_s|ms_each|cpu_s_each|epoch_s|peak_mib|held_mib|last_mib)$", key) and all(row.get(key) for row in found):
                    yield case(found[0], (size, "repeats", "parameters", "rows", "mib")), size, list(by_size.items()), key


def power(points: Sequence[tuple[float, float]]) -> float: # 1: twice the size costs twice as much
    (a, x), (b, y) = points[0], points[-1]
    return math.log(y / x) / math.log(b / a)


def _settings(about: dict[str, object]) -> str: return ", ".join(f"{_words(k)} {shown(v)}" if not isinstance(v, str) else shown(v) for k, v in about.items())


def machine_table(results: dict[str, list[Row]], letters: dict[str, str]) -> str:
    rows = [[letter, *(shown(json.loads(m).get(k)) or "none" for k in MACHINE)] for m, letter in letters.items()]
    days = sorted({str(row["measured"])[:10] for lines in results.values() for row in lines if row.get("measured")})
    when = f"\n\nMeasured {days[0]}{f' to {days[-1]}' if len(days) > 1 else ''}." if days else ""
    return (table(["", *MACHINE.values()], rows) if rows else "No result names its machine.") + when


def ratio_table(results: dict[str, list[Row]], letters: dict[str, str]) -> str:
    rows = [[f"[{name}](#{_anchor(name)})", _settings(case(row, ("threads", "repeats", "calls", "parameters", "rows", "mib", "batch"))), what, shown(value), trust(row, letters)] for name, lines in results.items() for row, what, value in ratios(lines)]
    return table(["benchmark", "case", "figure", "times", "machine"], rows) if rows else "No result has one."


def growth_table(results: dict[str, list[Row]], letters: dict[str, str]) -> str:
    rows = []
    for name, lines in results.items():
        for about, size, points, key in growth(lines):
            values = [(n, float(row[key])) for n, row in points]
            rows.append([f"[{name}](#{_anchor(name)})", _settings({k: v for k, v in about.items() if k not in ("threads", "calls")}), size, " → ".join(shown(n) for n, _ in values), heading(key), " → ".join(shown(v) for _, v in values),
                f"{power(values):.2f}", trust(points[-1][1], letters)])
    return table(["benchmark", "case", "what grows", "sizes", "figure", "values", "power", "machine"], rows) if rows else "No result was taken at two sizes."


def _anchor(name: str) -> str: return f"bench-{name}"


def section(name: str, rows: list[Row], about: dict[str, str], letters: dict[str, str]) -> str:
    "Every line of one file; what is the same in all of them stands above the table."
    parts = [f"({_anchor(name)})=\n### {name}", about.get(name) or about.get(name.partition("-")[0], ""), f"`python tools/bench.py {name}`"]
    shapes: dict[tuple, list[Row]] = {}
    for row in rows: shapes.setdefault((row.get("benchmark"), *sorted(k for k in row if k not in ABOUT)), []).append(row)
    for (benchmark, *_), lines in shapes.items():
        keys = [k for k in lines[0] if k not in ABOUT]
        constant = [k for k in keys if k in SETTINGS and len(lines) > 1 and len({json.dumps(r[k]) for r in lines}) == 1]
        columns = [k for k in keys if k not in constant]
        note = f" ({', '.join(f'{heading(k)} {shown(lines[0][k])}' for k in constant)})" if constant else ""
        parts += [f"**{benchmark}**{note}", table([*map(heading, columns), "machine"], [[*(shown(r[k]) for k in columns), trust(r, letters)] for r in lines])]
    return "\n\n".join(p for p in parts if p)


INTRO = """# Benchmarks

{.lead}
What it takes: seconds, memory, and how many times less than the obvious way of writing the same thing.

Each figure is a line that a script of `benchmarks/` printed, with the machine that it ran on. `make bench` measures all of them on yours and makes this page of them. Read them with three things in mind:

- **Ratios hold better than seconds.** Both sides of a ratio ran in turns on one machine, a moment apart. *Naive* is the plain form of the same computation, or the original's way; each script says which.
- **busy** means that the machine had other work at the time: the load average was more than one above the script's own threads. Seconds of the processor (CPU) tell more then than those of the clock, and both are too high rather than too low. *Not named* is a line
  whose machine wasn't recorded. Neither should be quoted as a result.
- A figure that a script repeated is the median; `spread`, or fastest and slowest, is the range. `repeats 0` or `repeats 1` says that there was a single run, of which no spread can be given."""


def page(folder: Path) -> str:
    "The whole page."
    results, about = read_results(folder), scripts()
    letters = machines(results)
    counted = [trust(row, letters) for rows in results.values() for row in rows]
    doubtful = sum("busy" in t or "not named" in t or "unknown" in t for t in counted)
    missing = [name for name in about if name not in results and not any(r.partition("-")[0] == name for r in results)]
    parts = [INTRO, f"There are {len(counted)} figures of {len(results)} runs here; {doubtful} of them are marked as busy or not named.", "## Machines and versions", machine_table(results, letters),
        "## Against the naive way", "A ratio above 1 says that ours needs less, but for a *share*, which is the part of the naive way's memory or time that ours needs.", ratio_table(results, letters),
        "## How cost grows", "A *power* of 1 says that twice the size costs twice as much, 2 that it costs four times as much, 0 that size doesn't matter; for rates (rows/s) 0 is what one hopes for. Why nights grow as they do is told in [](/tutorials/what_it_costs.ipynb).",
        growth_table(results, letters), "## Every figure", *(section(name, rows, about, letters) for name, rows in results.items())]
    if absent := [size for size in ("nights", "workers") if not any(row_size in ((size, "recordings") if size == "nights" else (size, "ranks")) for rows in results.values() for _, row_size, _, _ in growth(rows))]:
        parts.insert(parts.index("## Every figure"), f"Not measured yet, or not in the committed results: growth with {' and '.join(absent)}.")
    if missing: parts += ["### Without a committed result", "These can be measured, but nobody has committed figures of a named machine:\n\n" + "\n".join(f"- `{name}`: {about[name]}" for name in missing)]
    return "\n\n".join(parts) + "\n"


def main() -> None: print(page(Path(sys.argv[1]) if len(sys.argv) > 1 else BENCHMARKS / "results"), end="")


if __name__ == "__main__": main()
