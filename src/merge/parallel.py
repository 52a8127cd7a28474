"""Modules in parallel, each on one thread: the same bits whatever the number of threads.

A threaded matrix product or factorisation adds up in an order that depends on the number of threads. So inside a merge
every such call runs on one thread (torch's own, and those of the BLAS libraries that numpy and scipy bring along), and
the processors work on different modules instead.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

# A BLAS library that is loaded later would not be limited.
import scipy.linalg  # noqa: F401
import torch
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST_WORKERS = 8
"""A worker holds a module or two in memory."""


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Run every torch and scipy call of the block on one thread; yields the number of workers to use instead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            yield min(before, MOST_WORKERS)
    finally:
        torch.set_num_threads(before)


def in_order(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """``[function(item) for item in items]`` on several threads; an error or Ctrl-C stops what has not begun."""
    if workers <= 1 or len(items) <= 1:
        return [function(item) for item in items]
    pool = ThreadPoolExecutor(workers)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
