"""Who writes the answers: the target in this process, or one that is served elsewhere.

Both take a list of `Ask` and yield (number of the ask, its `Answer`) as soon as one is done.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from eagle.errors import EagleError
from train.prepare.records import Answer, Ask

BUSY = (408, 425, 429, 500, 502, 503, 504)  # try again
OURS = (401, 403, 404, 405)  # every request would fail
LONGEST_PAUSE = 60.0  # seconds
TAIL = 4  # prompt tokens that are decoded along, so that a first blank is not lost

Progress = Callable[[int], None]  # told the tokens that have come


@dataclass(frozen=True)
class Sampling:
    """temperatures take turns by request; 0 is greedy. top_p 0 or 1 and top_k 0 are off."""

    temperatures: tuple[float, ...] = (0.0,)
    top_p: float = 0.0
    top_k: int = 0
    max_new_tokens: int = 512


class Local:
    """The target in this process, over `slots` rows that are refilled as soon as one is done.

    draft: use the model's head. It changes no answer (in fp32), and pays with few slots only.
    """

    def __init__(
        self, model, ends: frozenset[int], sampling: Sampling, slots: int, draft: bool = False
    ) -> None:
        self.model, self.ends, self.sampling = model, ends, sampling
        self.slots, self.draft = slots, draft
        self.block = 8 * slots

    def answers(
        self, asks: list[Ask], seeds: list[int], temperatures: list[float], progress: Progress
    ) -> Iterator[tuple[int, Answer]]:
        # the longest prompts first: what runs alone at the end is short
        order = sorted(range(len(asks)), key=lambda n: -len(asks[n].ids))
        requests = [
            {"input_ids": asks[n].ids, "seed": seeds[n], "temperature": temperatures[n]}
            for n in order
        ]
        spans = self.model.stream(
            requests,
            slots=self.slots,
            max_new_tokens=self.sampling.max_new_tokens,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            eos_token_id=sorted(self.ends),
            draft=self.draft,
        )
        for span in spans:
            progress(len(span.tokens))
            if span.row.done:
                n = order[span.index]
                yield n, self._answer(asks[n], span.row)

    def _answer(self, ask: Ask, row) -> Answer:
        if row.error is not None:
            return Answer(error=str(row.error))
        cut, ids = row.finish_reason == "length", row.tokens
        text = decode_after(
            self.model.tokenizer, ask.ids, ids[:-1] if ids[-1] in self.ends else ids, cut
        )
        return Answer(ask.opened + text, ids, len(ids), cut)


def decode_after(tokenizer: Any, prompt: list[int], ids: list[int], cut: bool) -> str:
    """The text of `ids` where `prompt` stands before them, special tokens included. Of a `cut` text
    a half character at the end is left out."""
    before, both, alone = (
        tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for part in (prompt[-TAIL:], [*prompt[-TAIL:], *ids], ids)
    )
    text = both[len(before) :] if both.startswith(before) else alone
    return text.rstrip("\ufffd") if cut else text


class RequestError(Exception):
    """The server does not serve this one request. again: whether it may the next time, after `wait`
    seconds if it says so; lost: it was not reached."""

    def __init__(
        self, reason: str, again: bool = True, wait: float | None = None, lost: bool = False
    ) -> None:
        super().__init__(reason)
        self.again, self.wait, self.lost = again, wait, lost


class Endpoint:
    """An OpenAI-compatible server: `chat/completions` for messages, `completions` for token ids.

    Busy servers, timeouts and broken connections are tried again, with growing pauses or as
    `Retry-After` says. A server that cannot be reached or refuses us ends the run; a request that
    it refuses becomes an answer with an error.
    """

    def __init__(
        self,
        url: str,
        model: str,
        sampling: Sampling,
        *,
        key: str | None = None,
        concurrency: int = 8,
        timeout: float = 600.0,
        retries: int = 6,
        extra: dict | None = None,
        pause: float = 1.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise EagleError(f"--endpoint {url} is no URL: give for instance http://host:8000/v1")
        self.url, self.timeout, self.retries, self.pause = url.rstrip("/"), timeout, retries, pause
        self.concurrency, self.block = concurrency, 4 * concurrency
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.body: dict[str, Any] = {"model": model, "max_tokens": sampling.max_new_tokens}
        if 0 < sampling.top_p < 1:
            self.body["top_p"] = sampling.top_p
        if sampling.top_k:
            self.body["top_k"] = sampling.top_k
        self.body |= extra or {}
        self._stop = threading.Event()

    def answers(
        self, asks: list[Ask], seeds: list[int], temperatures: list[float], progress: Progress
    ) -> Iterator[tuple[int, Answer]]:
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            every = enumerate(zip(asks, seeds, temperatures, strict=True))
            numbers = {pool.submit(self._one, *one): n for n, one in every}
            for future in as_completed(numbers):
                answer = future.result()
                progress(answer.tokens)
                yield numbers[future], answer
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, ask: Ask, seed: int, temperature: float) -> Answer:
        chat = ask.messages is not None
        body = {"temperature": temperature, "seed": seed % 2**31, **self.body}
        body |= {"messages": ask.messages} if chat else {"prompt": ask.ids}
        try:
            reply = self._post("chat/completions" if chat else "completions", body)
        except RequestError as error:
            return Answer(error=str(error))
        try:
            choice = reply["choices"][0]
            text = _chat_text(choice["message"]) if chat else choice["text"]
            reason, usage = choice.get("finish_reason"), reply.get("usage") or {}
        except (KeyError, IndexError, TypeError, AttributeError):
            text = reason = None
        if not isinstance(text, str):
            return Answer(error=f"{self.url} replied without an answer: {json.dumps(reply)[:200]}")
        if reason not in ("stop", "length"):
            return Answer(error=f"{self.url} ended the answer by {reason!r}")
        return Answer(text, None, usage.get("completion_tokens") or 0, reason == "length")

    def _post(self, path: str, body: dict) -> Any:
        for attempt in range(self.retries + 1):
            try:
                return self._try(f"{self.url}/{path}", json.dumps(body).encode())
            except RequestError as error:
                if not error.again:
                    raise
                failure = error
            if attempt < self.retries and self._stop.wait(self._pause(attempt, failure.wait)):
                break
        reason = f"{failure}, {self.retries + 1} times"
        if failure.lost:
            raise EagleError(
                f"{reason}; start the server or correct --endpoint, and run the same command "
                "again: what was written stays"
            )
        raise RequestError(reason)

    def _try(self, url: str, data: bytes) -> Any:
        request = urllib.request.Request(url, data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
            reason = f"{url} replied {error.code} {error.reason}: {said}"
            if error.code in OURS:
                raise EagleError(
                    f"{reason}; check --endpoint (it ends in /v1 as a rule), --endpoint_model and "
                    "--api_key_env"
                ) from error
            wait = error.headers.get("Retry-After") or ""
            seconds = float(wait) if wait.isdigit() else None  # a date says nothing to us
            raise RequestError(reason, error.code in BUSY, seconds) from error
        except ValueError as error:  # JSON
            raise RequestError(f"{self.url} replied no JSON ({error})") from error
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or error
            if isinstance(cause, TimeoutError):
                said = f"{self.url} did not answer in {self.timeout:g} s"
                raise RequestError(said) from error
            said = str(cause) or type(cause).__name__
            raise RequestError(f"{self.url} cannot be reached ({said})", lost=True) from error

    def _pause(self, attempt: int, asked: float | None) -> float:
        """Seconds: what the server asks for, else doubling with a random part so that not all come
        at once.
        """
        if asked is not None:
            return min(asked, LONGEST_PAUSE)
        return min(self.pause * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def _chat_text(message: dict) -> str:
    """The answer; reasoning that a server keeps apart goes back before it, as the model wrote
    it.
    """
    text = message["content"]
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{text or ''}" if reasoning else text
