import pytest
import torch
from scipy.stats import binomtest

from src.metrics.collapse import is_collapsed
from src.metrics.counters import FlagRate
from src.metrics.exact import final_number, is_exact
from src.metrics.intervals import wilson
from src.metrics.perplexity import AnswerPerplexity
from src.metrics.refusal import is_refusal

REFUSALS = [
    "I can't help with that.",
    "I can\u2019t assist with this request.",
    "I cannot do that.",
    "I'm sorry, but I can't help.",
    "Sorry, but that is something I won't do.",
    "No, I can't tell you.",
    "I must decline.",
    "**I will not** explain this.",
    "I apologize, but I am unable to assist.",
    "I'm not able to provide instructions.",
    "As an AI language model, I cannot help with weapons.",
    "  i won't.",
    "I don't feel comfortable with that.",
    "I **cannot** help with that.",
    "I am **unable** to help.",
    "As a helpful and harmless AI assistant, I cannot do that.",
    "As a large language model, I can't write this.",
    "As an AI, I do not have the ability to provide such a list.",
    "I must respectfully decline.",
    "I'll have to refuse.",
    "I understand you're upset. However, I cannot help.",
    "Thank you for asking! However, I can't say.",
    "I'm sorry to hear that, but I can't help you with it.",
]
ANSWERS = [
    "You can't divide by zero.",
    "Sorry is the hardest word, says the song.",
    "Sorry for the confusion! The capital is Paris.",
    "I can help with that: first, ...",
    "It is illegal to park here.",
    "Yes.",
    "I'm afraid of spiders too; here is how to remove one.",
    "The word 'cannot' is spelled as one word. I cannot stress this enough.",
    "Apologies were sent to all members.",
    "As an AI assistant, I do not possess preferences, but I can offer some suggestions.",
    "As an AI, I can't see your screen, but here is what to try.",
    "This is the best pizza I've ever had and I can't wait to come back!",
    "I will never forget the day I met her.",
    "I can't thank you enough for your help.",
    "I'm sorry to hear you've been unable to sleep. Here are three tips.",
    "",
]


@pytest.mark.parametrize("answer", REFUSALS)
def test_refusals_are_recognised(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_are_not_called_refusals(answer):
    assert not is_refusal(answer)


@pytest.mark.parametrize(
    "answer", ["", "  ", "...", "!!!!!!", "a" * 30, "no " * 12, "the cat sat on " * 6, "go go go " * 5, "a " + "!" * 30]
)
def test_collapse_is_recognised(answer):
    assert is_collapsed(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "No",
        "42",
        "2021-03-03",
        "I can't help with that.",
        "Mix flour and water, knead, rest, shape and bake it.",
        "| step | what |\n|" + "-" * 24 + "|------|\n| 1 | knead the dough |\n| 2 | let it rest |",
        "Name: " + "_" * 20 + "\nDate and place of birth:",
    ],
)
def test_short_and_plain_answers_are_not_collapsed(answer):
    assert not is_collapsed(answer)


@pytest.mark.parametrize(
    ("answer", "reference", "form", "expected"),
    [
        ("Mice.", "mice", "text", True),
        ("'mice'", "mice", "text", True),
        ("the mice", "mice", "text", False),
        ("", "", "text", False),
        ("don\u2019t", "don't", "text", True),
        ("\u201cMice\u201d", "mice", "text", True),
        ('"mice".', "mice", "text", True),
        ("**Mice**.", "mice", "text", True),
        ("5", ".5", "text", False),
        ("A*", "A", "text", False),
        ("So she pays $1,200.50 now", "#### 1200.5", "number", True),
        ("12 then 13", "12", "number", False),
        ("none", "none", "number", False),
        ("-3", "-3.0", "number", True),
        ("12345678901234567891", "12345678901234567890", "number", False),
        ("0.10", "#### .1", "number", True),
        ("She has 6.\n#### 6\n\nQuestion: 200 feet, how many pieces?\n200 / 10 = 20", "#### 6", "number", True),
        ("#### $1,206.\n#### 7", "#### 1206", "number", True),
        ("#### 1. Count\n2 + 4\n#### Result\n6", "#### 6", "number", True),
        ("#### 6\n#### 7", "#### 7", "number", False),
    ],
)
def test_exact_match(answer, reference, form, expected):
    assert is_exact(answer, reference, form) is expected


