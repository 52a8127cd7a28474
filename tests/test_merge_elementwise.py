import itertools

import pytest
import torch
from peft.utils import merge_utils

from src.adapters.deltas import DenseDelta, LazyDelta, blocks, combined, matrix, row_blocks
from src.errors import InputError
from src.merge.combination import Expert
from src.merge.combinations.breadcrumbs import Breadcrumbs
from src.merge.combinations.dare import Dare
from src.merge.combinations.della import Della
from src.merge.combinations.linear import Linear
from src.merge.combinations.magnitude_prune import MagnitudePrune
from src.merge.combinations.ties import Ties
from src.merge.inputs import Calibrated, read_inputs
from src.merge.randomness import bernoulli, keyed_words, uniform
from src.merge.resta import Resta
from src.merge.selection import kth_magnitude
from src.merge.sparsify import rank_probabilities
from src.merge.stage import derived
from src.merge.sweep import variants

GOLDEN = [torch.tensor([[1.0, -2.0, 3.0, 0.5]]), torch.tensor([[-1.0, -1.0, 2.0, 4.0]])]


def merged(combination, tensors, weights=None):
    weights = weights or [1.0] * len(tensors)
    experts = [Expert(f"e{i}", w, {"m": DenseDelta(t)}) for i, (t, w) in enumerate(zip(tensors, weights, strict=True))]
    return matrix(combination.combine(experts).deltas["m"])


def tensors(count=3, shape=(7, 5), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for _ in range(count)]


def test_the_published_goldens():
    assert merged(Ties(density=0.5), GOLDEN).tolist() == [[0.0, -2.0, 2.5, 4.0]]
    assert merged(MagnitudePrune(density=0.5), GOLDEN).tolist() == [[0.0, -2.0, 5.0, 4.0]]


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -2.0, 1.5]])
def test_ties_is_pefts(majority, density, weights):
    given = tensors()
    theirs = merge_utils.ties(given, torch.tensor(weights), density, majority)
    torch.testing.assert_close(merged(Ties(density, majority=majority), given, weights), theirs)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.99])
def test_magnitude_prune_is_pefts(density):
    given, weights = tensors(), [0.5, -2.0, 1.5]
    theirs = merge_utils.magnitude_prune(given, torch.tensor(weights), density)
    torch.testing.assert_close(merged(MagnitudePrune(density), given, weights), theirs)


def test_dare_is_pefts_formula_under_our_masks():
    given, weights = tensors(), [0.5, -2.0, 1.5]
    masks = [bernoulli(0.4, 3, f"e{i}", "m", slice(0, 7), 5) for i in range(3)]
    kept = [t * m / 0.4 for t, m in zip(given, masks, strict=True)]
    linear = merge_utils.task_arithmetic(kept, torch.tensor(weights))
    torch.testing.assert_close(merged(Dare(0.4, seed=3), given, weights), linear)
    agree = merge_utils.calculate_majority_sign_mask(torch.stack(kept))
    scaled = torch.stack(kept) * torch.tensor(weights)[:, None, None]
    ties = merge_utils.disjoint_merge(scaled, agree)
    torch.testing.assert_close(merged(Dare(0.4, election="peft", normalise=True, seed=3), given, weights), ties)


def largest(given, density, gamma=0.0):
    """Zeros for the share gamma of largest magnitudes, and for what comes after the next share density."""
    order = given.abs().flatten().argsort(descending=True)
    first = int(gamma * given.numel())
    kept = torch.zeros(given.numel()).index_fill_(0, order[first : first + int(density * given.numel())], 1.0)
    return given * kept.view(given.shape)


def thinned(given, key, density, spread=0.0):
    """Elements kept with a probability linear in their rank in the row, and divided by it."""
    ranks = given.abs().argsort(1).argsort(1).double()
    probability = density - spread + 2 * spread * ranks / (given.shape[1] - 1)
    drawn = uniform(0, key, "m", slice(0, given.shape[0]), given.shape[1])
    return torch.where(drawn < probability, given / probability, 0.0).float()


def sparse(method, key, given):
    """What an expert keeps at the settings of ``ELECTIONS``."""
    if isinstance(method, Della):
        return thinned(given, key, 0.5, 0.15)
    if isinstance(method, Dare):
        return thinned(given, key, 0.4)
    return largest(given, 0.5) if isinstance(method, Ties) else largest(given, 0.6, 0.1)


