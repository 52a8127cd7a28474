"""An OpenAI-compatible HTTP endpoint as a judge, such as a local vLLM server."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from http.client import HTTPException, HTTPResponse
from threading import Event
from typing import Any, Literal
from urllib.parse import urlsplit

from src.errors import InputError
from src.judges.templates import COMPLIANCE, Question, check_least
from src.metrics.judging import UNDECIDED, Judge, Judgement, Property, Unfinished, is_undecided

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP states that may pass."""
LONGEST_REPLY = 2**20
"""Bytes of a reply; a longer one is no verdict."""
FILTERS = ("content_filter", "ResponsibleAIPolicyViolation")
"""Codes of an HTTP error by which OpenAI and Azure say that a content filter withholds the reply."""


class _Withheld(Exception):
    """A content filter or a refusal takes the place of a reply; the message is what was said instead."""


class Endpoint(Judge):
    """Judges by the reply of a chat model behind HTTP.

    The key, where one is needed, is read from an environment variable; it is never written anywhere.

    Args:
        url: Address up to ``/v1``, such as ``http://localhost:8000/v1``.
        model: Name of the model at the endpoint.
        template: The question; ``{prompt}`` and ``{answer}`` stand for what is judged.
        yes: Beginning of a reply that means the judge's property.
        no: Beginning of a reply that means its absence.
        finds: What yes means: ``harmful`` compliance, or ``refusal``.
        max_tokens: Longest reply, in tokens.
        retries: Further tries after a failure or a reply that is neither yes nor no; a reply that a content filter or
            a refusal withholds is not asked for again.
        wait: Seconds before the first further try; doubled each time.
        timeout: Seconds until a request counts as failed, however slowly its reply drips in.
        parallel: Requests under way at once.
        key_variable: Environment variable that holds the key.
        undecided: What a reply means that is neither yes nor no after all tries, or that a content filter or a
            refusal withholds: ``stop`` makes it an error, ``negative`` counts the answer as without the property
            (``judge_undecided`` says how many).
    """

    counting = frozenset({"undecided"})

    def __init__(
        self,
        url: str,
        model: str,
        template: str = COMPLIANCE,
        yes: str = "yes",
        no: str = "no",
        finds: Property = "harmful",
        max_tokens: int = 8,
        retries: int = 4,
        wait: float = 0.5,
        timeout: float = 60.0,
        parallel: int = 8,
        key_variable: str = "OPENAI_API_KEY",
        undecided: Literal["stop", "negative"] = "stop",
    ) -> None:
        if not _is_address(url):
            raise InputError(f"judge: url is {url!r}; expected an address such as http://localhost:8000/v1")
        self.url, self.model, self.template, self.yes, self.no = url.rstrip("/"), model, template, yes, no
        self.finds, self.max_tokens = finds, max_tokens
        self._question = Question(template, yes, no)
        self._retries, self._wait, self._timeout, self._parallel = retries, wait, timeout, parallel
        self._key_variable = key_variable
        self.undecided = undecided
        check_least("retries", retries, 0)
        check_least("wait", wait, 0)
        for name, value in (("parallel", parallel), ("max_tokens", max_tokens)):
            check_least(name, value, 1)
        if timeout <= 0:
            raise InputError(f"judge: timeout is {timeout}; expected more than 0 seconds")

    def check(self) -> None:
        """Ask about a harmless answer.

        Raises:
            InputError: the endpoint cannot be reached, or replies with neither yes nor no; or the key is none.
        """
        self._one("Say hello.", "Hello!", Event(), settle=False)

    def stands(self, verdict: Mapping[str, Any]) -> bool:
        """An answer that was counted although the endpoint would not decide is asked again where that is to stop."""
        return self.undecided == "negative" or not is_undecided(verdict.get("reply"))

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Judgement]:
        """One judgement per answer.

        An interrupt ends it at once, without a further request; Python itself exits only when the requests under way
        have ended or timed out.

        Raises:
            Unfinished: the endpoint cannot be reached, or goes on replying with neither yes nor no.
        """
        pool, stop, settle = ThreadPoolExecutor(self._parallel), Event(), self.undecided == "negative"
        try:
            asked = [pool.submit(self._one, p, a, stop, settle=settle) for p, a in zip(prompts, answers, strict=True)]
            wait(asked, return_when=FIRST_EXCEPTION)
            pool.shutdown(cancel_futures=True)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        ended = {i: future for i, future in enumerate(asked) if not future.cancelled()}
        problems = [problem for future in ended.values() if (problem := future.exception()) is not None]
        for problem in problems:
            if not isinstance(problem, InputError):
                raise problem
        if problems:
            known = {i: future.result() for i, future in ended.items() if future.exception() is None}
            raise Unfinished(str(problems[0]), known)
        return [future.result() for future in asked]

    def _one(self, prompt: str, answer: str, stop: Event, *, settle: bool) -> Judgement:
        """The judgement of one answer.

        Args:
            prompt: What was asked.
            answer: What is judged.
            stop: Once it is set there are no further tries.
            settle: Whether a reply that is and stays neither yes nor no is taken for an absence.

        Raises:
            InputError: there is none.
        """
        key, problem = self._key(), ""
        said: str | None = None
        for attempt in self._tries(stop):  # noqa: B007 - told below
            said = None
            try:
                reply = self._reply(self._question.filled(prompt, answer), key)
            except _Withheld as instead:
                said = str(instead)
                problem = f"gave no reply ({said}); expected {self.yes!r} or {self.no!r}"
                break
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}"
                if error.code not in RETRIED:
                    break
            except (OSError, HTTPException) as error:
                problem = f"not reachable ({getattr(error, 'reason', None) or error})"
            except (ValueError, KeyError, IndexError, TypeError, RecursionError):
                problem = "not the reply of a chat endpoint"
            else:
                verdict = self._question.read(reply)
                said = reply.strip()[:200]
                if verdict is not None:
                    return Judgement(verdict, None, said)
                problem = f"replied {reply.strip()[:60]!r}; expected {self.yes!r} or {self.no!r}"
        if settle and said is not None:
            return Judgement(False, None, f"{UNDECIDED}: {said}")
        unset = said is not None and self.undecided == "stop"
        hint = "; undecided: negative counts such answers as without the property" if unset else ""
        raise InputError(f"judge {self.url}: {problem}, after {attempt} tries; verdicts so far are kept{hint}")

    def _tries(self, stop: Event) -> Iterator[int]:
        """Numbers of the tries, from one; each further one comes after its wait, and none once ``stop`` is set."""
        yield 1
        for further in range(self._retries):
            if stop.wait(self._wait * 2**further):
                return
            yield further + 2

    def _key(self) -> str:
        """The key without the white space around it, such as the last new line of a file.

        Raises:
            InputError: it has characters that no HTTP header may hold.
        """
        key = os.environ.get(self._key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"judge {self.url}: the key in {self._key_variable} is not printable ASCII; set it anew")
        return key

    def _reply(self, question: str, key: str) -> str:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        until = time.monotonic() + self._timeout
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return _text(json.loads(_body(response, until))["choices"][0])
        except urllib.error.HTTPError as error:
            found, message = _explained(error, until)
            message = _line(message.replace(key, "***") if key else message)
            if error.code == 400 and _is_filtered(found):
                raise _Withheld(f"filtered: {message}") from None
            error.msg += f" ({message})" if message else ""
            raise


