"""What every registered method must satisfy, whatever it computes."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from threadpoolctl import threadpool_info, threadpool_limits

from src.adapters.deltas import combined
from src.adapters.pairs import LowRankPair
from src.adapters.peft_files import read_adapter, write_adapter
from src.merge import registry  # noqa: F401 - fills the registry
from src.merge.align_guard import AlignGuardPosthoc
from src.merge.base import MergeMethod
from src.merge.combination import Combination, Expert, KeyedDeltas
from src.merge.combinations.breadcrumbs import Breadcrumbs
from src.merge.combinations.compress_then_merge import CompressThenMerge
from src.merge.combinations.concatenate import Concatenate
from src.merge.combinations.core_space import CoreSpace
from src.merge.combinations.dare import Dare
from src.merge.combinations.fisher_average import FisherAverage
from src.merge.combinations.iso_c import IsoC
from src.merge.combinations.knots import Knots
from src.merge.combinations.linear import Linear
from src.merge.combinations.magnitude_prune import MagnitudePrune
from src.merge.combinations.task_arithmetic import TaskArithmetic
from src.merge.combinations.ties import Ties
from src.merge.combinations.tsv_m import TsvM
from src.merge.parallel import one_thread_each
from src.merge.sst import Sst
from src.merge.stage import merge
from tests.merging import anchored, matching_fishers, regauged, weight_fisher, write_fishers
from tests.registries import concrete
from tests.tiny import make_model, random_pairs

METHODS = [pytest.param(cls(), id=cls.__name__) for cls in concrete(MergeMethod)]
COMBINATIONS = [pytest.param(cls(), id=cls.__name__) for cls in concrete(Combination)]


def double(pairs):
    return {name: LowRankPair(pair.a.double(), pair.b.double()) for name, pair in pairs.items()}


def patches(method, utility, safety):
    return method.patch(utility, safety, matching_fishers(method, utility, safety)).pairs


def expert(combination, key, weight, pairs, shapes=None):
    """An expert with statistics of its own, where the combination needs them."""
    found = shapes or {name: pair.shape for name, pair in pairs.items()}
    fisher = weight_fisher(found, combination.representations[-1], ord(key)) if combination.needs_fisher else None
    return Expert(key, weight, pairs, fisher)


def close(one, two):
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(one[name].dense(), two[name].dense(), rtol=1e-6, atol=1e-9)


@pytest.fixture
def updates():
    model = make_model()
    return double(random_pairs(model, 3, 1)), double(random_pairs(model, 2, 2))


@pytest.mark.parametrize("method", METHODS)
def test_the_patch_does_not_depend_on_the_factors(method, updates):
    utility, safety = updates
    close(patches(method, utility, safety), patches(method, regauged(utility), regauged(safety)))


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_modules_changes_nothing(method, updates):
    utility, safety = updates
    fisher = matching_fishers(method, utility, safety)
    turned = dict(reversed(utility.items())), dict(reversed(safety.items()))
    close(method.patch(utility, safety, fisher).pairs, method.patch(*turned, fisher).pairs)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_order_of_experts_changes_nothing(combination, updates):
    experts = [expert(combination, "a", 0.7, updates[0]), expert(combination, "b", 1.2, updates[1])]
    close(combination.combine(experts).deltas, combination.combine(experts[::-1]).deltas)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_scaled_experts_give_a_scaled_result(combination, updates):
    one = [expert(combination, "a", 0.7, updates[0]), expert(combination, "b", 1.2, updates[1])]
    two = [Expert(e.key, e.weight, combined([e.deltas], [4.0]), e.fisher) for e in one]
    close(combined([combination.combine(one).deltas], [4.0]), combination.combine(two).deltas)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_modules_of_one_expert_only_are_kept(combination, updates):
    name = next(iter(updates[0]))
    fewer = {key: pair for key, pair in updates[1].items() if key != name}
    shapes = {key: pair.shape for key, pair in updates[0].items()}
    given = [expert(combination, "a", 1.0, updates[0]), expert(combination, "b", 1.0, fewer, shapes)]
    merged = combination.combine(given).deltas
    assert set(merged) == set(updates[0])
    assert merged[name].dense().norm() > 0


IDENTITIES = [
    TaskArithmetic(),
    Concatenate(),
    Linear(),
    Ties(density=1.0),
    Ties(density=1.0, convention="mergekit", trim="global"),
    Dare(density=1.0),
    MagnitudePrune(density=1.0),
    Breadcrumbs(density=1.0, gamma=0.0),
    TsvM(),
    Knots(TaskArithmetic()),
    CoreSpace(TaskArithmetic()),
    CompressThenMerge(rank=3, inner=TaskArithmetic()),
]


@pytest.mark.parametrize("combination", IDENTITIES, ids=lambda c: c.name)
def test_one_expert_of_weight_one_is_itself(combination, updates):
    close(combination.combine([Expert("a", 1.0, updates[0])]).deltas, updates[0])


def run(adapters, base, output, **options):
    fisher_folder = write_fishers(output.parent / "fisher", adapters, base, method=options["method"])
    paths = {"utility": str(adapters["utility"]), "safety": str(adapters["safety"]), "output": str(output)}
    options["method"] = anchored(options["method"], fisher_folder)
    merge(**paths | {"fisher": str(fisher_folder)} | options)
    return read_adapter(output).pairs


@pytest.mark.parametrize("method", METHODS)
def test_strength_zero_is_the_utility_adapter_exactly(method, adapters, base, tmp_path):
    found = run(adapters, base, tmp_path / "m", method=method, alpha=0.0)
    for name, pair in read_adapter(adapters["utility"]).pairs.items():
        assert torch.equal(found[name].dense(), pair.dense())


@pytest.mark.filterwarnings("ignore:.*energy is kept.*")
@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_what_peft_loads(method, adapters, base, tmp_path):
    # Rank 16 is full rank in every layer of the tiny model, so nothing is lost.
    run(adapters, base, tmp_path / "m", method=method, alpha=0.8, rank=16)
    read = [read_adapter(adapters[name]) for name in ("utility", "safety")]
    utility, safety = (KeyedDeltas(adapter.pairs, adapter.identity) for adapter in read)
    patch = method.patch(utility, safety, matching_fishers(method, utility, safety)).pairs
    expected = make_model()
    for name, delta in combined([utility, patch], [1.0, 0.8]).items():
        expected.get_submodule(name).weight += delta.dense()
    ids = torch.arange(12)[None]
    logits = expected(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path / "m")).double()
    torch.testing.assert_close(loaded(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.merge_and_unload()(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)


@contextmanager
def threads(count):
    """As a process that was started with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count, user_api="blas"):
            assert set(blas_threads()) == {count}
            yield
            assert torch.get_num_threads() == count
            assert set(blas_threads()) == {count}
    finally:
        torch.set_num_threads(before)


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def written_by_one_and_two(tmp_path, write):
    """Check that a function writes adapters of the same names and bytes into a folder with one and with two threads."""
    for count in (1, 2):
        with threads(count):
            write(tmp_path / str(count))
    one, two = (
        {str(file.parent.relative_to(tmp_path / count)): read_adapter(file.parent).sha256 for file in files}
        for count in ("1", "2")
        for files in [(tmp_path / count).rglob("adapter_config.json")]
    )
    assert one == two
    return set(one)