def elected(updates, weights, convention="peft", majority="total", normalise=True, scale=1.0):
    """One element after the other: who votes, which sign wins, who has it, and what they are divided by."""
    found = torch.zeros_like(updates[0])
    for row, column in itertools.product(*map(range, found.shape)):
        values = [each[row, column].item() for each in updates]
        votes = [v * (w if convention == "mergekit" else 1.0) for v, w in zip(values, weights, strict=True)]
        cast = votes if majority == "total" else [(vote > 0) - (vote < 0) for vote in votes]
        winner = 1 if sum(cast) >= 0 else -1
        agreeing = [(v, w) for v, w, vote in zip(values, weights, votes, strict=True) if vote * winner > 0]
        divisor = sum(w for _, w in agreeing) if convention == "mergekit" else len(agreeing)
        total = sum(v * w for v, w in agreeing)
        found[row, column] = scale * (total / divisor if normalise and agreeing else total)
    return found


ELECTIONS = {
    "ties": (Ties(0.5), {}),
    "ties sum": (Ties(0.5, normalise=False), {"normalise": False}),
    "ties count": (Ties(0.5, majority="frequency"), {"majority": "frequency"}),
    "ties mergekit": (Ties(0.5, convention="mergekit"), {"convention": "mergekit"}),
    "ties mergekit count": (
        Ties(0.5, convention="mergekit", majority="frequency"),
        {"convention": "mergekit", "majority": "frequency"},
    ),
    "ties mergekit sum": (
        Ties(0.5, convention="mergekit", normalise=False),
        {"convention": "mergekit", "normalise": False},
    ),
    "ties scaled": (Ties(0.5, scale=1.7), {"scale": 1.7}),
    "della": (Della(), {"convention": "mergekit"}),
    "della scaled": (Della(scale=1.3), {"convention": "mergekit", "scale": 1.3}),
    "della peft": (Della(election="peft"), {}),
    "della sum": (Della(normalise=False), {"convention": "mergekit", "normalise": False}),
    "dare mergekit": (Dare(0.4, election="mergekit"), {"convention": "mergekit", "normalise": False}),
    "dare peft": (Dare(0.4, election="peft", normalise=True), {}),
    "breadcrumbs peft": (Breadcrumbs(0.6, 0.1, election="peft", normalise=True), {}),
    "breadcrumbs mergekit": (
        Breadcrumbs(0.6, 0.1, election="mergekit"),
        {"convention": "mergekit", "normalise": False},
    ),
}


@pytest.mark.parametrize(("method", "rule"), ELECTIONS.values(), ids=ELECTIONS)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [0.5, 3.0, 1.5, 0.7], [0.5, -2.0, 1.2, 0.4]])
def test_elections_are_those_of_a_loop_over_elements(method, rule, weights):
    given = tensors(4)
    expected = elected([sparse(method, f"e{i}", one) for i, one in enumerate(given)], weights, **rule)
    torch.testing.assert_close(merged(method, given, weights), expected)


@pytest.mark.parametrize("method", [Dare(1.0, normalise=True), Breadcrumbs(1.0, 0.0, normalise=True)])
def test_a_mean_without_election_counts_the_weight_of_an_expert_that_lacks_the_module(method):
    one, two = tensors(2)
    lacking = [Expert("a", 2.0, {"m": DenseDelta(one)}), Expert("b", 3.0, {})]
    torch.testing.assert_close(matrix(method.combine(lacking).deltas["m"]), 2 * one / 5)
    torch.testing.assert_close(merged(method, [one, two], [2.0, 3.0]), (2 * one + 3 * two) / 5)
    torch.testing.assert_close(merged(method, [one, two], [2.0, 3.0]), merged(Linear(), [one, two], [2.0, 3.0]))


@pytest.mark.parametrize("election", ["peft", "mergekit"])
def test_an_election_divides_by_those_that_have_the_module(election):
    experts = [Expert("a", 2.0, {"m": DenseDelta(GOLDEN[0])}), Expert("b", 3.0, {})]
    factor = 2.0 if election == "peft" else 1.0
    for method in (Dare(1.0, election=election, normalise=True), Breadcrumbs(1.0, 0.0, election, normalise=True)):
        torch.testing.assert_close(matrix(method.combine(experts).deltas["m"]), factor * GOLDEN[0])


def test_conventions_agree_where_all_weights_are_one_and_differ_by_the_weight_where_they_are_equal():
    given = tensors()
    peft, mergekit = Ties(0.5), Ties(0.5, convention="mergekit")
    torch.testing.assert_close(merged(peft, given), merged(mergekit, given))
    torch.testing.assert_close(merged(peft, given, [3.0] * 3), 3 * merged(mergekit, given, [3.0] * 3))


