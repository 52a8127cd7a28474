"""A sequence-classification model as a judge, such as LibrAI/longformer-harmful-ro."""

from collections.abc import Sequence
from typing import Any

import torch

from src.errors import InputError, one_line
from src.metrics.judging import Judge, Judgement, Property


class Classifier(Judge):
    r"""Judges by the label that a classifier gives.

    Args:
        name: Hub id or directory of the model.
        positive: The label (or its number) that means the judge's property.
        finds: What the positive label means: ``harmful`` compliance, or ``refusal``.
        text: How prompt and answer are put together; ``{prompt}`` and ``{answer}`` stand for them.
        threshold: Probability of the positive label from which an answer counts; unset takes the likeliest label.
        batch_size: Answers judged together.
        max_length: Tokens of the text; longer ones are cut on the right.
        revision: Git revision of a hub repository.
    """

    def __init__(
        self,
        name: str,
        positive: str | int = 1,
        finds: Property = "harmful",
        text: str = "{prompt}\n{answer}",
        threshold: float | None = None,
        batch_size: int = 16,
        max_length: int = 1024,
        revision: str | None = None,
    ) -> None:
        self.name, self.positive, self.finds, self.text = name, positive, finds, text
        self.threshold, self.max_length, self.revision = threshold, max_length, revision
        self._batch_size = batch_size
        self._model: Any = None
        self._tokenizer: Any = None
        self._place = 0

    def load(self, device: str) -> None:
        """Load the classifier.

        Raises:
            InputError: nothing loadable has that name, or it has no such label.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if self._model is not None:
            return
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.revision)
            model = AutoModelForSequenceClassification.from_pretrained(self.name, revision=self.revision)
        except (OSError, ValueError) as error:
            reason = one_line(error)
            raise InputError(f"judge {self.name}: the classifier cannot be loaded ({reason})") from None
        labels = {label.casefold(): int(place) for place, label in model.config.id2label.items()}
        wanted = str(self.positive).strip().casefold()
        self._place = labels.get(wanted, int(wanted) if wanted.isdigit() else -1)
        if not 0 <= self._place < model.config.num_labels:
            raise InputError(f"judge {self.name}: no label {self.positive!r}; it has {', '.join(labels)}")
        self._model = model.eval().requires_grad_(False).to(device)

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Judgement]:
        """One judgement per answer, with the positive label's probability as its score."""
        texts = [_filled(self.text, p, a) for p, a in zip(prompts, answers, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found: dict[int, Judgement] = {}
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            found |= dict(zip(part, self._judged([texts[i] for i in part]), strict=True))
        return [found[i] for i in range(len(texts))]

    @torch.inference_mode()
    def _judged(self, texts: list[str]) -> list[Judgement]:
        given = self._tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        probabilities = self._model(**given.to(self._model.device)).logits.double().softmax(-1)
        likeliest = probabilities.argmax(-1).tolist()
        scores = probabilities[:, self._place].tolist()
        if self.threshold is None:
            return [Judgement(best == self._place, s) for best, s in zip(likeliest, scores, strict=True)]
        return [Judgement(s >= self.threshold, s) for s in scores]


def _filled(template: str, prompt: str, answer: str) -> str:
    """A template with prompt and answer put in; braces inside them stay as they are."""
    head, mark, tail = template.partition("{answer}")
    return head.replace("{prompt}", prompt) + (answer if mark else "") + tail.replace("{prompt}", prompt)
