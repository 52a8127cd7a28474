"""From answers to programs; HumanEval's canonical solutions pass and mutated ones fail."""

import json
import os
from pathlib import Path

import pytest

from src.data.code_rows import load_code
from src.data.row_source import as_sources
from src.errors import InputError
from src.metrics.code import program, solution
from src.sandbox import run as sandbox
from src.sandbox.run import Limits, missing_isolation, run_program
from tests.evaluations import PASSES, answers, evaluate, flags, write_jsonl

EVAL = Path("../shared/data/eval")
PROMPT = 'import math\n\ndef area(r):\n    """Area of a circle."""\n'
isolated = pytest.mark.skipif(bool(missing_isolation()), reason=f"no isolation here: {missing_isolation()}")


@pytest.mark.parametrize(
    "answer",
    [
        "    return math.pi * r * r\n",
        "    return math.pi * r * r\n\ndef other():\n    return broken(",
        "    return math.pi * r * r\n\nprint(area(2)",
        "    return math.pi * r * r\n# and so on (",
        "return math.pi * r * r",
        "Here you are:\n```python\ndef area(r):\n    return math.pi * r * r\n```\nIt uses pi.",
        "```py\nimport math\ndef area(r):\n    x = r * r\n    return math.pi * x\n```",
        "```\n    return math.pi * r * r\n```",
        "```python\nx = (\n```\nthen\n```python\ndef area(r):\n    return math.pi * r * r\n```",
        "def area(r):\n    return math.pi * r * r",
        "```python\ndef area(r):\n    return math.pi * r * r",
        "    return math.pi * r * r\n\n\ndef area(r):\n    return 0\n",
        "    return math.pi * r * r\n\n\ndef area_of_many(rs):\n    return [area(r) for r",
        "return math.pi * r * r\n\n\ndef area(r):\n    return 0\n",
        "    return math.pi * r * r\n\nfrom x import (",
        "    return math.pi * r * r\n\nThis uses pi.\n```python\ndef area(r):\n    return 0\n```",
        "Here is the function:\n\ndef area(r):\n    return math.pi * r * r\n\nThis uses pi.",
        "Here it is:\n\nfrom math import pi\n\ndef area(r):\n    return pi * r * r\n\nDone!\n",
        "1. Like this:\n   ```python\n   def area(r):\n       return math.pi * r * r\n   ```\n",
        "```python\ndef area(r):\n    return math.pi * r * r\n\nUsage: area(2)\n```",
        "import math\n\ndef area(r):\n    return math.pi * r * r",
        "Install:\n```bash\npip install x\n```\n\nThen:\n```python\ndef area(r):\n    return math.pi * r * r\n```\n",
        "1. As:\n   ```json\n   {}\n   ```\n   ```py3\n   def area(r):\n       return math.pi * r * r\n   ```",
        "```python {.numbers}\ndef area(r):\n    return math.pi * r * r\n```",
        "```python\ndef area(r):\n    return math.pi * r * r\n\nassert area(1) == 3\nprint(input())\n```",
        "```python\ndef area(r):\n    found = math.pi * r * r\n    return found\n\nfound = area(input())\n```",
        "```python\nimport absent\nx = absent.y\ndef area(r):\n    return math.pi * r * r\n```",
        "```python\ndef area(r):\n    ...\n```\nso:\n```python\ndef area(r):\n    return math.pi * r * r\n```",
        "```python\ndef area(r):\n    import cmath\n    'Area.'\n    raise NotImplementedError('later')\n```\n"
        "```python\ndef area(r):\n    return math.pi * r * r\n```",
        "```python\nif r < 0: return 0\nreturn math.pi * r * r\n```",
        "```python\nx = r * r\nif x == 1:\n    return math.pi\nreturn math.pi * x\n```",
    ],
)
def test_the_function_is_found_in_an_answer(answer):
    scope = {}
    exec(compile(solution(PROMPT, answer, "area"), "x", "exec"), scope)
    assert scope["area"](2) == pytest.approx(12.566, abs=1e-3)


def test_a_program_keeps_what_its_function_needs():
    """Imports, helpers, classes and values, each through others; decorators, and how deep it may recurse."""
    kept = [
        "import sys, functools",
        "from os import path as p",
        "sys.setrecursionlimit(10_000)",
        "try:\n    import numpy as np\nexcept ImportError:\n    np = None",
        "LIMIT: int = 3  # three\nLIMIT += 1",
        "def helper(x):\n    return Kept(x), p, np",
        "class Kept:\n    size = LIMIT\n\n    def __init__(self, x):\n        self.x = x",
        "@functools.cache\ndef area(r):\n    return helper(r)[0].size + r",
    ]
    left = [
        "import absent",
        "unused = area(2)",
        "def main():\n    area(3)",
        "main()",
        "if __name__ == '__main__':\n    main()",
    ]
    found = solution("def area(r):\n", "```python\n" + "\n".join([*kept, *left]) + "\n```", "area")
    scope = {}
    exec(compile(found, "x", "exec"), scope)
    assert scope["area"](2) == 6
    assert all(part in found for part in kept[:4])
    assert not any(part in found for part in left)


