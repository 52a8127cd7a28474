"""Answers of all models to the same prompts, side by side.

What harmful prompts drew is folded away, and of each kind of other prompts all but the first: with 20 tasks the page
would be 50 000 pixels high.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from src.data.suite import HARMFUL


def example_section(examples: Sequence[Mapping[str, Any]]) -> str:
    """A block for each prompt; nothing without any."""
    if not examples:
        return ""
    first = {example["kind"]: place for place, example in reversed(list(enumerate(examples)))}
    blocks = "".join(_block(example, first[example["kind"]] == place) for place, example in enumerate(examples))
    return f'<section id="examples"><h2>Example answers</h2>{blocks}</section>'


def _block(example: Mapping[str, Any], shown: bool) -> str:
    answers = "".join(
        f"<div><h4>{escape(answer['model'])}</h4><p>{escape(answer['answer']) or '<em>(empty)</em>'}</p></div>"
        for answer in example["answers"]
    )
    heading = f"{escape(example['suite'])} ({escape(example['kind'])})"
    prompt = example["prompt"] or f"prompt {example['id']}, left out"
    inner = f'<p class="prompt">{escape(prompt)}</p><div class="answers">{answers}</div>'
    if example["kind"] in HARMFUL:
        return (
            f'<details class="harmful"><summary>{heading}: a harmful prompt and its answers</summary>{inner}</details>'
        )
    return f"<details{' open' * shown}><summary>{heading}: {escape(prompt[:80])}</summary>{inner}</details>"
