"""From an answer to a program, and from passed programs to pass@k.

Of n programs for a task c pass. The unbiased estimate of the chance that one of k passes is (2107.03374)

    pass@k = 1 − C(n − c, k) / C(n, k)
"""

import re
from math import comb

FENCE = re.compile(r"```[ \t]*(?:[pP]ython3?|py)?[ \t]*\r?\n(.*?)(?:\r?\n[ \t]*```|\Z)", re.DOTALL)
COMPLETION_ENDS = re.compile(r"\n(?=(?:class|def|if|print|assert|@|#|<|```)\b|[@#<`])")


def pass_at_k(total: int, passed: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k programs passes, of ``total`` of which ``passed`` did.

    Raises:
        ValueError: k is not in 1 … total, or passed not in 0 … total.
    """
    if not 1 <= k <= total or not 0 <= passed <= total:
        raise ValueError(f"pass@{k} of {passed} passed in {total}: expected 1 ≤ k ≤ n and 0 ≤ c ≤ n")
    return 1 - comb(total - passed, k) / comb(total, k)


def program(prompt: str, answer: str, test: str, entry_point: str) -> str:
    """The program that passes if the answer is right: the function, the row's test and the call of ``check``."""
    return f"{solution(prompt, answer, entry_point)}\n\n{test}\n\ncheck({entry_point})\n"


def solution(prompt: str, answer: str, entry_point: str) -> str:
    """The function that an answer gives.

    A fenced block that defines the function stands for itself, behind what precedes the function in the prompt (its
    imports and helpers). Anything else continues the prompt, up to the first line that is no longer part of the body.
    """
    defined = re.compile(rf"^[ \t]*(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    blocks = [match[1] for match in FENCE.finditer(answer)]
    whole = next((block for block in blocks if defined.search(block)), None)
    if whole is None and defined.search(answer):
        whole = answer
    if whole is not None:
        return prompt[: _start(defined, prompt)] + "\n" + whole
    body = blocks[0] if blocks else answer
    cut = COMPLETION_ENDS.search(body)
    body = body[: cut.start()] if cut else body
    return prompt + (body if body[:1].isspace() else "    " + body)


def _start(defined: re.Pattern[str], prompt: str) -> int:
    match = defined.search(prompt)
    return match.start() if match else len(prompt)
