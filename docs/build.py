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

from api import Api
from processed import NBS, WINGS, Chapter, chapters, split_directives

DOCS = ROOT / "docs"
CALLOUTS = {"note": "note", "tip": "tip", "important": "important", "warning": "warning", "caution": "caution"}
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


def outside_code(source: str, change) -> str:
    "Applies `change` to the text between fenced code blocks."
    parts = re.split(r"(^```.*?^```[ \t]*$)", source, flags=re.M | re.S)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def page(chapter: Chapter, pages: dict[str, str], api: Api) -> dict:
    "A notebook for MyST-NB."
    def markdown(text: str) -> str:
        text = callouts(heading_ids(relative_links(text, chapter, pages)))
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


def wing_page(wing: str, own: list[Chapter]) -> str:
    rows = "\n".join(f"| [{c.title}]({Path(c.page).name if '/' in c.page else '../' + c.page}.ipynb) | {c.description} |" for c in own)
    tree = "\n".join("/" + c.page for c in own)
    return f"# {wing.capitalize()}\n\n{{.lead}}\n{WINGS[wing]}\n\n| Chapter | What it is about |\n|:---|:---|\n{rows}\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"


def cards(found: list[Chapter]) -> str:
    out = ["::::{grid} 1 2 2 3", ":gutter: 3", ":class-container: wings", ""]
    for wing, about in WINGS.items():
        own = [c for c in found if c.wing == wing and c.page != "index"]
        if not own: continue
        names = ", ".join(c.title if c.title[:2].isupper() else c.title[0].lower() + c.title[1:] for c in own)
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
    for name in ["conf.py", "_static", "glossary.md"]:
        source = DOCS / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target / name)
    (target / "reference.md").write_text(api.reference())
    (target / "contributing.md").write_text(contributing(cfg))
    (target / "llms.txt").write_text(llms(found, cfg))
    return found


def landing(cells: list[dict], found: list[Chapter]) -> list[dict]:
    "The start page: cards in place of the list of chapters, and the tree of pages."
    wings = "\n".join(f"{w}/index" for w in WINGS if any(c.wing == w and c.page != "index" for c in found))
    for cell in cells: cell["source"] = cell["source"].replace("<!-- chapters -->", cards(found))
    tree = f"```{{toctree}}\n:hidden:\n\n{wings}\nreference\nglossary\ncontributing\n```"
    return [*cells, dict(cell_type="markdown", metadata={}, source=tree, id="pages")]


def contributing(cfg: dict[str, str]) -> str:
    "CONTRIBUTING.md, whose links lead to files of the repository."
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.sub(r"\]\((?!\w+:|#)([^)]+)\)", rf"]({cfg['git_url']}/blob/{cfg['branch']}/\1)", text)


def llms(found: list[Chapter], cfg: dict[str, str]) -> str:
    "The site as a list for language models (llmstxt.org)."
    lines = [f"# {cfg['title']}", "", f"> {cfg['description']}", ""]
    for wing in WINGS:
        if own := [c for c in found if c.wing == wing and c.page != "index"]:
            lines += [f"## {wing.capitalize()}", "", *(f"- [{c.title}]({cfg['site']}/{c.page}.html): {c.description}" for c in own), ""]
    return "\n".join([*lines, "## Optional", "", f"- [Every public name]({cfg['site']}/reference.html)", f"- [Glossary]({cfg['site']}/glossary.html)", ""])


def build(out: Path) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        source, site = Path(tmp) / "source", Path(tmp) / "site"
        write_sources(source)
        command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-j", "2", "-d", f"{tmp}/doctrees", str(source), str(site)]
        done = subprocess.run(command, env={**os.environ, "PFTSLEEP_ROOT": str(ROOT)}, capture_output=True, text=True)
        if done.returncode: raise SystemExit((done.stdout + done.stderr).replace(f"{source}/", "") + "-> the site was not built")
        shutil.copy2(source / "llms.txt", site)
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
