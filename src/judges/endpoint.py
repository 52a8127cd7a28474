"""An OpenAI-compatible HTTP endpoint as a judge, such as a local vLLM server."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from http.client import HTTPException, HTTPResponse
from typing import Any, Literal
from urllib.parse import urlsplit

from src.errors import InputError
from src.judges.templates import COMPLIANCE, Question, check_least
from src.metrics.judging import UNDECIDED, Judge, Judgement, Property, Unfinished, is_undecided

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP states that may pass."""
LONGEST_REPLY = 2**20
"""Bytes of a reply; a longer one is no verdict."""


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
        retries: Further tries after a failure or a reply that is neither yes nor no.
        wait: Seconds before the first further try; doubled each time.
        timeout: Seconds until a request counts as failed, however slowly its reply drips in.
        parallel: Requests under way at once.
        key_variable: Environment variable that holds the key.
        undecided: What a reply means that is neither yes nor no after all tries: ``stop`` makes it an error,
            ``negative`` counts the answer as without the property (``judge_undecided`` says how many).
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
        self._one("Say hello.", "Hello!", settle=False)

    def stands(self, verdict: Mapping[str, Any]) -> bool:
        """An answer that was counted although the endpoint would not decide is asked again where that is to stop."""
        return self.undecided == "negative" or not is_undecided(verdict.get("reply"))

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Judgement]:
        """One judgement per answer.

        Raises:
            Unfinished: the endpoint cannot be reached, or goes on replying with neither yes nor no.
        """
        with ThreadPoolExecutor(self._parallel) as pool:
            settle = self.undecided == "negative"
            asked = [pool.submit(self._one, p, a, settle=settle) for p, a in zip(prompts, answers, strict=True)]
            wait(asked, return_when=FIRST_EXCEPTION)
            for future in asked:
                future.cancel()
        ended = {i: future for i, future in enumerate(asked) if not future.cancelled()}
        problems = [problem for future in ended.values() if (problem := future.exception()) is not None]
        for problem in problems:
            if not isinstance(problem, InputError):
                raise problem
        if problems:
            known = {i: future.result() for i, future in ended.items() if future.exception() is None}
            raise Unfinished(str(problems[0]), known)
        return [future.result() for future in asked]

    def _one(self, prompt: str, answer: str, *, settle: bool) -> Judgement:
        """The judgement of one answer; ``settle`` takes a reply that stays neither yes nor no for an absence."""
        key, problem = self._key(), ""
        said: str | None = None
        for attempt in range(self._retries + 1):
            said = None
            if attempt:
                time.sleep(self._wait * 2 ** (attempt - 1))
            try:
                reply = self._reply(self._question.filled(prompt, answer), key)
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
        raise InputError(f"judge {self.url}: {problem}, after {attempt + 1} tries; verdicts so far are kept{hint}")

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
        with urllib.request.urlopen(request, timeout=self._timeout) as response:
            text: str = json.loads(_body(response, until))["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise TypeError("the reply has no text")
        text.encode()  # half of a surrogate pair (\ud800) is a ValueError here: it could not be kept
        return text


def _body(response: HTTPResponse, until: float) -> bytes:
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
