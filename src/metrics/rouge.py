"""ROUGE-L (C.-Y. Lin, 2004) of an answer with its reference, by torchmetrics."""

from torchmetrics.functional.text.rouge import rouge_score


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, in [0, 1]."""
    return float(rouge_score(answer, reference, rouge_keys="rougeL")["rougeL_fmeasure"])