@pytest.mark.parametrize(
    "answer",
    [
        "    return 0\n\n\ndef area(r):\n    return math.pi * r * r\n",
        "    return (r\n\ndef area(r):\n    return math.pi * r * r\n",
        "    x = math.pi * (\n",
        "if r < 0: return 0\nreturn math.pi * r * r",
        "```python\ndef area(r):\n    return math.pi * r *\n```",
        "def area_of(r):\n    return math.pi * r * r\n",
        "The area is pi r squared.",
    ],
)
def test_a_wrong_answer_is_not_put_right(answer):
    scope = {}
    try:
        exec(compile(solution(PROMPT, answer, "area"), "x", "exec"), scope)
    except SyntaxError:
        return
    assert scope["area"](2) != pytest.approx(12.566, abs=1e-3)


def test_strings_of_a_fenced_function_stay_as_they_are():
    answer = '```python\ndef area(r):\n    return """a\n    \nb"""\n```'
    assert '"""a\n    \nb"""' in solution(PROMPT, answer, "area")


def mutated(row):
    """The canonical solution made wrong: nothing is computed."""
    return "    return None\n" if "return" in row.response else "    pass\n"


def share_passed(rows, answer):
    limits = Limits(seconds=20)
    return sum(run_program(program(r.prompt, answer(r), r.test, r.entry_point), limits).passed for r in rows) / len(
        rows
    )


@isolated
@pytest.mark.parametrize("name", ["code_humaneval.jsonl", "code_mbpp_valid.jsonl"])
def test_canonical_solutions_pass_and_mutated_ones_fail(name):
    if not EVAL.is_dir():
        pytest.skip("the research data set ../shared/data is not here")
    rows = load_code(str(EVAL / name))[:: int(os.environ.get("CODE_ROWS_STEP", "5"))]  # 1 runs every row: minutes
    assert share_passed(rows, lambda row: row.response) == 1.0
    assert share_passed(rows, mutated) == 0.0


OWN = [
    PASSES,
    {
        "task_id": "T/1",
        "prompt": "def double(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(f):\n    assert f(3) == 6\n    assert f('a') == 'aa'\n",
        "entry_point": "double",
    },
]


@isolated
def test_own_rows_pass_and_fail(tmp_path):
    rows = load_code(str(write_jsonl(tmp_path / "code.jsonl", OWN)))
    assert share_passed(rows, lambda row: row.response) == 1.0
    assert share_passed(rows, lambda row: f"```python\n{row.prompt}{row.response}```") == 1.0
    assert share_passed(rows, mutated) == 0.0


@isolated
def test_a_code_suite_counts_what_its_programs_do(base, tmp_path, monkeypatch):
    """Canonical answers put in the model's mouth give pass@1 = 1, others 0: the whole command, not the parts."""
    from src.models.computation import Computation

    rows = write_jsonl(tmp_path / "code.jsonl", OWN)
    suite = {"name": "code", "kind": "code", "rows": str(rows), "template": "raw", "max_new_tokens": 4}
    for output, say, expected in (("good", lambda row: row.response, 1.0), ("bad", mutated, 0.0)):

        def answered(self, suite, tokens, batch, say=say):
            said = [say(tokens.encoded[i].row) for i in batch.index.tolist()]
            return [{"answer": one, "unfinished": False} for one in said]

        monkeypatch.setattr(Computation, "answers", answered)
        found = evaluate(base, tmp_path, [suite], output=output)["code"]
        assert found["pass@1"]["value"] == expected
        assert found["pass@1"]["n"] == 2
        assert found["endings"] == {"passed" if expected else "failed": 2}
    assert {record["endings"][0] for record in answers(tmp_path / "bad", "code")} == {"failed"}


