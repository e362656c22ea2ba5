"""Entries of the site for public names: signature, meaning, parameters, methods and source, read from the package.

nbdev's own `show_doc` is not used, since in the version pinned here it shows parameters as source code (no table), leaves out the
fields of dataclasses, and gives the comment of `**kwargs` to the return value.
"""
import ast
import dataclasses
import enum
import importlib
import inspect
import re
import tokenize
from collections.abc import Iterator
from io import StringIO
from operator import attrgetter
from pathlib import Path
from typing import get_args

from fastcore.docments import docments
from processed import ROOT, Chapter

LONGEST_SOURCE = 80 # lines shown in place; longer ones are linked


class Api:
    "All public names of the package, and how the site shows and links them."
    def __init__(self, chapters: list[Chapter], git_url: str, branch: str):
        self.blob = f"{git_url}/blob/{branch}"
        self.pages = {c.page: name for c in chapters if (name := self._module_name(c))}
        self.modules = {name: importlib.import_module(name) for name in self.pages.values()}
        self.shown = {f"{self.module_of(c)}.{name}" for c in chapters for name in _shown(c)}
        self.names = self._index()

    def _module_name(self, chapter: Chapter) -> str | None:
        name = "pftsleep." + chapter.page.replace("/", ".")
        return name if (ROOT / name.replace(".", "/")).with_suffix(".py").exists() else None

    def module_of(self, chapter: Chapter) -> str | None: return self.pages.get(chapter.page)

    def _index(self) -> dict[str, str]: # short name -> full name; None where two modules have it
        index: dict[str, str] = {}
        for full in self.shown:
            module = next(m for m in self.modules if full.startswith(m + "."))
            for short in {full, full.removeprefix(module + "."), full.removeprefix("pftsleep.")}:
                index[short] = "" if short in index and index[short] != full else full
        return {short: full for short, full in index.items() if full}

    def link(self, text: str) -> str:
        "Names in backticks as links to their entries, in place of the ones that nbdev made to the published site."
        text = re.sub(r"\[`([^`]+)`\]\(https://[^)]*#[^)]*\)", r"`\1`", text)
        def role(m: re.Match) -> str:
            full = self.names.get(m[1].removesuffix("()"))
            return f"{{py:obj}}`{m[1]} <{full}>`" if full else m[0]
        return re.sub(r"(?<![\[`}])`([A-Za-z_][\w.]*(?:\(\))?)`(?!`)", role, text)

    def entry(self, module: str, name: str) -> str:
        "One name of a notebook's module."
        obj = attrgetter(name)(self.modules[module])
        if inspect.isclass(obj): return self._class(obj, module, name)
        return self._function(inspect.unwrap(obj.fget if isinstance(obj, property) else obj), module, name, "property" if isinstance(obj, property) else None)

    def _function(self, fn, module: str, name: str, kind: str | None = None, fence: int = 5, source: bool = True) -> str:
        kind = kind or ("method" if "." in name else "function")
        body = [self.link(inspect.getdoc(fn) or ""), self._table(_parameters(fn)), self._returns(fn), self._source(fn) if source else ""]
        return _directive(kind, name + ("" if kind == "property" else _signature(fn)), module, body, fence)

    def _class(self, cls: type, module: str, name: str) -> str:
        if issubclass(cls, enum.Enum): head, table = "", self._members(cls)
        else: head, table = _signature(cls), self._table(_parameters(cls))
        if len(head) > 120: head = "(...)" # the table says it all
        body = [self.link(_own_doc(cls)), table, *self._methods(cls, module, name), self._source(cls)]
        return _directive("class", name + head, module, body, 6)

    def _methods(self, cls: type, module: str, name: str) -> Iterator[str]:
        for key, value in vars(cls).items():
            if key.startswith("_") or f"{module}.{name}.{key}" in self.shown: continue
            fn = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(fn) and fn.__module__ == module:
                yield self._function(fn, module, f"{name}.{key}", "property" if isinstance(value, property) else _method_kind(value), 5, source=False)

    def _table(self, parameters: list[dict]) -> str:
        if not parameters: return ""
        kind = lambda p: " = ".join(filter(None, [self.link(_code(p["type"])), _code(p["default"])]))
        about = lambda p: p["meaning"] or _first_sentence(p["annotation"]) # a class of ours, which needs no further comment
        columns = {"Parameter": [f"`{p['name']}`" for p in parameters], "Type": [kind(p) for p in parameters],
            "Meaning": [_cell(self.link(about(p))) for p in parameters]}
        return _markdown_table({head: cells for head, cells in columns.items() if any(cells)})

    def _members(self, cls: type[enum.Enum]) -> str:
        return _markdown_table({"Member": [f"`{m.name}`" for m in cls], "Value": [f"`{m.value!r}`" for m in cls]})

    def _returns(self, fn) -> str:
        meaning = "" if "return" not in (d := docments(fn)) or d["return"] == _star_comments(fn).get("**") else d["return"] or ""
        kind = _type(inspect.signature(fn).return_annotation)
        return f"**Returns** {_code(kind)}{': ' if kind and meaning else ''}{self.link(meaning)}" if meaning else ""

    def _source(self, obj) -> str:
        lines, first = inspect.getsourcelines(obj)
        path = Path(inspect.getsourcefile(obj)).relative_to(ROOT).as_posix()
        where = f"[{path}, line {first}]({self.blob}/{path}#L{first})"
        if len(lines) > LONGEST_SOURCE: return f"Source: {where}"
        return f":::{{dropdown}} Source\n:class-container: source\n\n```python\n{inspect.cleandoc(''.join(lines)) if lines[0].startswith(' ') else ''.join(lines).rstrip()}\n```\n{where}\n:::"

    def rest(self, module: str) -> str:
        "Constants of a module, which no cell of the notebook shows as an entry."
        out = []
        for name, value, comment in _constants(self.modules[module]):
            text = repr(value)
            body = [self.link(comment), f"`{text}`" if len(text) <= 200 and "`" not in text and "\n" not in text else ""]
            out.append(_directive("data", name, module, body, 5))
        return "\n\n".join(["## Constants", *out]) if out else ""

    def names_by_module(self) -> Iterator[tuple[str, str, list[str]]]: # page, module, names without it
        "Every module that has public names, in the order of reading."
        for page, module in self.pages.items():
            if names := sorted((n.removeprefix(module + ".") for n in self.shown if n.startswith(module + ".")), key=str.lower): yield page, module, names

    def reference(self) -> str:
        "A page with every public name in one line, by wing."
        out, wing = ["# Reference", "", "{.lead}", "Every public name, by wing and module. Each links to the chapter that introduces it, shows it working and tests it.", ""], ""
        for page, module, names in self.names_by_module():
            short = module.removeprefix("pftsleep.")
            own = short.partition(".")[0].capitalize() if "." in short else "All wings"
            if own != wing: out += [f"## {own}", ""]
            wing = own
            out += [f"### [{short}](/{page}.ipynb)", "", _markdown_table({
                "Name": [f"{{py:obj}}`{n} <{module}.{n}>`" for n in names],
                "What it is": [_cell(self.link(_first_sentence(attrgetter(n)(self.modules[module])))) for n in names]}), ""]
        return "\n".join(out)

    def outline(self) -> str:
        "Signature and first sentence of every public name, as plain text."
        out = []
        for _, module, names in self.names_by_module():
            out += [f"### {module}", ""]
            for n in names:
                obj = attrgetter(n)(self.modules[module])
                callable_ = inspect.isroutine(obj) or (inspect.isclass(obj) and not issubclass(obj, enum.Enum))
                out.append(f"- `{n}{_signature(inspect.unwrap(obj)) if callable_ else ''}`: {_first_sentence(obj)}")
            out.append("")
        return "\n".join(out)


