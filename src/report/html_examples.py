"""Answers of all models to the same prompts, side by side; what harmful prompts drew is folded away."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

HARMFUL = ("harmful", "jailbreak")


def example_section(examples: Sequence[Mapping[str, Any]]) -> str:
    """A block for each prompt; nothing without any."""
    if not examples:
        return ""
    blocks = "".join(_block(example) for example in examples)
    return f'<section id="examples"><h2>Example answers</h2>{blocks}</section>'


def _block(example: Mapping[str, Any]) -> str:
    harmful = example["kind"] in HARMFUL
    answers = "".join(
        f"<div><h4>{escape(answer['model'])}</h4><p>{escape(answer['answer']) or '<em>(empty)</em>'}</p></div>"
        for answer in example["answers"]
    )
    heading = f"{escape(example['suite'])} ({escape(example['kind'])})"
    prompt = example["prompt"] or f"prompt {example['id']}, left out"
    inner = f'<p class="prompt">{escape(prompt)}</p><div class="answers">{answers}</div>'
    if harmful:
        return (
            f'<details class="harmful"><summary>{heading}: a harmful prompt and its answers</summary>{inner}</details>'
        )
    return f"<details open><summary>{heading}: {escape(prompt[:80])}</summary>{inner}</details>"