def large_adapters(folder, modules, rows, columns, names=("utility", "safety"), rank=8):
    """Large enough that a threaded product would be split."""
    draw = torch.Generator().manual_seed(0)
    for name in names:
        pairs = {
            f"model.layers.{i}.x": LowRankPair(
                torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw)
            )
            for i in range(modules)
        }
        write_adapter(folder / name, pairs, base="t", manifest={}, seen=frozenset(), card="c")
    return {name: folder / name for name in names}


def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path):
    experts = [str(folder) for folder in large_adapters(tmp_path, 3, 900, 600, "ab").values()]

    def write(output):
        for combine in (Ties(), Dare(), Knots(), TsvM(), IsoC(), CoreSpace()):
            merge(utility=experts, combine=combine, rank=8, output=str(output / combine.name), warn_below=0.0)

    names = {"Ties", "Dare", "Knots", "TsvM", "IsoC", "CoreSpace"}
    assert written_by_one_and_two(tmp_path / "out", write) == names


def test_the_bytes_of_no_method_depend_on_the_number_of_threads(tmp_path):
    # Large enough that a threaded product would be split.
    model = make_model(hidden_size=160, intermediate_size=320, num_attention_heads=4, head_dim=40, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base")
    for name, seed in (("utility", 1), ("safety", 2)):
        pairs = {n: pair for n, pair in random_pairs(model, 4, seed).items() if n.endswith(("q_proj", "down_proj"))}
        write_adapter(tmp_path / name, pairs, base=str(tmp_path / "base"), manifest={}, seen=frozenset(), card="c")
    adapters = {name: tmp_path / name for name in ("utility", "safety")}
    methods = concrete(MergeMethod)
    for cls in methods:
        write_fishers(tmp_path / "fisher" / cls.__name__, adapters, tmp_path / "base", method=cls(), model=model)
    given = {name: str(folder) for name, folder in adapters.items()} | {"base": str(tmp_path / "base")}

    def write(output):
        for cls in methods:
            fisher, folder = tmp_path / "fisher" / cls.__name__, str(output / cls.__name__)
            method = anchored(cls(), fisher)
            merge(**given, method=method, fisher=str(fisher), rank=5, warn_below=0.0, output=folder)

    assert written_by_one_and_two(tmp_path / "out", write) == {cls.__name__ for cls in methods}


def test_the_bytes_of_sst_do_not_depend_on_the_number_of_threads(tmp_path):
    adapters = large_adapters(tmp_path, 2, 200, 160, rank=20)
    fisher = write_fishers(tmp_path / "fisher", adapters, "t", n_s=60, n_u=80)
    given = {name: str(folder) for name, folder in adapters.items()} | {"fisher": str(fisher)}

    def write(output):
        merge(**given, method=Sst(), alpha=[0.5, 1.0], output=str(output / "soft"))
        energy = Sst(filter="energy", share=0.5, rho_s=0.0)
        merge(**given, method=energy, rank=3, warn_below=0.0, output=str(output / "energy"))

    assert written_by_one_and_two(tmp_path / "out", write) == {"soft/alpha-0.5", "soft/alpha-1", "energy"}


def test_the_bytes_of_scipys_decompositions_do_not_depend_on_the_number_of_blas_threads(tmp_path):
    # Large enough that OpenBLAS splits an eigendecomposition.
    adapters = large_adapters(tmp_path, 1, 901, 901)
    fisher = write_fishers(tmp_path / "fisher", adapters, "t", method=FisherAverage())
    given = {name: str(folder) for name, folder in adapters.items()} | {"fisher": str(fisher)}

    def write(output):
        with one_thread_each():
            assert set(blas_threads()) == {1}
        merge(**given, method=FisherAverage(), rank=4, warn_below=0.0, output=str(output / "average"))

    assert written_by_one_and_two(tmp_path / "out", write) == {"average"}


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    scalings=st.lists(st.floats(-8, 8).filter(lambda x: abs(x) > 1e-3), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_sums_are_exact_for_any_ranks_shapes_and_scalings(shape, ranks, scalings, seed):
    draw = torch.Generator().manual_seed(seed)
    experts, expected = [], torch.zeros(shape, dtype=torch.float64)
    for i, rank in enumerate(ranks):
        a = torch.randn(rank, shape[1], generator=draw, dtype=torch.float64)
        b = torch.randn(shape[0], rank, generator=draw, dtype=torch.float64)
        experts.append(Expert(str(i), scalings[i], {"m": LowRankPair(a, b)}))
        expected += scalings[i] * b @ a
    for combination in (TaskArithmetic(), CoreSpace(TaskArithmetic()), Knots(TaskArithmetic())):
        merged = combination.combine(experts).deltas["m"]
        torch.testing.assert_close(merged.dense(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    scales=st.tuples(st.floats(0.01, 50), st.floats(0.01, 50)),
    seed=st.integers(0, 2**16),
)
def test_patches_of_any_ranks_shapes_and_scalings(method, shapes, ranks, scales, seed):
    """Finite, of the updates' shapes, and the same for other factors and another order of modules."""
    if isinstance(method, AlignGuardPosthoc):
        method = AlignGuardPosthoc(k=1)
    draw = torch.Generator().manual_seed(seed)
    utility, safety = (
        {
            f"m{i}": LowRankPair(
                torch.randn(rank, columns, generator=draw, dtype=torch.float64),
                torch.randn(rows, rank, generator=draw, dtype=torch.float64) * scale,
            )
            for i, (rows, columns) in enumerate(shapes)
        }
        for rank, scale in zip(ranks, scales, strict=True)
    )
    fisher = matching_fishers(method, utility, safety)
    found = method.patch(utility, safety, fisher).pairs
    # Some change only the modules that they select.
    assert set(found) <= set(safety)
    for name, delta in found.items():
        assert delta.shape == safety[name].shape
        assert torch.isfinite(delta.dense()).all()
    other = [regauged(dict(reversed(update.items()))) for update in (utility, safety)]
    turned = method.patch(*other, fisher).pairs
    assert set(turned) == set(found)
    for name, delta in found.items():
        size = max(utility[name].dense().norm(), safety[name].dense().norm()).item()
        torch.testing.assert_close(turned[name].dense(), delta.dense(), rtol=1e-5, atol=1e-7 * size)
