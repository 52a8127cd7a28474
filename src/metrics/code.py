"""From an answer to a program, and from passed programs to pass@k.

Of n programs for a task c pass. The unbiased estimate of the chance that one of k passes is (2107.03374)

    pass@k = 1 − C(n − c, k) / C(n, k)
"""

import ast
import re
import warnings
from collections.abc import Iterator
from math import comb
from symtable import SymbolTable, symtable
from textwrap import dedent, indent

PYTHON = r"[ \t]*(?:(?:[pP]ython3?|py3?)\b[^\n`]*)?\r?\n"
FENCE = re.compile(
    rf"(?:(?P<python>(?:^[ \t]*)?```{PYTHON})|^[ \t]*```[^\n`]*\n)(?P<block>.*?)(?:\r?\n[ \t]*```|\Z)",
    re.DOTALL | re.MULTILINE,
)
"""A fenced block. One of another language opens a line; it is no code, but its end opens nothing."""
COMPLETION_ENDS = re.compile(r"\n(?=(?:class|def|if|print|assert|@|#|<|```)\b|[@#<`])")

INDENTED = re.compile(r"\s*(?:^|\n)(?:[ ]{2}|\t)\s*[^\s`]")
OPENS = re.compile(r"^(?:import |from |def |class |async def |@|[A-Za-z_]\w*(?:: *[^=\n]+)? *=[^=])", re.MULTILINE)
"""Lines with which a program may open; prose stands before them."""

RECURSION = "sys.setrecursionlimit"


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

    An answer that goes on where the prompt ends is a body: it is cut where HumanEval's stop sequences stand, or an
    assertion, a decorator or a mark of markup that begins a line (with those five alone, more answers fail). A fenced
    block that defines the function, or else the lines that do, stand for themselves, behind what precedes the function
    in the prompt (its imports and helpers); a block whose function is a stub gives way to one with more. What follows
    and is no program is left out, from a line without indentation on: the function itself is never cut. Of the program
    only what the function needs is run, as EvalPlus has it (2305.01210): an answer's own examples are no part of it. A
    block that is a body gets its indentation. Any other answer continues the prompt, as it is.
    """
    body = _body(prompt, answer)
    if body is not None:
        return prompt + body
    defined = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    before = prompt[: _start(defined, prompt)] + "\n"
    blocks = [match["block"] for match in FENCE.finditer(answer) if match["python"]]
    # A block in a list is indented as a whole; others stay as they are, blank lines of their strings too.
    texts = [block if defined.search(block) else dedent(block) for block in blocks or [answer]]
    found = [_definition(before, text, defined) for text in texts if defined.search(text)]
    if found:
        whole = next((text for text in found if not _is_stub(text, entry_point)), found[0])
        return before + _needed(whole, entry_point)
    body = blocks[0] if blocks else answer
    whole = indent(body.strip("\n"), "    ")
    if blocks and body.strip() and compiles(prompt + whole) and not compiles(body.strip()):
        return prompt + whole
    return prompt + (_body(prompt, body) or _indented(_stopped(body)))


def compiles(text: str) -> bool:
    """Whether a text is a program; it is not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _parsed(text: str) -> list[ast.stmt]:
    """The statements of a program; none of what is no program."""
    return ast.parse(text).body if compiles(text) else []


def _is_stub(text: str, entry_point: str) -> bool:
    """Whether a program's function has nothing but imports, a docstring, ``pass``, ``...`` or NotImplementedError."""
    functions = [
        one
        for one in _parsed(text)
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and one.name == entry_point
    ]
    return bool(functions) and all(
        isinstance(one, ast.Pass | ast.Import | ast.ImportFrom)
        or (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
        or (isinstance(one, ast.Raise) and one.exc is not None and "NotImplementedError" in ast.unparse(one.exc))
        for one in functions[-1].body
    )


def _needed(text: str, entry_point: str) -> str:
    """The statements of a program that give its function the names that it uses, and how deep it may recurse."""
    statements, wanted = _parsed(text), {entry_point}
    kept: list[ast.stmt] = []
    while more := [one for one in statements if one not in kept and _gives(one) & (wanted | {"*", RECURSION})]:
        kept += more
        wanted |= {name for one in more for name in _uses(symtable(ast.unparse(one), "program.py", "exec"))}
    if len(kept) == len(statements):
        return text
    lines = text.splitlines(keepends=True)
    return "".join(_source(one, text, lines) + "\n" for one in statements if one in kept)


def _uses(table: SymbolTable) -> Iterator[str]:
    """The names of the module that a part of a program refers to; a function's own variables are none."""
    whole = table.get_type() == "module"
    yield from (one.get_name() for one in table.get_symbols() if one.is_referenced() and (whole or one.is_global()))
    for inner in table.get_children():
        yield from _uses(inner)


def _gives(statement: ast.stmt) -> set[str]:
    """The names that a statement binds; of a call that alone sets the depth of recursion its own, of others none."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Expr):
        return {RECURSION} & {ast.unparse(node) for node in ast.walk(statement) if isinstance(node, ast.Attribute)}
    nodes = list(ast.walk(statement))
    found = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    found |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    return found | {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}


def _source(statement: ast.stmt, text: str, lines: list[str]) -> str:
    """A statement as it stands in the text, with its decorators."""
    own = ast.get_source_segment(text, statement) or ""
    first = min([one.lineno for one in getattr(statement, "decorator_list", [])], default=statement.lineno)
    return "".join(lines[first - 1 : statement.lineno - 1]) + own


def _body(prompt: str, answer: str) -> str | None:
    """The answer as the rest of the function that the prompt opens; nothing where it is none.

    An indented answer always is. Of others a word or an import, too, would make a body: such a one must be no program
    of its own (``return x``).
    """
    text = _stopped(answer)
    if INDENTED.match(answer):
        return next((part for part in _prefixes(text) if part.strip() and compiles(prompt + part)), text)
    goes_on = bool(text.strip()) and compiles(prompt + _indented(text)) and not compiles(text.strip())
    return _indented(text) if goes_on else None


def _definition(before: str, text: str, defined: re.Pattern[str]) -> str:
    """The longest part of a text that defines the function and is a program; the text as it is where none is."""
    place = _start(defined, text)
    function = next((part for part in _prefixes(text[place:]) if part.strip() and compiles(before + part)), None)
    if function is None:
        return text
    starts = [match.start() for match in OPENS.finditer(text) if match.start() < place]
    wholes = (text[start:place] + function for start in starts)
    return next((whole for whole in wholes if compiles(before + whole)), function)


def _prefixes(text: str) -> Iterator[str]:
    """A text, then what stands before each of its lines without indentation, from the last to the first."""
    yield text
    for match in reversed(list(re.finditer(r"\n(?=\S)", text))):
        yield text[: match.end()]


def _stopped(text: str) -> str:
    cut = COMPLETION_ENDS.search(text)
    return text[: cut.start()] if cut else text


def _indented(text: str) -> str:
    return text if text[:1].isspace() else "    " + text


def _start(defined: re.Pattern[str], prompt: str) -> int:
    match = defined.search(prompt)
    return match.start() if match else len(prompt)