def test_weighted_elections_differ_between_the_conventions():
    given = [torch.tensor([[1.0]]), torch.tensor([[-3.0]])]
    assert merged(Ties(1.0), given, [5.0, 1.0]).item() == -3.0
    assert merged(Ties(1.0, convention="mergekit"), given, [5.0, 1.0]).item() == 1.0


def test_an_elected_sum_of_zero_counts_as_plus():
    given = [torch.tensor([[2.0]]), torch.tensor([[-2.0]])]
    assert merged(Ties(1.0), given).item() == 2.0


def test_global_trimming_ranks_over_all_modules():
    large, small = torch.full((2, 2), 5.0), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    experts = [Expert("a", 1.0, {"x": DenseDelta(large), "y": DenseDelta(small)})]
    deltas = Ties(0.5, trim="global").combine(experts).deltas
    assert torch.equal(matrix(deltas["x"]), large)
    assert matrix(deltas["y"]).count_nonzero() == 0
    each = Ties(0.5).combine(experts).deltas
    assert matrix(each["y"]).tolist() == [[0.0, 0.0], [3.0, 4.0]]


def test_global_trimming_takes_a_threshold_for_each_expert_even_of_one_file():
    """An adapter may be utility and safety expert of one merge, in two sizes and under one key."""
    modules = dict(zip("xy", tensors(2), strict=True))
    experts = [Expert("a", 1.0, {name: DenseDelta(size * w) for name, w in modules.items()}) for size in (1.0, 0.1)]
    apart = [Expert(str(place), 1.0, expert.deltas) for place, expert in enumerate(experts)]
    one, other = (Ties(0.3, trim="global").combine(given).deltas for given in (experts, apart))
    for name in modules:
        assert torch.equal(matrix(one[name]), matrix(other[name]))


def test_the_kth_magnitude_is_that_of_a_sort_in_any_blocks():
    values = torch.randn(999, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 20, 999)
    ordered = values.abs().sort(descending=True).values
    for k in (1, 2, 500, 998):
        for size in (1000, 10):
            assert kth_magnitude(lambda size=size: values.split(size), k) == ordered[k - 1].item()
    assert kth_magnitude(lambda: [values], 0) == float("inf")
    assert kth_magnitude(lambda: [values], 999) == 0.0


@pytest.mark.parametrize("method", [Ties(1e-6), Ties(1e-6, trim="global"), MagnitudePrune(1e-6), Breadcrumbs(1e-6, 0)])
def test_one_element_at_least_is_kept(method):
    found = merged(method, [torch.arange(1.0, 13.0).view(3, 4)])
    assert found.count_nonzero() == 1
    assert found.max() == 12.0


def test_equal_magnitudes_share_one_fate():
    assert merged(MagnitudePrune(0.5), [torch.tensor([[1.0, -1.0, 1.0, 0.5]])]).tolist() == [[1.0, -1.0, 1.0, 0.0]]


def test_all_zeros_and_missing_modules_stay_zero():
    for method in (Ties(), Dare(), Della(), MagnitudePrune(), Breadcrumbs(), Dare(rescale="l1")):
        assert merged(method, [torch.zeros(3, 4)] * 2).count_nonzero() == 0
    experts = [Expert("a", 1.0, {"x": DenseDelta(GOLDEN[0])}), Expert("b", 1.0, {})]
    assert matrix(Ties(1.0).combine(experts).deltas["x"]).tolist() == GOLDEN[0].tolist()
    assert matrix(Linear().combine(experts).deltas["x"]).tolist() == (GOLDEN[0] / 2).tolist()


def test_rows_of_one_element_survive_della():
    assert merged(Della(density=0.8, epsilon=0.1), [torch.ones(64, 1)]).count_nonzero() > 30
    ranks = rank_probabilities(torch.tensor([[3.0, -1.0, 2.0]]), 0.5, 0.25)
    assert ranks.tolist() == [[0.75, 0.25, 0.5]]


def test_breadcrumbs_drops_both_ends():
    given = torch.arange(1.0, 11.0).reshape(2, 5)
    kept = merged(Breadcrumbs(density=0.6, gamma=0.2), [given])
    assert sorted(kept[kept != 0].tolist()) == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize("method", [Dare(0.3), Della(0.5, 0.3, election="none", normalise=False)])
