"""The one-page HTML report: everything inline, charts as SVG, readable in the dark, on a phone and on paper."""

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from .study_table import StudyRow, cells, headings, notes, short_names, warnings

_MAY_DIFFER = ("name", "vision_encoder")  # keys of a recipe
_COLOURS = 6  # series colours in the style sheet, used in turns


@dataclass(frozen=True)
class Bar:
    """Score of one encoder's model, from 0 to 1, and what the same model scores with blank pictures, if known."""

    encoder: str
    score: float
    blank: float | None


@dataclass(frozen=True)
class KindChart:
    """Scores of one kind of question. `floor` is what the best guess scores without a model, from 0 to 1."""

    title: str
    items: int
    floor: float
    floor_name: str
    bars: list[Bar]


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Attributes:
        losses: (step, training loss) by encoder; a run that logged none has none.
        seconds: by step of the study, in order.
        settings: of the study.
        recipe: what the recipes of all VLMs have in common.
        differing: by key of a recipe, then by encoder, what is not the same in all.
        versions: of the software, and the device.
        samples_png: the picture of samples.
    """

    rows: Sequence[StudyRow]
    kinds: Sequence[KindChart]
    losses: Mapping[str, Sequence[tuple[int, float]]]
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    recipe: Mapping[str, Any]
    differing: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    samples_png: bytes


@dataclass(frozen=True)
class LossChart:
    """Curves on a drawing of 1000 x 1000, the origin at the top left; ticks are (share of the side, text)."""

    curves: dict[str, str]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def render_page(page: Page) -> str:
    """The page as HTML. All text is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"per_cent": _per_cent, "plain": _plain, "minutes": _minutes, "breakable": _breakable}
    encoders = [row.encoder for row in page.rows]
    return environment.from_string(_PAGE).render(
        page=page,
        style=_STYLE,
        names=short_names(encoders),
        number={encoder: place % _COLOURS for place, encoder in enumerate(encoders)},
        headings=headings(page.rows),
        lines=list(zip(page.rows, cells(page.rows), strict=True)),
        notes=notes(page.rows),
        warnings=warnings(page.rows),
        uncontrolled=[key for key in page.differing if key not in _MAY_DIFFER],
        loss=loss_chart(page.losses),
        step_names={step: _short_step(step, encoders) for step in page.seconds},
        longest=max(page.seconds.values(), default=0) or 1,
        total=sum(page.seconds.values()),
        samples_width=png_width(page.samples_png),
        samples="data:image/png;base64," + base64.b64encode(page.samples_png).decode(),
    )


def _short_step(step: str, encoders: Sequence[str]) -> str:
    """A step's name with the encoder's short name in it."""
    for encoder, short in short_names(encoders).items():
        if step.endswith(f" {encoder}"):
            return f"{step.removesuffix(encoder)}{short}"
    return step


def png_width(png: bytes) -> int:
    """Pixels, from the header of a PNG file."""
    return int.from_bytes(png[16:20], "big")


def loss_chart(losses: Mapping[str, Sequence[tuple[int, float]]]) -> LossChart | None:
    """Loss on a logarithmic axis over steps; None where no run logged a loss above 0."""
    points = {encoder: [(step, loss) for step, loss in of if loss > 0] for encoder, of in losses.items()}
    steps = [step for of in points.values() for step, _ in of]
    values = [math.log10(loss) for of in points.values() for _, loss in of]
    if not values:
        return None
    last, low, high = max(steps), min(values), max(values)
    room = max(0.05 * (high - low), 0.05)
    low, high = low - room, high + room

    def x(step: float) -> float:
        return step / last

    def y(loss: float) -> float:
        return (high - math.log10(loss)) / (high - low)

    curves = {
        encoder: "M" + " L".join(f"{1000 * x(step):.1f} {1000 * y(loss):.1f}" for step, loss in (*of, of[-1]))
        for encoder, of in points.items()
        if of
    }
    round_values = [digit * 10.0**power for power in range(-8, 9) for digit in (1, 2, 5)]
    shown = [value for value in round_values if low <= math.log10(value) <= high]
    if len(shown) < 2:  # a narrow range
        shown = [10 ** (low + share * (high - low)) for share in (0.2, 0.5, 0.8)]
    return LossChart(
        curves=curves,
        x_ticks=[(x(step), str(step)) for step in _whole_ticks(last)],
        y_ticks=[(y(value), f"{value:.3g}") for value in shown],
    )


