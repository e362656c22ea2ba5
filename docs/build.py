"""Builds the documentation site in _docs/ from the notebooks, with Sphinx.

    python docs/build.py [--out FOLDER]

nbdev processes the notebooks (hides what is hidden, links names); this script turns the result into pages that MyST-NB reads, with
one entry per public name made from the package itself: signature, table of parameters, methods, source. Executed outputs are the
ones stored in the notebooks. Warnings are errors, so a broken link doesn't get published.
"""
import argparse
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import bench_page
import yaml
from api import Api
from processed import NBS, WINGS, Chapter, chapters, split_directives

DOCS = ROOT / "docs"
CALLOUTS = {"note": "note", "tip": "tip", "important": "important", "warning": "warning", "caution": "caution"}
GROUPS = yaml.safe_load((DOCS / "groups.yml").read_text()) # wing -> title of a group -> names of its pages
PAGES = { # beside the notebooks: source -> what it is about
    "benchmarks": "what everything takes: seconds, memory, ratios against the naive way, growth", "glossary": "the words of sleep research and of this library",
    "cite": "how to cite this library, each original model, and data", "licences": "licences of weights and data, and what isn't known", "contributing": "from a clone to a changed notebook in ten minutes"}
HIDING = {"echo": "remove-input", "output": "remove-output", "include": "remove-cell"} # `#| echo: false` as a tag of MyST-NB


def settings() -> dict[str, str]:
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf8")
    cfg = dict(config["DEFAULT"])
    return {"git_url": f"https://github.com/{cfg['user']}/{cfg['repo']}", "site": f"https://{cfg['user']}.github.io/{cfg['repo']}", **cfg}


def callouts(source: str) -> str:
    "Quarto's fenced divs as MyST's."
    def fence(m: re.Match) -> str:
        classes, title = re.findall(r"\.([\w-]+)", m[2]), re.search(r'title="([^"]*)"', m[2])
        kind = next((CALLOUTS[c.removeprefix("callout-")] for c in classes if c.removeprefix("callout-") in CALLOUTS), None)
        if kind and title: return f"{m[1]}{{admonition}} {title[1]}\n:class: {kind}"
        return f"{m[1]}{{{kind}}}" if kind else f"{m[1]}{{div}} {' '.join(classes)}"
    return re.sub(r"^(:{3,}) *\{([^}]*)\} *$", fence, source, flags=re.M)


def heading_ids(source: str) -> str:
    "`## Title {#name .class}` as a MyST target before a plain heading."
    def target(m: re.Match) -> str:
        names = re.findall(r"#([\w-]+)", m[3])
        return "".join(f"({name})=\n" for name in names) + f"{m[1]} {m[2]}"
    return re.sub(r"^(#+) (.*?) *\{([#.][^}]*)\} *$", target, source, flags=re.M)


def relative_links(source: str, chapter: Chapter, pages: dict[str, str]) -> str:
    "Links to other notebooks as links to their pages."
    here = chapter.path.parent
    def link(m: re.Match) -> str:
        path = os.path.normpath(here / m[1])
        if path not in pages: raise SystemExit(f"nbs/{chapter.path} links to {m[1]}, which is no notebook")
        return f"]({os.path.relpath(pages[path] + '.ipynb', here)}{m[2] or ''}"
    return re.sub(r"\]\((?!\w+:|#|/)([^)\s#]+\.ipynb)(#[^)\s]*)?", link, source)


def repository_links(source: str, cfg: dict[str, str]) -> str:
    "Links to files of the repository that the site has a page of."
    blob = re.escape(f"{cfg['git_url']}/blob/{cfg['branch']}/")
    return re.sub(rf"\]\({blob}(?:docs/({'|'.join(PAGES)})\.md|(CONTRIBUTING)\.md|(benchmarks))\)", lambda m: f"](/{(m[1] or m[2] or m[3]).lower()}.md)", source)


def outside_code(source: str, change) -> str:
    "Applies `change` to the text between fenced code blocks."
    parts = re.split(r"(^```.*?^```[ \t]*$)", source, flags=re.M | re.S)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def page(chapter: Chapter, pages: dict[str, str], api: Api) -> dict:
    "A notebook for MyST-NB."
    cfg = settings()
    def markdown(text: str) -> str:
        text = callouts(heading_ids(repository_links(relative_links(text, chapter, pages), cfg)))
        if "{{<" in text: raise SystemExit(f"nbs/{chapter.path} has a Quarto shortcode, which the site can't show")
        return api.link(text)

    head = f"# {chapter.title}\n" + (f"\n{{.lead}}\n{markdown(chapter.description)}\n" if chapter.description else "")
    cells = [dict(cell_type="markdown", metadata={}, source=head)]
    for cell in chapter.nb["cells"]:
        if cell["cell_type"] == "code": cells += code_cell(cell, api, chapter)
        else: cells.append({**cell, "source": outside_code(cell["source"], markdown)})
    if module := api.module_of(chapter): cells.append(dict(cell_type="markdown", metadata={}, source=api.rest(module)))
    for i, cell in enumerate(cells): cell["id"] = f"cell-{i}"
    return {**chapter.nb, "cells": [c for c in cells if c["source"].strip()], "nbformat_minor": 5}