def test_random_masks_keep_the_expectation(method):
    given = torch.ones(400, 500) + torch.arange(500.0) / 500
    error = merged(method, [given]).mean() / given.mean() - 1
    # Four standard errors of 200 000 draws.
    assert abs(error) < 4 * (1 / 0.2 - 1) ** 0.5 / 200_000**0.5


def test_l1_rescaling_restores_the_sum_of_magnitudes():
    given = tensors(1, (40, 30))[0]
    for method in (Dare(0.3, rescale="l1"), Della(0.5, rescale="l1", election="none", normalise=False)):
        assert merged(method, [given]).abs().sum().item() == pytest.approx(given.abs().sum().item(), rel=1e-5)


def test_masks_depend_on_seed_expert_and_module_only():
    whole = keyed_words(1, "a", "m", slice(0, 9), 7)
    for start in range(9):
        assert (keyed_words(1, "a", "m", slice(start, 9), 7) == whole[start:]).all()
    for other in ((2, "a", "m"), (1, "b", "m"), (1, "a", "n")):
        assert (keyed_words(*other, slice(0, 9), 7) != whole).mean() > 0.9
    assert bernoulli(1.0, 0, "a", "m", slice(0, 50), 50).all()


def resta(seed, one, two):
    return matrix(Resta(density=0.5, seed=seed).patch({"m": DenseDelta(one)}, {"m": DenseDelta(two)}, None).pairs["m"])


def della(seed, *given):
    return merged(Della(0.5, 0.3, seed=seed), given)


@pytest.mark.parametrize("make", [della, resta])
def test_another_seed_drops_other_elements(make):
    given = tensors(2)
    assert torch.equal(make(1, *given), make(1, *given))
    assert not torch.equal(make(0, *given), make(1, *given))


def test_an_expert_keeps_its_mask_at_any_position():
    one, two = tensors(2)
    experts = [Expert("one", 1.0, {"m": DenseDelta(one)}), Expert("two", 1.0, {"m": DenseDelta(two)})]
    for method in (Dare(0.3), Della()):
        forward, backward = (matrix(method.combine(order).deltas["m"]) for order in (experts, experts[::-1]))
        torch.testing.assert_close(forward, backward)


def test_a_method_drops_other_elements_than_its_combination_has(adapters):
    """With the masks of the combination it would drop nothing more, and its rescaling double what is left."""
    method = Resta(density=0.5)
    inputs = read_inputs(
        [str(adapters["utility"])], None, str(adapters["safety"]), Calibrated([], None, method, Dare())
    )
    ((_, total, patch),) = derived(variants(method, Dare(), None), inputs)
    thinned = combined([total.deltas, patch.pairs, inputs.safety.updates], [1.0, 1.0, -1.0])
    before, after = (
        torch.cat([matrix(deltas[name]).flatten() for name in deltas]) for deltas in (total.deltas, thinned)
    )
    dropped = (after[before != 0].abs() < 1e-6 * before.abs().max()).double().mean().item()
    assert 0.4 < dropped < 0.6


def test_blocks_cover_every_row_once():
    shape = (1000, 4096)
    assert [row for rows in row_blocks(shape) for row in range(rows.start, rows.stop)] == list(range(1000))
    assert len(row_blocks(shape)) > 1
    wide = LazyDelta((3, 1 << 21), lambda rows: torch.ones(rows.stop - rows.start, 1 << 21))
    assert [block.shape[0] for block in blocks(wide)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ties(density=0.0), "Ties density is 0.0"),
        (lambda: Dare(density=1.5), "Dare density is 1.5"),
        (lambda: Della(density=0.5, epsilon=0.6), "Della epsilon is 0.6"),
        (lambda: Breadcrumbs(density=0.9, gamma=0.2), "sum of at most 1"),
        (lambda: Ties(scale=float("nan")), "Ties scale is nan"),
        (lambda: Della(scale=float("inf")), "Della scale is inf"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_pruned_patch_leaves_the_utility_update_whole():
    utility, safety = ({"m": DenseDelta(torch.tensor([values]))} for values in ([1.0, 2, 3, 4, 5], [5.0, 4, 3, 2, 1]))
    of = {flag: MagnitudePrune(0.2, patch_only=flag).patch(utility, safety, None).pairs["m"] for flag in (False, True)}
    assert matrix(of[True]).tolist() == [[5, 0, 0, 0, 0]]
    assert matrix(of[False]).tolist() == [[4, -2, -3, -4, 0]]
