"""Texts and panels of the page of `vtoken demo explore`, as HTML without gradio."""

from __future__ import annotations

from html import escape
from typing import Any

from rich.filesize import decimal

from .explore_state import Outcome
from .page_parts import picture_html

ALL = "all visual tokens"
TITLE = "vtoken: what a strategy keeps, and what it answers"
LEGEND = (
    "Outlined: visual tokens that the last layer of the language model reads. Paler: dropped, the earlier the"
    " paler."
)
PERFORMANCE = "https://github.com/vtoken/vtoken/tree/main/docs/performance.md"
CSS = """
h1 { font-size: 1.3rem; margin: 0; }
#message { color: var(--error-text-color); min-height: 0; overflow-wrap: anywhere; }
#actions { justify-content: flex-end; }
#tries label { overflow-wrap: anywhere; }
#panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); gap: 12px;
  align-items: start; }
#panels .html-container, #message .html-container, #note .html-container { padding: 0; }
#note p { margin: 0; padding: 8px 12px; border-left: 4px solid var(--border-color-accent);
  background: var(--background-fill-secondary); color: var(--body-text-color); }
@media (max-width: 640px) { #actions { min-width: 100% !important; } }
.panel { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px;
  background: var(--background-fill-primary); color: var(--body-text-color); }
.panel h2 { font-size: 1rem; margin: 0 0 8px; overflow-wrap: anywhere; color: inherit; }
.panel img { width: 100%; max-width: 480px; max-height: 70vh; object-fit: contain; display: block;
  margin: 0 auto 4px; background: white; }
.panel .said { font-size: 1.25rem; font-weight: 600; margin: 8px 0 0; overflow-wrap: anywhere; }
.panel .same { margin: 0 0 8px; font-size: 0.85rem; opacity: 0.75; overflow-wrap: anywhere; }
.panel .refused { overflow-wrap: anywhere; padding: 12px; border-left: 4px solid var(--border-color-accent);
  background: var(--background-fill-secondary); }
.panel table { width: 100%; border: 0; border-collapse: collapse; font-size: 0.85rem; color: inherit; }
.panel tr { border: 0; border-top: 1px solid var(--border-color-primary); }
.panel th, .panel td { border: 0; padding: 4px 0; text-align: left; font-weight: 400; color: inherit; }
.panel th { opacity: 0.75; }
.panel td { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
small a { margin: 0; padding: 0; }
footer { display: none; }
"""
# what gradio's own elements need, which it keeps a page's style sheet from: the choice stays in sight
PHONE = """
@media (max-width: 640px) {
  .gradio-container { overflow: visible !important; }
  .gradio-container > .main { padding: 12px !important; }
  #choice { position: sticky; top: 0; z-index: 5; }
  #panel-all { order: 3; }
}
"""


def times_html(tiny: bool) -> str:
    """What the measured times say, as HTML."""
    if tiny:
        # no referrer: the page's address may hold its token
        link = f'<a href="{PERFORMANCE}" target="_blank" rel="noopener noreferrer">performance</a>'
        return (
            "Times say nothing about speed here: a call of a model this small is mostly overhead, whatever it"
            f" reads. See {link} for those of real shapes."
        )
    return "Times are those of one call each; the first calls of a model are slower."


def panel(title: str, outcome: Outcome, dense: Outcome, told: Outcome | None = None, truth: str = "") -> str:
    """One answer with its tokens, cost and time; a refusal is a sentence in place of the picture.

    Args:
        title: heading.
        outcome: of a strategy, or of all visual tokens.
        dense: the answer with all visual tokens.
        told: for the panel of all tokens, an outcome whose report says what these cost.
        truth: the right answer, "" if it is not known.
    """
    head = f"<h2>{escape(title)}</h2>"
    if outcome.refused:
        return _section(title, head + f'<p class="refused" role="status">{escape(outcome.refused)}</p>')
    whole = outcome is dense
    source = told if whole else outcome
    if source is None or source.report is None:
        rows, pictures = [], ""
    else:
        rows, pictures = _costs(source.report, whole), _pictures(title, source, whole)
    table = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in [*rows, ("time of the answer", f"{1000 * outcome.seconds:.0f} ms")]
    )
    said = escape(outcome.said or "The model said nothing.")
    beside = _beside(outcome, dense, truth)
    words = f'<p class="said">{said}</p><p class="same">{escape(beside)}</p>'
    return _section(title, f"{head}{pictures}{words}<table>{table}</table>")


def _section(title: str, inner: str) -> str:
    return f'<section class="panel" aria-label="{escape(title)}">{inner}</section>'


def _beside(outcome: Outcome, dense: Outcome, truth: str) -> str:
    """How the answer relates to that with all tokens, and to the right one."""
    words = []
    if outcome is not dense and not dense.refused:
        words.append("as with all tokens" if outcome.said == dense.said else f"all tokens: {dense.said}")
    if truth:
        words.append("right" if outcome.said == truth else f"right answer: {truth}")
    return " · ".join(words) or "\N{NO-BREAK SPACE}"


def _costs(report: Any, whole: bool) -> list[tuple[str, str]]:
    total = report.tokens_in
    read = total if whole else report.average_visual_tokens
    flops = 1.0 if whole else report.flops / report.flops_dense
    held, all_bytes = report.kv_bytes_dense if whole else report.kv_bytes, report.kv_bytes_dense
    return [
        ("visual tokens that a layer reads", f"{read:.{0 if read == int(read) else 1}f} of {total}"),
        ("FLOPs of the LLM's prefill", f"{flops:.0%}"),
        ("KV cache", f"{decimal(held)} ({held / all_bytes:.0%})"),
    ]


def _pictures(title: str, source: Outcome, whole: bool) -> str:
    visual = source.report.visuals[0]
    count = visual.tokens_in if whole else visual.tokens_out
    alt = f"{title}: {count} of {visual.tokens_in} visual tokens enter the language model"
    return "".join(picture_html(picture, alt) for picture in source.pictures(everything=whole))