def _whole_ticks(last: int) -> list[int]:
    """At most six whole numbers from 0 to `last`, evenly apart."""
    apart = next(d * 10**p for p in range(12) for d in (1, 2, 5) if last / (d * 10**p) <= 5)
    return list(range(0, last + 1, apart))


def _per_cent(share: float) -> str:
    return f"{100 * share:.1f}"


def _breakable(name: str) -> Markup:
    """A name that a narrow column may break after its underscores."""
    return escape(name).replace("_", Markup("_<wbr>"))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def _plain(value: Any) -> str:
    """A setting as text; of an absolute path only the end, which is the same on every machine."""
    if isinstance(value, str):
        return os.path.basename(value) if os.path.isabs(value) else value
    return json.dumps(value)


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #16181d; --faint: #5b626e; --rule: #d9dde3; --card: #f6f7f9;
  --good: #0a7d34; --bad: #b3121d; --s0: #0067b8; --s1: #d97a00; --s2: #00875f; --s3: #b0428c; --s4: #4a9fd8;
  --s5: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e7e9ee; --faint: #9aa3b2; --rule: #343a45;
  --card: #1d2026; --good: #4cc978; --bad: #ff6b70; --s0: #4aa8f0; --s1: #f0a23c; --s2: #38c79b; --s3: #e07cc0;
  --s4: #8fd0fb; --s5: #f3784a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; } .faint, .notes { color: var(--faint); } .notes { font-size: .9rem; padding-left: 1.1rem; }