@isolated
def test_outcomes_are_kept_for_the_same_limits_and_sandbox(base, tmp_path, monkeypatch):
    from src.models import results

    ran = []

    def counted(program, limits, **settings):
        ran.append(limits)
        return run_program(program, limits, **settings)

    monkeypatch.setattr(results, "run_program", counted)
    rows = write_jsonl(tmp_path / "code.jsonl", OWN[:1])
    suite = {"name": "code", "kind": "code", "rows": str(rows), "template": "raw", "max_new_tokens": 4}
    evaluate(base, tmp_path, [suite], "--overwrite", "true")
    evaluate(base, tmp_path, [suite], "--overwrite", "true")
    assert len(ran) == 1
    monkeypatch.setattr(results, "LIMITS", Limits(memory_mb=300))
    evaluate(base, tmp_path, [suite], "--overwrite", "true")
    assert len(ran) == 2
    with monkeypatch.context() as changed:
        changed.setattr(sandbox, "best_isolation", lambda: ("landlock", ""))
        assert sandbox.outcome_key(results.LIMITS) != sandbox.outcome_key(Limits())
    assert len({sandbox.outcome_key(limits) for limits in (Limits(), Limits(file_mb=3), results.LIMITS)}) == 3
    assert sandbox.outcome_key(Limits()) == sandbox.outcome_key(Limits())


@isolated
def test_a_sandbox_that_fails_to_start_is_no_outcome_of_a_program(base, tmp_path, monkeypatch, capsys):
    from src.cli import main

    rows = write_jsonl(tmp_path / "code.jsonl", OWN[:1])
    suite = {"name": "code", "kind": "code", "rows": str(rows), "template": "raw", "max_new_tokens": 4}
    broken = tmp_path / "child.py"
    broken.write_text("raise SystemExit('unshare: No space left on device')")
    monkeypatch.setattr(sandbox, "PAUSES", (0.0, 0.0))
    with monkeypatch.context() as once:
        once.setattr(sandbox, "CHILD", broken)
        assert main(flags(base, tmp_path, [suite], tmp_path / "out")) == 2
    assert "could not be started (unshare: No space left on device)" in capsys.readouterr().err
    assert evaluate(base, tmp_path, [suite])["code"]["pass@1"]["n"] == 1


def test_a_program_is_started_again_where_the_sandbox_failed(monkeypatch):
    endings = iter(["broken", "broken", "passed"])
    monkeypatch.setattr(sandbox, "missing_isolation", lambda: "")
    monkeypatch.setattr(sandbox, "best_isolation", lambda: ("landlock", ""))
    monkeypatch.setattr(sandbox, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(sandbox, "run_isolated", lambda *_, **__: sandbox.Outcome(next(endings)))
    assert run_program("x = 1").passed


def test_code_settings_and_rows_are_checked(base, tmp_path, capsys, monkeypatch):
    from src.cli import main
    from src.sandbox import run

    suite = {"name": "code", "kind": "code", "rows": str(write_jsonl(tmp_path / "c.jsonl", OWN)), "max_new_tokens": 2}
    for change, message in (
        ({"k": [2]}, "k is [2] with 1 samples"),
        ({"samples": 3}, "3 samples need kind code and a temperature above 0"),
        ({"kind": "harmful", "samples": 2}, "suite code"),
    ):
        assert main(flags(base, tmp_path, [suite | change], tmp_path / "out")) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(run, "missing_isolation", lambda: "no namespaces")
    assert main(flags(base, tmp_path, [suite], tmp_path / "out")) == 2
    assert "pass --model.allow_code_execution true" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob(".parts/*.jsonl"))  # refused before anything is generated
    with pytest.raises(InputError, match=r"c\.jsonl:1: no text in column 'test'"):
        load_code(str(write_jsonl(tmp_path / "c.jsonl", [{**PASSES, "test": " "}])))
    for test, message in (
        (["assert one() == 1"], "is a list; expected text"),
        ("assert one() == 1", "no function check"),
    ):
        with pytest.raises(InputError, match=rf"c\.jsonl:1: column 'test' .*{message}"):
            load_code(str(write_jsonl(tmp_path / "c.jsonl", [{**PASSES, "test": test}])))


def test_the_shipped_mapping_reads_humanevals_schema(tmp_path):
    (source,) = as_sources("humaneval.yaml")
    source.path, source.split = str(write_jsonl(tmp_path / "h.jsonl", [PASSES])), "train"
    (row,) = load_code(source)
    assert (row.id, row.prompt, row.entry_point) == ("T/0", "def one():\n", "one")
    assert json.dumps(row.response) == json.dumps("    return 1\n")


@isolated
@pytest.mark.parametrize("guarded", ["main(sys.argv[1])", "print(area(int(input())))", "assert area(1) == 4"])
def test_what_a_program_shows_off_as_a_main_one_is_not_run(guarded):
    """openai/human-eval runs programs under another name than that of the main module."""
    function = "import math\n\ndef area(r):\n    return math.pi * r * r"
    answer = f"```python\n{function}\n\nif __name__ == '__main__':\n    {guarded}\n```"
    test = "def check(f):\n    assert abs(f(1) - math.pi) < 1e-9\n"
    assert run_program(program(PROMPT, answer, test, "area")).passed
    wrong = answer.replace("math.pi * r * r", "r")
    assert not run_program(program(PROMPT, wrong, test, "area")).passed
