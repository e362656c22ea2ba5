"""Sphinx's settings; docs/build.py prepares the pages and starts it."""
import configparser
import os
from pathlib import Path

from docutils import nodes

ROOT = Path(os.environ["PFTSLEEP_ROOT"])
_config = configparser.ConfigParser(delimiters=["="])
_config.read(ROOT / "settings.ini", encoding="utf8")
cfg = _config["DEFAULT"]

project, author, release = cfg["title"], cfg["author"], cfg["version"]
copyright = cfg["copyright"]
html_title = cfg["title"]

extensions = ["myst_nb", "sphinx_design"]
nb_execution_mode = "off" # outputs are the ones stored in the notebooks
nb_ipywidgets_js: dict = {} # nothing is fetched from elsewhere
nb_code_prompt_show = "Code" # of folded cells
nb_code_prompt_hide = "Code"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "attrs_block", "attrs_inline", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]
smartquotes = False # '' is a value here
add_module_names = False
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
exclude_patterns = ["llms.txt", "llms-full.txt"]

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_context = {"default_mode": "auto"} # the theme logs an error without it
html_copy_source = False
html_show_sourcelink = False
html_sidebars: dict[str, list[str]] = {name: [] for name in ["index", "reference", "benchmarks", "glossary", "cite", "licences", "contributing"]}
html_theme_options = {
    "github_url": f"https://github.com/{cfg['user']}/{cfg['repo']}",
    "logo": {"text": cfg["title"], "alt_text": cfg["title"]},
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "show_toc_level": 2,
    "show_prev_next": True,
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "pygments_light_style": "friendly",
    "pygments_dark_style": "github-dark-high-contrast",
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "back_to_top_button": True,
}


def _math(self, node: nodes.Element) -> None:
    "Formulas as MathML, which browsers draw themselves; MathJax would have to be fetched."
    from latex2mathml.converter import convert
    self.body.append(convert(node.astext(), display="block" if isinstance(node, nodes.math_block) else "inline"))
    raise nodes.SkipNode


def setup(app) -> None: app.add_html_math_renderer("mathml", inline_renderers=(_math, None), block_renderers=(_math, None))


html_math_renderer = "mathml"
