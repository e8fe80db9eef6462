"""A page of HTML that loads nothing, runs no script but ours, and in which all text is text."""

import base64
import hashlib
import unicodedata
from html import escape

MARK = "<!DOCTYPE html><!-- made by scaled.report -->"
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#555555", "#7b3294", "#b2182b")
DARK = ("#56b4e9", "#ff9d5c", "#3ddbb0", "#f0a6cf", "#f0e442", "#bbbbbb", "#c2a5cf", "#f4a582")
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 1 2")  # for eyes, and grey

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1b1b; --dim: #5f5f5f; --rule: #ddd;
  --box: #f6f6f6; --other: 213 94 0; COLOURS_LIGHT }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --text: #e6e6e6; --dim: #a5a5a5;
  --rule: #3a3d42; --box: #1e2126; --other: 255 157 92; COLOURS_DARK } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 85rem;
  background: var(--back); color: var(--text); }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
h3 { font-size: .95rem; margin: 1rem 0 .3rem; } p { max-width: 46rem; } .dim { color: var(--dim); }
h1, h2, h3, td, th, summary { overflow-wrap: break-word; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0;
  border-bottom: 1px solid var(--rule); min-width: 4.5rem; max-width: 34rem; }
th { font-weight: 600; } td.text { white-space: pre-wrap; font: 13px/1.45 ui-monospace, monospace; }
.panels { display: grid; gap: .4rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .85rem; }
svg { display: block; fill: var(--text); font-size: 10px; }
.panels svg { width: 100%; height: auto; }
.maps { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.gap { stroke: var(--back); } .grid { stroke: var(--rule); fill: none; }
.line { fill: none; stroke-width: 1.6; } .head { font-size: 12px; font-weight: 600; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.mono { font: 11px ui-monospace, monospace; } .asked { fill: var(--dim); }
.field { fill: var(--box); } .ring { fill: none; stroke: var(--text); stroke-width: 1.2; }
.other1 { fill: rgb(var(--other) / .35); } .other2 { fill: rgb(var(--other) / .6); }
.other3 { fill: rgb(var(--other) / .95); } .key { display: inline-block; width: 2.2rem; }
.key svg { display: inline; width: 2rem; height: .7rem; } .reward { white-space: nowrap; }
summary { cursor: pointer; }
@media (max-width: 40rem) { table.stack, .stack tbody, .stack tr, .stack td { display: block; }
  .stack thead { display: none; } .stack td { border: 0; max-width: none; }
  .stack tr { border-bottom: 1px solid var(--rule); padding: .5rem 0; }
  .stack td[data-is]::before { content: attr(data-is); color: var(--dim); display: block;
    font: 12px system-ui, sans-serif; } }
"""


def style() -> str:
    rules = "".join(
        f".run{i} {{ stroke: var(--run{i}); stroke-dasharray: {dash}; }} "
        f".dot.run{i} {{ fill: var(--run{i}); stroke: none; }}\n" for i, dash in enumerate(DASHES))
    text = STYLE + rules
    for name, colours in (("COLOURS_LIGHT", LIGHT), ("COLOURS_DARK", DARK)):
        text = text.replace(name, " ".join(
            f"--run{i}: {colour};" for i, colour in enumerate(colours)))
    return text


def printable(text) -> str:
    """What has no shape of its own, or turns the direction of the text after it, is written out: it
    could hide or reorder what a reader sees."""
    return "".join(
        x if x in "\n\t" or unicodedata.category(x) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else f"\\u{ord(x):04x}" for x in str(text))


def visible(text) -> str:
    """Printable, and escaped for HTML, between tags or in quotes."""
    return escape(printable(text))


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Cells are HTML. kind: a class; "stack" puts the cells of a row below each other where the
    screen is narrow, each under its head."""
    body = "".join("<tr>" + "".join(
        f'<td class="{"text" if kind == "stack" else ""}" data-is="{title}">{cell}</td>'
        for title, cell in zip(head, row, strict=True)) + "</tr>\n" for row in rows)
    heads = "".join(f"<th>{title}</th>" for title in head)
    return (f'<div class="scroll"><table class="{kind}"><thead><tr>{heads}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>\n")


def digest(text: str) -> str:
    """The source of a policy that allows this very text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page(title: str, sections: list[tuple[str, str]], mark: str = MARK, css: str = "",
         script: str = "") -> str:
    """Titles are text, sections HTML; mark, the first line, says who made the page. The policy lets
    a browser load nothing, use no style but this one with css behind it, and run nothing but the
    script. A section without a title has no heading."""
    css = style() + css
    body = "".join((f"<h2>{visible(name)}</h2>\n" if name else "") + html for name, html in sections)
    policy = f"default-src 'none'; style-src {digest(css)}"
    if script:
        policy += f"; script-src {digest(script)}"
        body += f"<script>{script}</script>\n"
    return f"""{mark}
<html lang="en"><head><meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="{policy}"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{visible(title)}</title><style>{css}</style></head>
<body><h1>{visible(title)}</h1>
{body}</body></html>
"""
