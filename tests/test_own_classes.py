"""Methods and judges of a user's own module: their source identifies them, and what they get wrong is one line."""

import gc
import sys
from importlib import import_module, invalidate_caches
from types import ModuleType

import pytest
import torch

from src.errors import InputError
from src.experiments.cell import digest
from src.experiments.content import identified
from src.experiments.plain_settings import plain
from src.judges.endpoint import Endpoint
from src.judges.refusal import Refusal
from src.judges.stage import judge as judge_command
from src.judges.verdicts import judged
from src.merge.combinations.core_space import CoreSpace
from src.merge.combinations.knots import Knots
from src.merge.combinations.linear import Linear
from src.merge.combinations.ties import Ties
from src.merge.settings import settings, with_option
from src.merge.stage import merge
from src.merge.write import write
from src.metrics import judging
from tests.evaluations import write_jsonl

METHOD = """
from src.merge.base import MergeMethod, Patch
from src.merge.combination import Combination, Combined
class Own(MergeMethod):
    def __init__(self, scale: float = 0.5, first=None, timeout: float = 1.0) -> None:
        self.scale, self.first, self.timeout = scale, first, timeout
    def patch(self, utility, safety, fisher):
        return Patch(dict(safety))
class OwnMean(Combination):
    def combine(self, experts):
        return Combined(dict(experts[0].deltas))
"""
JUDGE = """
from src.metrics.judging import Judge, Judgement
class Own(Judge):
    finds = "refusal"
    def __init__(self, words: int = 3) -> None:
        self.words = words
    def judge(self, prompts, answers):
        return [Judgement(len(answer.split()) < self.words) for answer in answers]
"""


@pytest.fixture(scope="module", autouse=True)
def _forgotten():
    """Other tests look at every subclass that there is."""
    yield
    judging._sources.cache_clear()
    gc.collect()


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes a module and imports it anew, as the next command would."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))

    def loaded(text, name="its_own"):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        invalidate_caches()
        return import_module(name)

    yield loaded
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def merge_key(method=None, combine=None):
    return digest(identified("merge", {"method": plain(method), "combine": plain(combine)}))


def test_key(judge):
    suite = {"name": "s", "kind": "harmful", "rows": "org/rows", "judge": plain(judge)}
    return digest(identified("test", {"data": {"suites": [suite]}}))


test_key.__test__ = False


def of_methods(module):
    """Keys of everything that may hold a method."""
    own, mean = module.Own(), module.OwnMean()
    return [merge_key(own), merge_key(None, mean), merge_key(Knots(mean)), merge_key(module.Own(first=module.Own(2.0)))]


def test_an_edit_of_an_own_method_changes_every_key_that_it_is_in(load):
    before = of_methods(load(METHOD))
    assert of_methods(load(METHOD)) == before
    after = of_methods(load(METHOD.replace("dict(safety)", "{}")))
    assert len({*before, *after}) == len(before) + len(after)


def test_an_edit_of_an_own_judge_changes_its_keys_and_old_verdicts_are_not_served(load, tmp_path):
    one = load(JUDGE).Own()
    keys = one.key, test_key(one)
    assert [found.positive for found in judged(one, ["p"], ["no"], folder=tmp_path)] == [True]
    again = load(JUDGE).Own()
    assert (again.key, test_key(again)) == keys
    other = load(JUDGE.replace("<", ">=")).Own()
    assert other.key != keys[0]
    assert test_key(other) != keys[1]
    assert [found.positive for found in judged(other, ["p"], ["no"], folder=tmp_path)] == [False]


def test_judges_of_one_name_in_two_modules_share_no_verdicts_and_a_place_changes_no_key(load):
    one, two, same = (load(*given).Own().key for given in ((JUDGE,), (JUDGE + "#", "its_other"), (JUDGE, "moved")))
    assert one != two
    assert one == same


