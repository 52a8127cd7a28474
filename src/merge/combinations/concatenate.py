"""Concatenation of factors: the sum of updates as one adapter of rank Σ r_i."""

from src.merge.combinations.task_arithmetic import TaskArithmetic


class Concatenate(TaskArithmetic):
    """Concatenate factors, ``[w_1 B_1 … w_n B_n] [A_1; …; A_n]``: PEFT's ``cat``, task arithmetic (2212.04089) by name.

    Exact, of rank Σ r_i. No paper of its own.
    """