def _text(choice: Any) -> str:
    r"""The text of one choice of a chat endpoint; empty where it is null.

    Raises:
        _Withheld: it fell to a content filter, or the model refused in a field of its own.
        KeyError: it is missing.
        TypeError: it is no text.
        UnicodeEncodeError: it has half of a surrogate pair (\ud800), so that it could not be kept.
    """
    if not (isinstance(choice, dict) and isinstance(message := choice.get("message"), dict)):
        raise TypeError("the reply has no message")
    if choice.get("finish_reason") == "content_filter":
        raise _Withheld("filtered")
    if not message.get("content") and isinstance(refusal := message.get("refusal"), str) and (line := _line(refusal)):
        raise _Withheld(line)
    text = message["content"]
    if text is None and choice.get("finish_reason") == "length":
        raise ValueError("thoughts took all tokens")
    if not isinstance(text, str | None):
        raise TypeError("the reply has no text")
    (text or "").encode()
    return text or ""


def _explained(error: urllib.error.HTTPError, until: float) -> tuple[dict[str, Any], str]:
    """The ``error`` object in the body of an HTTP error, and its message; the body itself where it has none.

    Both are empty where the body does not come whole by a point of time, or is too long.
    """
    try:
        with error:
            body = _body(error, until).decode(errors="replace")
    except (OSError, HTTPException, ValueError):
        return {}, ""
    try:
        found = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}, body
    found = found if isinstance(found, dict) else {"message": found}
    return found, message if isinstance(message := found.get("message"), str) else body


def _is_filtered(error: Mapping[str, Any]) -> bool:
    """Whether the ``error`` object of an HTTP error names a content filter."""
    inner = error.get("innererror")
    return error.get("code") in FILTERS or (isinstance(inner, dict) and inner.get("code") in FILTERS)


def _line(text: str) -> str:
    """A text on one line of at most 200 printable characters."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())[:200]


def _body(response: HTTPResponse | urllib.error.HTTPError, until: float) -> bytes:
    """What an endpoint sends, up to a point of time (seconds of the monotonic clock).

    Raises:
        TimeoutError: it has not ended by then; the socket's own time-out is for one read only.
        ValueError: it is longer than :data:`LONGEST_REPLY`.
    """
    body = b""
    while part := response.read1(2**16):
        body += part
        if time.monotonic() > until:
            raise TimeoutError("timed out")
        if len(body) > LONGEST_REPLY:
            raise ValueError(f"a reply of more than {LONGEST_REPLY} bytes")
    return body


def _is_address(url: str) -> bool:
    """Whether a text is an http or https address with a host, and without white space."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
    return known and not any(map(str.isspace, url))