def test_the_files_of_own_bases_count_too(load):
    keys = []
    for number in (1, 2):
        load(METHOD + f"LIMIT = {number}\n", "its_base")
        keys.append(merge_key(load("from its_base import Own as Base\nclass Own(Base): pass\n").Own()))
    assert keys[0] != keys[1]


def test_only_of_own_classes_every_option_counts(load):
    own = load(METHOD).Own
    assert merge_key(own(timeout=2.0)) != merge_key(own())


def test_shipped_classes_are_identified_as_ever():
    """Keys of committed cells and of verdicts: these were computed before own classes had a source in theirs."""
    judge = Endpoint("http://localhost:8000/v1", "m", retries=7)
    given = {"method": plain(CoreSpace(Ties(density=0.3))), "combine": plain(Linear()), "rank": 4}
    assert identified("merge", given) == given
    assert digest(identified("merge", given)) == "5a215c9c4b701ca7a37f9111"
    suite = {"name": "s", "kind": "harmful", "rows": "org/rows", "judge": plain(judge)}
    assert digest(identified("test", {"data": {"suites": [suite]}})) == "4009e45a3da95418917eb878"
    assert judge.key == "25bf12f29a2ec023"
    assert "source" not in str(identified("test", {"data": {"suites": [suite]}}))


def test_a_judge_in_no_file_judges_and_a_study_refuses_it(monkeypatch):
    keys = []
    for _ in range(2):
        notebook = ModuleType("a_notebook")
        monkeypatch.setitem(sys.modules, "a_notebook", notebook)
        exec(JUDGE, notebook.__dict__)
        judge = notebook.Own()
        judge.check()
        keys += [judge.key, notebook.Own().key]
        with pytest.raises(InputError, match=r"a_notebook\.Own: a study .* expected a class at the top of a module"):
            test_key(judge)
    assert keys[0] == keys[1] != keys[2] == keys[3]  # two definitions, of which nothing says that they are the same


def test_a_class_of_the_started_script_is_refused_by_a_study():
    for path, message in (("__main__.Own", "cannot know or import"), ("no_such_module.Own", "cannot be imported")):
        with pytest.raises(InputError, match=message):
            identified("merge", {"method": {"class_path": path}})


def test_a_sweep_of_an_option_that_is_kept_elsewhere_is_one_line(load):
    own = load(
        METHOD.replace("self.scale, self.first, self.timeout = scale, first, timeout", "self._scale = scale")
    ).Own
    with pytest.raises(
        InputError, match=r"sweep\.scale: Own keeps no scale; expected self\.scale = scale in its __init__"
    ):
        with_option(own(), "scale", 2.0)
    with pytest.raises(InputError, match=r"Own keeps no first; expected self\.first = first in its __init__"):
        plain(own())


def test_an_option_without_a_type_is_swept_as_it_is_given(load):
    own = load(METHOD.replace("scale: float", "scale")).Own
    assert with_option(own(), "scale", 2.5).scale == 2.5
    assert with_option(own(), "scale", 2.0).scale == 2.0


def test_options_without_names_are_refused_as_they_would_be_lost(load):
    derived = "from src.merge.sst import Sst\nclass Own(Sst):\n    def __init__(self, scale: float = 1.0, **others):\n"
    own = load(f"{derived}        super().__init__(**others)\n        self.scale = scale\n").Own(t=9.0)
    for use in (plain, lambda method: with_option(method, "scale", 2.0)):
        with pytest.raises(InputError, match=r"Own: its __init__ takes \*\*others; expected every option by its name"):
            use(own)


def test_what_no_manifest_holds_is_named(load, tmp_path):
    own = load(METHOD).Own(first=torch.ones(2))
    with pytest.raises(InputError, match=r"method Own: its attribute first \(Tensor\) cannot be written .* underscore"):
        settings(own)
    record = {"method": "Own", "findings": {"norm": torch.ones(())}, "combine": {"method": "Mean", "findings": {}}}
    for one in (record, {"method": "x", "findings": {}, "combine": record}):
        with pytest.raises(InputError, match=r"method Own: its finding norm \(Tensor\) cannot be written as JSON"):
            write(tmp_path / "m", {}, None, one, None)
    assert not (tmp_path / "m").exists()
    with pytest.raises(InputError, match=r"judge Own: its attribute words \(Tensor\) cannot be written as JSON"):
        _ = load(JUDGE).Own(torch.ones(2)).key