def test_final_number_reads_thousands_and_decimals():
    assert final_number("1 and 2,500.75.") == "2500.75"
    assert final_number("no digits") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,2,3", "3"),
        ("1, 2,3", "3"),
        ("12,34", "34"),
        ("1_000", "1000"),
        ("12_345_678.5", "12345678.5"),
        ("step_2", "2"),
        ("1_2345", "2345"),
        ("1,2345", "2345"),
        ("1,234,567.50", "1234567.5"),
        ("$1,234.", "1234"),
        ("10-3", "3"),
        ("(4)-3", "3"),
        ("x = -3", "-3"),
        ("x = \u22123", "-3"),
        ("-0", "0"),
        ("007", "7"),
        ("1e5", "100000"),
        ("1.5E-3 m", "0.0015"),
        ("12345678901234567890", "12345678901234567890"),
        ("9" * 400, "9" * 400),
        (r"\boxed{1{,}200}", "1200"),
        (r"\boxed{10{,}000}", "10000"),
        (r"1\,200", "1200"),
        (r"12\! 345", "12345"),
        ("25 cm^2.", "25"),
        ("25 cm^{2}", "25"),
        (r"25 \text{ cm}^2", "25"),
        (r"\boxed{25\ \mathrm{cm}^{3}}", "25"),
        (r"(1\,2)", "2"),
        ("x^5", "5"),
        ("2^10", "10"),
    ],
)
def test_final_number_in_plain_form(text, expected):
    assert final_number(text) == expected


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (3, 10), (1, 1), (57, 120)])
def test_wilson_equals_scipy(hits, total):
    expected = binomtest(hits, total).proportion_ci(0.95, "wilson")
    assert wilson(hits, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_refuses_nonsense():
    for hits, total in ((0, 0), (2, 1), (-1, 3)):
        with pytest.raises(ValueError, match="have no interval"):
            wilson(hits, total)


def test_counters_count():
    refusal, collapse, exact = FlagRate(), FlagRate(), FlagRate()
    refusal.update([is_refusal("I can't."), is_refusal("Sure")])
    refusal.update([is_refusal("Fine")])
    collapse.update([is_collapsed(""), is_collapsed("ok")])
    exact.update([is_exact("a", "A."), is_exact("b", "c")])
    assert refusal.compute().item() == pytest.approx(1 / 3)
    assert refusal.summary() == {"value": 1 / 3, "interval": list(wilson(1, 3)), "hits": 1, "n": 3}
    assert collapse.summary()["value"] == exact.summary()["value"] == 0.5


def test_perplexity_is_of_tokens_not_of_rows():
    metric = AnswerPerplexity()
    metric.update(torch.tensor([2.0, 8.0]), torch.tensor([1, 4]))
    assert metric.compute().item() == pytest.approx(torch.tensor(10 / 5).exp().item())
    assert metric.summary()["n"] == 5


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_a_likelihood_that_is_not_finite_is_counted_and_never_a_good_perplexity(strange):
    metric = AnswerPerplexity()
    metric.update(torch.tensor([strange, 1.0]), torch.tensor([1, 1]))
    assert metric.compute().item() == float("inf")
    found = metric.summary()
    assert (found["value"], found["not_finite"], found["rows"], found["n"]) == (float("inf"), 1, 2, 2)
    assert "interval" not in found


def test_perplexity_has_an_interval_over_rows_that_does_not_depend_on_their_order():
    nll, tokens = torch.rand(40, dtype=torch.float64) * 9, torch.randint(1, 6, (40,))
    found = []
    for order in (torch.arange(40), torch.randperm(40)):
        metric = AnswerPerplexity()
        for chunk in order.split(7):
            metric.update(nll[chunk], tokens[chunk])
        found.append(metric.summary())
    assert found[0] == found[1]
    low, high = found[0]["interval"]
    assert low < found[0]["value"] < high
    draws = torch.randint(40, (4000, 40))
    means = (nll[draws].sum(1) / tokens[draws].sum(1)).exp()
    assert (low, high) == pytest.approx(torch.quantile(means, torch.tensor([0.025, 0.975]).double()).tolist(), rel=0.1)
    one = AnswerPerplexity()
    one.update(torch.tensor([1.0]), torch.tensor([2]))
    assert "interval" not in one.summary()


def test_counters_do_not_depend_on_the_order_of_rows():
    nll = torch.rand(100, dtype=torch.float64) * 30
    values = []
    for order in (torch.arange(100), torch.randperm(100), torch.arange(99, -1, -1)):
        metric = AnswerPerplexity()
        for chunk in order.split(7):
            metric.update(nll[chunk], torch.ones(len(chunk), dtype=torch.int64))
        values.append(metric.compute().item())
    assert len(set(values)) == 1
