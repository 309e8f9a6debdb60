"""Write a report as one page of HTML, or as JSON."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from merging.models.kinds import Layer
from merging.problems import printable
from merging.recipes.recipe import table
from merging.runs.phrases import listed, percent
from merging.runs.pictures import INSTALL, can_draw, draw
from merging.runs.report import Number, Numbers, Report
from merging.runs.sections import Section, sections, unlike
from merging.runs.sentences import is_trimmed, sentences

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --paper: #ffffff; --line: #d5dae0;
  --faint: #59636e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #14181c; --line: #39414a;
  --faint: #a3adb8; } }
"""
PAGE_STYLE = (
    STYLE
    + """
body { margin: 2em auto; padding: 0 1.5em; max-width: 1100px; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin: 2em 0 0.3em; }
p, li { max-width: 48em; } p { color: var(--faint); margin: 0.3em 0; }
pre { padding: 0.8em; border: 1px solid var(--line); overflow-x: auto; font-size: 0.85em; }
svg { width: 100%; height: auto; font-family: system-ui, sans-serif; }
table { border-collapse: collapse; margin: 0.8em 0; font-size: 0.85em; }
th, td { padding: 0.2em 0.8em; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; } th:first-child, td.text { text-align: left; }
caption { text-align: left; font-weight: 600; } .wide { overflow-x: auto; }
summary { cursor: pointer; color: var(--faint); }
"""
)


def card_picture(report: Report) -> str:
    """Return the picture for a model card, on a ground of its own."""
    chosen = [section for section in sections(report) if section.on_card]
    ground = "svg { color: var(--ink); background: var(--paper); font-family: sans-serif; }"
    style = f"<style>{STYLE}{ground}</style>"
    svg = draw(report, chosen, titled=True)
    return svg.replace(">", f">{style}", 1)


def as_json(report: Report) -> str:
    """Return all numbers; examples/report.md says what they are."""
    content = {
        "format": "merge report",
        "version": 1,
        "method": report.method.name,
        "base": report.recipe.base if report.has_base else None,
        "models": report.names,
        "names": report.models,
        "sentences": sentences(report),
        "total": _plain(report.total),
        "kinds": {kind: _plain(report.by_kind[kind]) for kind in report.kinds},
        "layers": [
            {"layer": _layer(layer), **_plain(report.by_layer[layer])} for layer in report.layers
        ],
        "cells": [
            {"layer": _layer(layer), "kind": kind, **_plain(found)}
            for (layer, kind), found in report.cells.items()
        ],
        "tensors": [
            {"name": t.name, "layer": _layer(t.layer), "kind": t.kind, "how": t.how}
            | (_plain(t.numbers) if t.numbers else {})
            for t in report.tensors
        ],
    }
    return _lines(content) + "\n"


def _lines(content: Any, depth: int = 2, indent: str = "\n") -> str:
    """Return JSON with a line for each entry of the top levels."""
    inside = indent + " "
    if depth and isinstance(content, dict) and content:
        entries = [f"{_lines(k, 0)}: {_lines(v, depth - 1, inside)}" for k, v in content.items()]
        return f"{{{inside}{f',{inside}'.join(entries)}{indent}}}"
    if depth and isinstance(content, list) and content:
        return f"[{inside}{f',{inside}'.join(_lines(v, 0) for v in content)}{indent}]"
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def _plain(found: Numbers) -> dict[str, Any]:
    return found._asdict()


def _layer(layer: Layer | None) -> dict[str, Any] | None:
    return None if layer is None else layer._asdict()


def as_html(report: Report) -> str:
    """Return a page that needs nothing else: no script, no style or picture from elsewhere."""
    has_pictures = can_draw()
    parts = [
        f"<h1>What this merge does</h1><p>{_text(_title(report))}</p>",
        "<ul>" + "".join(f"<li>{_text(text)}</li>" for text in sentences(report)) + "</ul>",
        _summary(report),
        "" if has_pictures else f"<p>{INSTALL}</p>",
        *(_section(report, section, has_pictures) for section in sections(report)),
        _unlike(report),
        f"<h2>What was asked for</h2><pre>{_text(table(report.recipe), 100_000)}</pre>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Merge report</title><style>{PAGE_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _title(report: Report) -> str:
    """Return what is merged, and how."""
    if report.recipe.is_stack and report.recipe.copies:
        return f"layers of {listed(report.models)}"
    base = f", on {report.recipe.base}" if report.has_base else ""
    return f"{report.method.name} of {listed(report.names)}{base}"


def _text(text: str, limit: int = 1000) -> str:
    return "\n".join(escape(printable(line, limit)) for line in text.split("\n"))


def _section(report: Report, section: Section, has_pictures: bool) -> str:
    head = f"<h2>{_text(section.title)}</h2><p>{_text(section.caption)}</p>"
    tables = _tables(report, section)
    if not has_pictures:
        return head + tables
    label = f'<svg role="img" aria-label="{_text(section.title)}"'
    picture = draw(report, [section]).replace("<svg", label, 1)
    return f"{head}{picture}<details><summary>In numbers</summary>{tables}</details>"


def _tables(report: Report, section: Section) -> str:
    """Return the numbers of a section: of lines in one table, of panels in one each."""
    told = section.told
    names = ["outside of layers" if layer is None else str(layer) for layer in report.layers]
    if section.lines:
        rows = [
            [name, *(_number(line.values.get(layer), told) for line in section.lines)]
            for name, layer in zip(names, report.layers, strict=True)
        ]
        return _table(["layer", *(line.name for line in section.lines)], rows)
    return "".join(
        _table(
            ["layer", *report.kinds],
            [
                [name, *(_number(panel.values.get((layer, kind)), told) for kind in report.kinds)]
                for name, layer in zip(names, report.layers, strict=True)
            ],
            panel.name,
        )
        for panel in section.panels
    )


def _summary(report: Report) -> str:
    """Return a table of the whole models."""
    total = report.total
    columns: dict[str, list[Number]] = {
        "change of the base": total.change,
        "left after trimming": total.left if is_trimmed(report) else [],
        "in the output": total.kept,
        "distance of the output": total.distance,
    }
    shown = {head: found for head, found in columns.items() if any(x is not None for x in found)}
    rows = [
        [model, *(_number(found[t], percent) for found in shown.values())]
        for t, model in enumerate(report.models)
    ]
    return _table(["model", *shown], rows)


def _unlike(report: Report) -> str:
    rows = [[tensor.name, who, told] for tensor, who, told in unlike(report)]
    if not rows:
        return ""
    title = f"The {len(rows)} most unlike tensors" if len(report.models) > 1 else "Most changed"
    return f"<h2>{title}</h2>" + _table(["tensor", "models", ""], rows, texts=2)


def _number(value: Number, told: Any) -> str:
    return "\N{EN DASH}" if value is None else str(told(value))


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", texts: int = 1
) -> str:
    cells = [
        "".join(
            f'<td class="text">{_text(cell)}</td>' if i < texts else f"<td>{_text(cell)}</td>"
            for i, cell in enumerate(row)
        )
        for row in rows
    ]
    title = f"<caption>{_text(caption)}</caption>" if caption else ""
    heads = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="wide"><table>{title}<tr>{heads}</tr>{body}</table></div>'


def content_of(report: Report, file: Path) -> bytes:
    """Return what a report's file holds, by its ending."""
    text = as_json(report) if file.suffix.lower() == ".json" else as_html(report)
    return text.encode("utf-8", "backslashreplace")