def _shown(chapter: Chapter) -> list[str]:
    "Names that a notebook has an entry for."
    source = "\n".join(c["source"] for c in chapter.nb["cells"] if c["cell_type"] == "code")
    return re.findall(r"^show_doc\(([\w.]+)", source, flags=re.M)


def _directive(kind: str, head: str, module: str, body: list[str], fence: int) -> str:
    text = "\n\n".join(part for part in body if part)
    return f"{'`' * fence}{{py:{kind}}} {head}\n:module: {module}\n\n{text}\n{'`' * fence}"


def _markdown_table(columns: dict[str, list[str]]) -> str:
    rows = zip(*columns.values(), strict=True)
    return "\n".join(f"| {' | '.join(row)} |" for row in [tuple(columns), [":---"] * len(columns), *rows])


def _signature(obj) -> str:
    "Names and defaults; types stand in the table."
    try: sig = inspect.signature(obj)
    except ValueError: return "()"
    plain = [p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else _Shown(_default(p.default))) for p in sig.parameters.values() if p.name not in ("self", "cls")]
    returned = "" if inspect.isclass(obj) else _type(sig.return_annotation)
    return f"{inspect.Signature(plain)}{' -> ' + returned if returned else ''}"


class _Shown(str):
    "A default that prints as it should read."
    def __repr__(self): return str(self)