def code_cell(cell: dict, api: Api, chapter: Chapter) -> list[dict]:
    "A code cell with tags in place of directives; `show_doc(name)` becomes the entry of that name."
    directives, source = split_directives(cell["source"])
    if names := re.findall(r"^show_doc\(([\w.]+)", source, flags=re.M):
        return [dict(cell_type="markdown", metadata={}, source=api.entry(api.module_of(chapter), name)) for name in names]
    tags = [tag for key, tag in HIDING.items() if directives.get(key) == "false"]
    if directives.get("code-fold") in ("true", "show"): tags.append("hide-input")
    metadata: dict = {"tags": tags}
    caption = directives.get("fig-cap", "").strip("\"'")
    if alt := directives.get("fig-alt", caption).strip("\"'"): metadata["mystnb"] = {"image": {"alt": alt}}
    if caption: metadata.setdefault("mystnb", {})["figure"] = {"caption": caption}
    return [dict(cell_type="code", metadata=metadata, source=source, outputs=[_quiet(o) for o in cell["outputs"]], execution_count=None)]


def _quiet(output: dict) -> dict:
    "An output without the tables' style sheet, which would override the site's."
    if html := output.get("data", {}).get("text/html"):
        output["data"]["text/html"] = re.sub(r"<style scoped>.*?</style>", "", "".join(html), flags=re.S).replace('border="1" class="dataframe"', 'class="dataframe"')
    return output


def grouped(wing: str, own: list[Chapter]) -> dict[str, list[Chapter]]: # title of the group -> its chapters
    "The chapters of a wing as docs/groups.yml has them; the others come last."
    by_name = {Path(c.page).name: c for c in own}
    groups = {title: [by_name.pop(n) for n in names if n in by_name] for title, names in GROUPS.get(wing, {}).items()}
    return {title: found for title, found in [*groups.items(), ("More", list(by_name.values()))] if found}


