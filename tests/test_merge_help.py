"""What ``--method NAME --method.help`` says, of every method there is."""

import re

import pytest

from src.arguments import name_in_help
from src.cli import main
from src.explain import explanation
from src.merge import registry  # noqa: F401 - fills the registry
from src.merge.base import MergeMethod
from src.merge.combination import Combination
from src.metrics.judging import Judge
from tests.registries import concrete
from tests.test_cli import fails

PAPER = re.compile(r"\d{4}\.\d{5}|no (?:arXiv id|paper)", re.IGNORECASE)
LAST_OF_EACH = {"Ties": "method.scale", "Dare": "method.seed", "Led": "method.weight_safety"}


def helped(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_is_the_whole_docstring_of_every_method(capsys):
    for cls in concrete(MergeMethod):
        text = helped(capsys, "merge", "--method", cls.__name__, "--method.help")
        assert text.startswith(f"usage: python -m src merge --method {cls.__name__} "), text[:80]
        assert explanation(cls) in text
        assert ("--method.OPTION VALUE" in text) == ("no options" not in text)
        assert f"--{LAST_OF_EACH.get(cls.__name__, '')}" in text


def test_every_method_names_its_paper_its_fisher_files_and_what_alpha_means():
    for cls in concrete(MergeMethod):
        text = explanation(cls)
        assert PAPER.search(text), cls
        if cls.needs_fisher:
            assert "Fisher" in text or "magnitudes" in text, cls
            assert cls.coordinates in text, cls
            assert all(kind in text for kind in cls.representations) or "any representation" in text, cls
        if not issubclass(cls, Combination) and cls.__module__.rpartition(".")[2] not in ("sst_m", "sst_v"):
            assert re.search(r"[Ss]trength", text), cls


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["merge", "--combine", "CoreSpace", "--combine.help"],
            ["--combine CoreSpace ", "2509.17786", "--combine.inner"],
        ),
        (["merge", "--combine.help=Linear"], ["--combine Linear …", "2203.05482", "no options"]),
        (
            ["merge", "--combine", "Knots", "--combine.inner", "Dare", "--combine.inner.help"],
            ["--combine Knots --combine.inner Dare ", "2311.03099", "--combine.inner.rescale"],
        ),
        (["merge", "--method.help", "Sst"], ["F_s v = λ (F_u + εI) v", "--method.rho_s"]),
        (["merge", "--method", "Sst", "--method.help"], ["F_s v = λ (F_u + εI) v", "--method.rho_s"]),
        (["merge", "--method.help"], ["--method NAME", "SstDiagonal", "RegMean (2212.09849)"]),
        (["judge", "--judge", "Refusal", "--judge.help"], ["--judge Refusal "]),
    ],
)
def test_help_of_any_option_that_names_a_class(capsys, arguments, words):
    text = helped(capsys, *arguments)
    assert all(word in text for word in words), text
    if "--judge" in arguments:
        assert explanation(next(cls for cls in concrete(Judge) if cls.__name__ == "Refusal")) in text


def test_a_class_of_a_users_own_is_explained_by_its_path(tmp_path, monkeypatch, capsys):
    (tmp_path / "mymerge.py").write_text(
        "from src.merge.combinations.ties import Ties\n"
        "class Half(Ties):\n"
        "    'Half of it (no paper).'\n"
        "    def __init__(self, part: float = 0.5) -> None:\n"
        "        self.part = part\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for given in ("--method mymerge.Half --method.help", "--method.help=mymerge.Half"):
        text = helped(capsys, "merge", *given.split())
        assert text.startswith("usage: python -m src merge --method mymerge.Half [")
        assert "Half of it" in text
        assert "--method.part" in text
    for path, why in (("mymerge.Hal", " (module 'mymerge' has no attribute 'Hal')"), ("pathlib.Path", "")):
        line = fails(["merge", "--method", path, "--method.help"], capsys)
        assert f"error: method is {path!r}{why}; expected one of AlignGuardPosthoc, " in line


@pytest.mark.parametrize(
    ("given", "key", "some"),
    [
        (["--method", "Nope"], "method", "AlignGuardPosthoc, Breadcrumbs, "),
        (["--method.help", "Nope"], "method", "TaskArithmetic, Ties, TsvM"),
        (["--combine", "Sst"], "combine", "Breadcrumbs, CompressThenMerge, "),
        (
            ["--combine", "Knots", "--combine.inner", "Nope"],
            'Parser key "combine": inner',
            "TaskArithmetic, Ties, TsvM",
        ),
    ],
)
def test_an_unknown_name_is_one_line_with_the_valid_ones(capsys, given, key, some):
    line = fails(["merge", *given, "--utility", "a", "--output", "b"], capsys)
    assert line.removeprefix("error: ").startswith(f"{key} is '{given[-1]}'; expected one of ")
    assert some in line
    assert "Sst," not in line or key == "method"


def test_a_class_in_a_class_may_be_asked_for():
    given = "--combine Knots --combine.inner Dare --combine.inner.help"
    assert name_in_help(given.split()) == "--combine.help Knots --combine.inner.help Dare".split()