LIST = "[Judgement(len(answer.split()) < self.words) for answer in answers]"
WRONG = {
    "True": "judge() gave a value of type bool; expected a list with one Judgement per answer",
    "[True for answer in answers]": "judge() gave a list with a bool; expected a list with one Judgement per answer",
    f"{LIST}[1:]": "judge() gave 0 judgements on 1 answers; expected a list with one Judgement per answer",
    f"{LIST} * 2": "judge() gave 2 judgements on 1 answers; expected a list with one Judgement per answer",
    "[Judgement('yes')] * len(answers)": "judge() gave a Judgement whose positive is of type str; expected bool",
}


@pytest.mark.parametrize("gives", WRONG)
def test_a_judge_that_gives_no_judgements_is_found_before_generating_and_at_its_verdicts(load, tmp_path, gives):
    own = load(JUDGE.replace(LIST, gives)).Own()
    for judge in (own.check, lambda: judged(own, ["p"], ["a"], folder=tmp_path)):
        with pytest.raises(InputError) as error:
            judge()
        assert str(error.value) == f"judge Own: {WRONG[gives]}"


@pytest.mark.parametrize(("line", "found"), [("", "None"), ('finds = "harm"', "'harm'")])
def test_a_judge_that_does_not_say_what_it_finds_is_one_line(load, tmp_path, line, found):
    module = load(JUDGE.replace('finds = "refusal"', line or "pass"))
    expected = f"judge Own: its attribute finds is {found}; expected 'refusal' or 'harmful'"
    for judge in (module.Own().check, lambda: judged(module.Own(), ["p"], ["a"], folder=tmp_path)):
        with pytest.raises(InputError) as error:
            judge()
        assert str(error.value) == expected
    labels = write_jsonl(tmp_path / "l.jsonl", [{"prompt": "p", "answer": "a", "label": 1}])
    with pytest.raises(InputError, match="its attribute finds"):
        judge_command(labels=str(labels), judge=module.Own(), output=str(tmp_path / "out"))


def test_a_judge_whose_settings_change_as_it_judges_is_found_before_generating(load):
    judge = load(JUDGE.replace("return [", "self.calls = 1\n        return [")).Own()
    with pytest.raises(InputError, match="judge Own: its attributes change as it loads or judges"):
        judge.check()


def test_a_shipped_judge_is_loaded_and_asked_nothing(monkeypatch):
    monkeypatch.setattr(Refusal, "judge", None)
    Refusal().check()


NO_PATCHES = """
import torch
from src.adapters.pairs import LowRankPair
from src.merge.base import MergeMethod, Patch
class Dict(MergeMethod):
    def patch(self, utility, safety, fisher):
        return dict(safety)
class Elsewhere(MergeMethod):
    def patch(self, utility, safety, fisher):
        return Patch({"model.layers.99.self_attn.q_proj": next(iter(safety.values()))})
class Shape(MergeMethod):
    def patch(self, utility, safety, fisher):
        name, pair = next(iter(safety.items()))
        return Patch({name: LowRankPair(pair.a[:, :-1], pair.b)})
"""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Dict", "method Dict returned a dict; expected a src.merge.base.Patch"),
        ("Elsewhere", "for model.layers.99.self_attn.q_proj; expected no such module"),
        ("Shape", "method Shape returned .* expected \\("),
    ],
)
def test_a_method_of_ones_own_that_returns_no_patch_is_one_line(load, adapters, tmp_path, kind, message):
    method = getattr(load(NO_PATCHES), kind)()
    given = {name: str(path) for name, path in adapters.items() if name in ("utility", "safety")}
    with pytest.raises(InputError, match=message):
        merge(**given, method=method, output=str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()
