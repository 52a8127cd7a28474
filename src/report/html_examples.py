"""Answers of all models to the same prompts, side by side.

What harmful prompts drew is folded away, and of each kind of other prompts all but the first: with 20 tasks the page
would be 50 000 pixels high.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from src.data.suite import HARMFUL


def example_section(examples: Sequence[Mapping[str, Any]]) -> str:
    """A block for each prompt; nothing without any."""
    if not examples:
        return ""
    first = {example["kind"]: place for place, example in reversed(list(enumerate(examples)))}
    counts: Counter[str] = Counter()
    blocks = []
    for place, example in enumerate(examples):
        counts[example["suite"]] += 1
        blocks.append(_block(example, counts[example["suite"]], first[example["kind"]] == place))
    away = any(example["prompt"] is None for example in examples)
    left_out = " Prompts are left out where this page may not pass them on." if away else ""
    note = f"Answers end where the evaluation ended them (its suites' max_new_tokens).{left_out}"
    head = f'<section id="examples"><h2>Example answers</h2><p class="note">{note}</p>'
    return f"{head}{''.join(blocks)}</section>"


def _block(example: Mapping[str, Any], number: int, shown: bool) -> str:
    answers = "".join(
        f"<div><h4>{escape(answer['model'])}</h4><p>{escape(answer['answer']) or '<em>(empty)</em>'}</p></div>"
        for answer in example["answers"]
    )
    asked = "" if example["suite"] == example["kind"] else f" ({escape(example['kind'])})"
    heading = f"{escape(example['suite'])}{asked}, prompt {number}"
    prompt = example["prompt"]
    kind, text = ("note", example["id"]) if prompt is None else ("prompt", prompt)
    said = f'<p class="{kind}">{escape(text)}</p>'
    inner = f'{said}<div class="answers">{answers}</div>'
    if example["kind"] in HARMFUL:
        return f'<details class="harmful"><summary>{heading}: harmful, and its answers</summary>{inner}</details>'
    begins = "" if prompt is None else f": {escape(prompt[:80])}"
    return f"<details{' open' * shown}><summary>{heading}{begins}</summary>{inner}</details>"