def _default(value) -> str:
    if isinstance(value, enum.Enum): return f"{type(value).__name__}.{value.name}"
    text = repr(value)
    if inspect.isclass(value) or inspect.isfunction(value): return value.__qualname__
    return text if len(text) <= 60 and "<" not in text else "..."


def _type(annotation) -> str:
    if annotation is inspect.Parameter.empty or annotation is None: return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+([A-Za-z_])", r"\1", text)


def _parameters(obj) -> list[dict]:
    "Name, type, default and comment of each parameter of a function, or field of a dataclass."
    if inspect.isclass(obj) and "__init__" not in vars(obj): return [] # an inherited constructor is described where it is defined
    try: comments, sig = all_comments(obj), inspect.signature(obj)
    except (ValueError, TypeError): return []
    stars = _star_comments(obj.__init__ if inspect.isclass(obj) else obj)
    out = []
    for p in sig.parameters.values():
        if p.name in ("self", "cls"): continue
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        own = next((t for t in (p.annotation, *get_args(p.annotation)) if inspect.isclass(t) and t.__module__.startswith("pftsleep.")), None)
        out.append(dict(name=star + p.name, type=_type(p.annotation), annotation=own, default="" if p.default is p.empty else _default(p.default),
            meaning=stars.get(star, "") if star else comments.get(p.name) or ""))
    return out


def all_comments(obj) -> dict[str, str | None]:
    "Comments on parameters; those on a dataclass's inherited fields stand in the classes that it inherits from."
    if not dataclasses.is_dataclass(obj): return docments(obj)
    found: dict[str, str | None] = {}
    for base in reversed(obj.__mro__):
        if dataclasses.is_dataclass(base): found |= {name: text for name, text in docments(base).items() if text}
    return found


def _star_comments(fn) -> dict[str, str]: # '*' or '**' -> comment
    "Comments of `*args` and `**kwargs`, which docments takes for others'."
    try: lines = inspect.getsource(fn).splitlines()
    except (OSError, TypeError): return {}
    found = [re.match(r"\s*(\*{1,2})\w+[^#]*?,?\s*#\s*(.*)", line) for line in lines]
    return {m[1]: m[2].strip() for m in found if m}


def _own_doc(cls: type) -> str: return inspect.cleandoc(cls.__dict__.get("__doc__") or "") if not (cls.__dict__.get("__doc__") or "").startswith(f"{cls.__name__}(") else ""


def _method_kind(value) -> str: return {classmethod: "classmethod", staticmethod: "staticmethod"}.get(type(value), "method")


def _constants(module) -> Iterator[tuple[str, object, str]]: # name, value, comment
    "Public assignments at the top of a module."
    source = Path(module.__file__).read_text()
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(StringIO(source).readline) if t.type == tokenize.COMMENT}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            if isinstance(target, ast.Name) and not target.id.startswith("_"):
                yield target.id, getattr(module, target.id), comments.get(node.end_lineno, "") or comments.get(node.lineno, "")


def _first_sentence(obj) -> str:
    text = "" if obj is None else (inspect.getdoc(obj) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[a-z`)\]])\. (?=[A-Z])", text)[0].rstrip(".") + "." if text else ""


def _code(text: str) -> str: return f"`{_cell(text)}`" if text else ""


def _cell(text: str) -> str: return re.sub(r"(?<!\\)\|", r"\\|", text).replace("\n", " ")