def wing_page(wing: str, own: list[Chapter]) -> str:
    parts = [f"# {wing.capitalize()}", f"{{.lead}}\n{WINGS[wing]}"]
    for title, found in grouped(wing, own).items():
        rows = "\n".join(f"| [{c.title}](/{c.page}.ipynb) | {c.description} |" for c in found)
        tree = "\n".join(f"/{c.page}" for c in found)
        parts += [f"## {title}", f"| Chapter | What it is about |\n|:---|:---|\n{rows}", f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n{tree}\n```"]
    return "\n\n".join(parts) + "\n"


def cards(found: list[Chapter]) -> str:
    out = ["::::{grid} 1 2 2 3", ":gutter: 3", ":class-container: wings", ""]
    for wing, about in WINGS.items():
        own = [c for c in found if c.wing == wing and c.page != "index"]
        if not own: continue
        names = ", ".join(title if title[:2].isupper() else title[0].lower() + title[1:] for title in grouped(wing, own))
        out += [f":::{{grid-item-card}} {wing.capitalize()}", f":link: /{wing}/index", ":link-type: doc", "", about, "", "{.wing-chapters}", f"{names[0].upper()}{names[1:]}", ":::"]
    return "\n".join([*out, "::::"])


def write_sources(target: Path) -> list[Chapter]:
    "The folder that Sphinx reads."
    found, cfg = chapters(), settings()
    pages = {c.path.as_posix(): c.page for c in found}
    if twice := {p for p in pages.values() if list(pages.values()).count(p) > 1}: raise SystemExit(f"two notebooks would become the page {twice}")
    api = Api(found, cfg["git_url"], cfg["branch"])
    for c in found:
        file = target / f"{c.page}.ipynb"
        file.parent.mkdir(parents=True, exist_ok=True)
        built = page(c, pages, api)
        if c.page == "index": built["cells"] = landing(built["cells"], found)
        file.write_text(json.dumps(built))
    for wing in WINGS:
        if own := [c for c in found if c.wing == wing and c.page != "index"]:
            (target / wing).mkdir(exist_ok=True)
            (target / wing / "index.md").write_text(wing_page(wing, own))
    for picture in [p for p in NBS.rglob("*") if p.suffix in {".png", ".svg", ".jpg"}]:
        shutil.copy2(picture, target / picture.relative_to(NBS))
    for name in ["conf.py", "_static", *(f"{name}.md" for name in PAGES if (DOCS / f"{name}.md").exists())]:
        source = DOCS / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target / name)
    (target / "reference.md").write_text(api.reference())
    (target / "contributing.md").write_text(contributing(cfg))
    (target / "benchmarks.md").write_text(bench_page.page(ROOT / "benchmarks" / "results"))
    (target / "llms.txt").write_text(llms(found, cfg))
    (target / "llms-full.txt").write_text(llms_full(found, cfg, api))
    return found


def landing(cells: list[dict], found: list[Chapter]) -> list[dict]:
    "The start page: the figure and what it shows at the side, cards in place of the list of chapters, and the tree of pages."
    for cell in cells: cell["source"] = cell["source"].replace("<!-- chapters -->", cards(found))
    first = next(i for i, c in enumerate(cells) if any("image/png" in o.get("data", {}) for o in c.get("outputs", [])))
    cells[first]["metadata"]["tags"].append("hero")
    cells[first + 1]["source"] = f":::{{div}} hero-note\n{cells[first + 1]['source']}\n:::"
    table = next(i for i, c in enumerate(cells) if c["cell_type"] == "markdown" and c["source"].startswith("| You are"))
    cells[table]["source"] = f":::{{div}} readers\n{cells[table]['source'].partition(chr(10) * 2)[0]}\n:::\n\n{cells[table]['source'].partition(chr(10) * 2)[2]}"
    wings = "\n".join(f"{w}/index" for w in sorted(WINGS, key=lambda w: w != "tutorials") if any(c.wing == w and c.page != "index" for c in found)) # a newcomer begins there
    tree = f"```{{toctree}}\n:hidden:\n\n{wings}\nreference\n{chr(10).join(PAGES)}\n```"
    return [*cells, dict(cell_type="markdown", metadata={}, source=tree, id="pages")]


def contributing(cfg: dict[str, str]) -> str:
    "CONTRIBUTING.md, whose links lead to files of the repository."
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.sub(r"\]\((?!\w+:|#)([^)]+)\)", rf"]({cfg['git_url']}/blob/{cfg['branch']}/\1)", text)


def llms(found: list[Chapter], cfg: dict[str, str]) -> str:
    "The site as a list for language models (llmstxt.org): what it is, the commands, every page with a line about it."
    lines = [f"# {cfg['title']}", "", f"> {cfg['description']}", "", "Nights (polysomnography), weeks (actigraphy) and bouts (raw acceleration) in one data model. Needs Python 3.11 or newer. Research only; no medical device.", "",
        "## Commands", "", "- `pip install '.[train]'` in a clone: the library with what training needs", *(f"- `pftsleep {name}`: {about}" for name, about in commands().items()), ""]
    for wing in sorted(WINGS, key=lambda w: w != "tutorials"):
        own = [c for c in found if c.wing == wing and c.page != "index"]
        if own: lines += [f"## {wing.capitalize()}", "", *(f"- [{c.title}]({cfg['site']}/{c.page}.html): {c.description}" for group in grouped(wing, own).values() for c in group), ""]
    more = {"reference": "every public name in one line", **PAGES}
    return "\n".join([*lines, "## Optional", "", *(f"- [{name.capitalize()}]({cfg['site']}/{name}.html): {about}" for name, about in more.items()), f"- [The same with every public name]({cfg['site']}/llms-full.txt): signatures and first sentences", ""])


def llms_full(found: list[Chapter], cfg: dict[str, str], api: Api) -> str:
    "`llms.txt`, and below it every public name with its signature."
    return llms(found, cfg) + "\n## Every public name\n\n" + api.outline()


def commands() -> dict[str, str]: # name -> what it does, from the command's own help
    text = subprocess.run([sys.executable, "-c", "import sys; from pftsleep.apps.cli import main; sys.exit(main(['--help']))"], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"^  (\w+) +(\S.*)$", text, flags=re.M))


def build(out: Path) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        source, site = Path(tmp) / "source", Path(tmp) / "site"
        write_sources(source)
        command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-j", "2", "-d", f"{tmp}/doctrees", str(source), str(site)]
        done = subprocess.run(command, env={**os.environ, "PFTSLEEP_ROOT": str(ROOT)}, capture_output=True, text=True)
        if done.returncode: raise SystemExit((done.stdout + done.stderr).replace(f"{source}/", "") + "-> the site was not built")
        for name in ("llms.txt", "llms-full.txt"): shutil.copy2(source / name, site)
        (site / ".nojekyll").touch() # GitHub pages would drop folders that begin with an underscore
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = out.with_name(f"{out.name}.{os.getpid()}")
        shutil.copytree(site, fresh)
        if out.exists(): shutil.rmtree(out)
        fresh.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of the site")
    args = parser.parse_args()
    os.chdir(ROOT)
    build(args.out.resolve())
    print(f"{len(list(args.out.rglob('*.html')))} pages in {args.out}; look at them with: python -m http.server -d {args.out}")


if __name__ == "__main__": main()