.scroll { overflow-x: auto; overscroll-behavior-x: contain; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; color: var(--faint); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
td.best { font-weight: 700; color: var(--good); } tr.bad td { color: var(--bad); }
.main { width: 100%; } .main td:first-child { padding-left: 1.6rem; }
.main .key { position: absolute; left: .5rem; margin-top: .35em; }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .4em; }
.banner { background: #b3121d; color: #fff; border-radius: .5rem; padding: .8rem 1.1rem; margin: 1rem 0; }
.banner strong { font-size: 1.2rem; letter-spacing: .03em; } .banner ul { margin: .3rem 0 0; padding-left: 1.1rem; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.card { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; min-width: 0; }
.card h3 { margin: 0 0 .4rem; font-size: 1rem; } .card p { margin: -.3rem 0 .5rem; font-size: .87rem; }
.bar { display: flex; justify-content: space-between; font-size: .87rem; gap: 1rem; }
.bar b { font-variant-numeric: tabular-nums; }
svg { display: block; } svg.track { width: 100%; height: 16px; margin: 0 0 .45rem; overflow: visible; }
.track .back { fill: var(--rule); opacity: .55; } .floor { stroke: var(--ink); stroke-width: 2; }
.blank { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 2 2; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; margin: .3rem 0 .7rem; }
.legend svg { display: inline-block; vertical-align: -3px; margin-right: .4em; }
.f0 { fill: var(--s0); background: var(--s0); } .f1 { fill: var(--s1); background: var(--s1); }
.f2 { fill: var(--s2); background: var(--s2); } .f3 { fill: var(--s3); background: var(--s3); }
.f4 { fill: var(--s4); background: var(--s4); } .f5 { fill: var(--s5); background: var(--s5); }
.c0 { stroke: var(--s0); } .c1 { stroke: var(--s1); } .c2 { stroke: var(--s2); } .c3 { stroke: var(--s3); }
.c4 { stroke: var(--s4); } .c5 { stroke: var(--s5); }
.plot { position: relative; height: 17rem; margin: .5rem .8rem 4rem 3.2rem; }
.plot svg { width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke; }
.plot .grid { stroke: var(--rule); stroke-width: 1; vector-effect: non-scaling-stroke; }
.tick { position: absolute; white-space: nowrap; font-size: .8rem; color: var(--faint);
  font-variant-numeric: tabular-nums; }
.tick.y { right: 100%; margin-right: .5rem; transform: translateY(-50%); }
.tick.x { top: 100%; margin-top: .3rem; transform: translateX(-50%); }
.axis { position: absolute; top: calc(100% + 1.3rem); left: 0; right: 0; text-align: center; font-size: .85rem;
  color: var(--faint); }
.samples { display: block; height: auto; border-radius: .4rem; }
.steps { width: 100%; max-width: 44rem; } .steps td:first-child { white-space: normal; }
.steps td:nth-child(2) { width: 45%; }
.steps svg { width: 100%; height: 10px; } .steps rect { fill: var(--s0); }
details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
.settings { font-size: .87rem; } .settings th { text-align: left; }
.settings td { text-align: left; white-space: normal; vertical-align: top;
  font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
.settings td:first-child { color: var(--faint); position: static; }
@media (max-width: 40rem) { h1 { font-size: 1.6rem; } th, td { padding: .35rem .4rem; }
  .main { font-size: .87rem; } .main th, .main td:first-child { white-space: normal; overflow-wrap: anywhere; }
  .main th { overflow-wrap: normal; } .main td:first-child { min-width: 8.6rem; } }
@media print { body { max-width: none; } .card { break-inside: avoid; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which encoder? {{ names.values() | join(", ") }}</title>
<link rel="icon" href="data:,">
<style>{{ style | safe }}</style>
</head>
<body>
<header>
<h1>Which encoder?</h1>
<p class="faint">{{ page.rows | length }} encoder{{ "" if page.rows | length == 1 else "s" }}, one after the other in
the same vision-language model. {{ total | minutes }} minutes in all.</p>
<p>Overall: {% for row in page.rows | sort(attribute="overall", reverse=true) -%}
{{ names[row.encoder] }} <b>{{ row.overall | per_cent }}</b>{{ "." if loop.last else ", " }}
{%- endfor %}</p>
</header>
{% if uncontrolled %}
<div class="banner" role="alert"><strong>NOT CONTROLLED</strong>
<ul><li>Beside the encoder, the recipes differ in {{ uncontrolled | join(", ") }}.</li></ul></div>
{% endif %}
{% if warnings %}
<div class="banner" role="alert"><strong>NOT LEARNED: {{ warnings | length }} of {{ page.rows | length }}</strong>
<ul>{% for line in warnings %}<li>{{ line }}</li>{% endfor %}</ul></div>
{% endif %}

<section id="table">
<div class="scroll"><table class="main">
<thead><tr>{% for heading in headings %}<th scope="col">{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row, line in lines %}
<tr{% if row.warnings %} class="bad"{% endif %}>
{% for cell in line %}
<td{% if cell.best %} class="best"{% endif %}>
{%- if loop.first %}<span class="key f{{ number[row.encoder] }}"></span>{% endif %}
{{- cell.text | breakable }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<ul class="notes">{% for line in notes %}<li>{{ line }}</li>{% endfor %}</ul>
</section>

<section id="kinds">
<h2>Scores by kind of question</h2>
<div class="legend">
{% for class, meaning in (("floor", "best guess without a model"), ("blank", "the same model, blank pictures")) %}
<span><svg width="8" height="16"><line class="{{ class }}" x1="4" x2="4" y1="0" y2="16"/></svg>{{ meaning }}</span>
{% endfor %}
</div>
<div class="cards">
{% for kind in page.kinds %}
{% set floor = kind.floor | per_cent %}
<div class="card"><h3>{{ kind.title }}</h3>
<p class="faint">{{ kind.items }} items; {{ kind.floor_name }} {{ floor }}</p>
{% for bar in kind.bars %}
<div class="bar"><span>{{ names[bar.encoder] }}</span><b>{{ bar.score | per_cent }}</b></div>
<svg class="track" role="img" aria-label="{{ bar.score | per_cent }} per cent">
<rect class="back" width="100%" height="12" y="2" rx="2"/>
<rect class="f{{ number[bar.encoder] }}" width="{{ bar.score | per_cent }}%" height="12" y="2" rx="2"/>
<line class="floor" x1="{{ floor }}%" x2="{{ floor }}%" y1="0" y2="16"/>
{% if bar.blank is not none %}
<line class="blank" x1="{{ bar.blank | per_cent }}%" x2="{{ bar.blank | per_cent }}%" y1="0" y2="16"/>
{% endif %}
</svg>
{% endfor %}
</div>
{% endfor %}
</div>
</section>

<section id="loss">
<h2>Training loss</h2>
{% if loss %}
<div class="legend">{% for encoder in loss.curves %}
<span><span class="key f{{ number[encoder] }}"></span>{{ names[encoder] }}</span>
{% endfor %}</div>
<div class="plot">
<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="Training loss over steps">
{% for place, text in loss.y_ticks %}
<line class="grid" x1="0" x2="1000" y1="{{ 1000 * place }}" y2="{{ 1000 * place }}"/>
{% endfor %}
{% for encoder, curve in loss.curves.items() %}
<path class="c{{ number[encoder] }}" d="{{ curve }}"/>
{% endfor %}
</svg>
{% for place, text in loss.y_ticks %}<span class="tick y" style="top:{{ 100 * place }}%">{{ text }}</span>{% endfor %}
{% for place, text in loss.x_ticks %}<span class="tick x" style="left:{{ 100 * place }}%">{{ text }}</span>{% endfor %}
<span class="axis">step of the VLM's training; the loss on a logarithmic axis</span>
</div>
{% else %}
<p class="faint">No loss was logged: the runs are shorter than their recipe's logging_steps.</p>
{% endif %}
</section>

<section id="samples">
<h2>Samples</h2>
<div class="scroll">
<img class="samples" alt="The same questions put to every model, with their answers" src="{{ samples }}"
style="width: max({{ (0.7 * samples_width) | int }}px, min(100%, {{ samples_width }}px))">
</div>
</section>

<section id="time">
<h2>Minutes of each step</h2>
<table class="steps">
{% for step, seconds in page.seconds.items() %}
<tr><td>{{ step_names[step] | breakable }}</td>
<td><svg><rect width="{{ (100 * seconds / longest) | round(1) }}%" height="10" rx="2"/></svg></td>
<td>{{ seconds | minutes }}</td></tr>
{% endfor %}
<tr><td><b>all</b></td><td></td><td><b>{{ total | minutes }}</b></td></tr>
</table>
</section>

<section id="settings">
<h2>Settings</h2>
{% macro listing(values) %}
<table class="settings">
{% for key, value in values.items() %}
<tr><td>{{ key }}</td><td>{{ value | plain }}</td></tr>
{% endfor %}
</table>
{% endmacro %}
{% if page.differing and page.rows | length > 1 %}
<p>All that differs between the recipes of the VLMs:</p>
<div class="scroll"><table class="settings">
<tr><th></th>{% for row in page.rows %}<th>{{ names[row.encoder] }}</th>{% endfor %}</tr>
{% for key, values in page.differing.items() %}
<tr><td>{{ key }}</td>{% for row in page.rows %}<td>{{ values[row.encoder] | plain }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
<details><summary>Recipe of every VLM</summary>{{ listing(page.recipe) }}</details>
<details><summary>Study</summary>{{ listing(page.settings) }}</details>
<details><summary>Versions</summary>{{ listing(page.versions) }}</details>
</section>
</body>
</html>
"""
