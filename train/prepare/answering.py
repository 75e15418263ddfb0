"""Who writes the answers: the target in this process, or one that is served elsewhere.

Both take a list of `Request` and yield (number of the request, its `Answer`) as soon as one is
done. who: "target" {id, fingerprint, adapter} and "engine" of the data card.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NamedTuple

from eagle.errors import EagleError
from records import load_tokenizer
from train.prepare.records import Answer, Ask

BUSY = (408, 425, 429, 500, 502, 503, 504)  # try again
OURS = (401, 403, 404, 405)  # every request would fail
LONGEST_PAUSE = 60.0  # seconds
AWAY = "start the server or correct --endpoint, and run the same command: what came is kept"
TAIL = 4  # prompt tokens that are decoded along, so that a first blank is not lost


class Request(NamedTuple):
    ask: Ask
    seed: int
    temperature: float


Progress = Callable[[int], None]  # told the tokens that have come
Answers = Iterator[tuple[int, Answer]]


@dataclass(frozen=True)
class Sampling:
    """temperatures take turns by record; 0 is greedy. top_p 0 or 1 and top_k 0 are off."""

    temperatures: tuple[float, ...] = (0.0,)
    top_p: float = 0.0
    top_k: int = 0
    max_new_tokens: int = 512
    seed: int = 0


class Local:
    """The target in this process, over `slots` rows that are refilled as soon as one is done.

    base None is the embedded model. It drafts if `head` is given, which changes no answer (in
    fp32), and pays with few slots only. loading: of `EaModel.from_pretrained`.
    """

    def __init__(
        self,
        sampling: Sampling,
        base: str | None = None,
        head: str | None = None,
        slots: int = 8,
        **loading: Any,
    ) -> None:
        from transformers.utils.logging import disable_progress_bar

        from eagle.model import EaModel

        disable_progress_bar()
        self.sampling, self.slots, self.draft = sampling, slots, head is not None
        self.model = EaModel.from_pretrained(base, head, **loading)
        self.tokenizer, self.eos = load_tokenizer(base), self.model.eos_token_ids
        self.who = {"target": self.model.target.identity, "engine": {"kind": "local"}}
        self.notes: dict = {}
        self.block = 8 * slots

    def answers(self, asked: list[Request], ends: frozenset[int], progress: Progress) -> Answers:
        # the longest prompts first: what runs alone at the end is short
        order = sorted(range(len(asked)), key=lambda n: -len(asked[n].ask.ids))
        requests = [
            {"input_ids": ask.ids, "seed": seed, "temperature": temperature}
            for ask, seed, temperature in (asked[n] for n in order)
        ]
        s = self.sampling
        common = {"max_new_tokens": s.max_new_tokens, "top_p": s.top_p, "top_k": s.top_k}
        common |= {"slots": self.slots, "draft": self.draft, "eos_token_id": sorted(ends)}
        for span in self.model.stream(requests, **common):
            progress(len(span.tokens))
            if span.row.done:
                n = order[span.index]
                yield n, self._answer(asked[n].ask, span.row, ends)

    def _answer(self, ask: Ask, row, ends: frozenset[int]) -> Answer:
        if row.error is not None:
            return Answer(error=str(row.error))
        cut, ids = row.finish_reason == "length", row.tokens
        said = ids[:-1] if ids[-1] in ends else ids
        text = decode_after(self.model.tokenizer, ask.ids, said, cut)
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


class Refused(Exception):
    """The server does not serve this one request."""


class Endpoint:
    """An OpenAI-compatible server: `chat/completions` for messages, `completions` for token ids.

    What may pass is tried again, with growing pauses or as `Retry-After` says. A server that cannot
    be reached or refuses us ends the run; a request that it refuses becomes an answer with an
    error. base: of the tokenizer; body: further fields of each request.
    """

    def __init__(
        self,
        url: str,
        model: str,
        sampling: Sampling,
        *,
        base: str | None = None,
        body: dict | None = None,
        api_key_env: str | None = None,
        concurrency: int = 8,
        timeout: float = 600.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise EagleError(f"--endpoint {url} is no URL: give for instance http://host:8000/v1")
        self.headers = {"Content-Type": "application/json"}
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise EagleError(f"--api_key_env {api_key_env}: this environment variable is unset")
            self.headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self.url, self.sampling, self.timeout = url.rstrip("/"), sampling, timeout
        self.retries, self.pause = 6, 1.0  # seconds, doubled each time
        self.concurrency, self.block = concurrency, 4 * concurrency
        self.tokenizer, self.eos = load_tokenizer(base) if base is not None else None, frozenset()
        self.body: dict[str, Any] = {"model": model, "max_tokens": sampling.max_new_tokens}
        if 0 < sampling.top_p < 1:
            self.body["top_p"] = sampling.top_p
        if sampling.top_k:
            self.body["top_k"] = sampling.top_k
        self.body |= body or {}
        target = {"id": model, "fingerprint": None, "adapter": None, "dtype": None}
        self.who = {"target": target, "engine": {"kind": "endpoint", "body": body or {}}}
        self.notes = {"url": url.rpartition("@")[2]}  # without a password
        self._stop = threading.Event()

    def answers(self, asked: list[Request], ends: frozenset[int], progress: Progress) -> Answers:
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            numbers = {pool.submit(self._one, request): n for n, request in enumerate(asked)}
            for future in as_completed(numbers):
                answer = future.result()
                progress(answer.tokens)
                yield numbers[future], answer
        except BaseException:
            self._stop.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, request: Request) -> Answer:
        chat = request.ask.messages is not None
        body = {"temperature": request.temperature, "seed": request.seed % 2**31, **self.body}
        body |= {"messages": request.ask.messages} if chat else {"prompt": request.ask.ids}
        body |= {"tools": request.ask.tools} if request.ask.tools else {}
        try:
            reply = self._post("chat/completions" if chat else "completions", body)
        except Refused as error:
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
        url, data = f"{self.url}/{path}", json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            pause = self.pause * 2**attempt * random.uniform(0.5, 1.0)  # not all at once
            away = False
            try:
                request = urllib.request.Request(url, data, self.headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
                failure = f"{url} replied {error.code} {error.reason}: {said}"
                if error.code in OURS:
                    remedy = "check --endpoint (as a rule .../v1), --endpoint_model, --api_key_env"
                    raise EagleError(f"{failure}; {remedy}") from error
                if error.code not in BUSY:
                    raise Refused(failure) from error
                asked = error.headers.get("Retry-After") or ""
                pause = float(asked) if asked.isdigit() else pause  # a date says nothing to us
            except ValueError as error:
                failure = f"{self.url} replied no JSON ({error})"
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", None) or error
                failure = f"{self.url} did not answer in {self.timeout:g} s"
                if not isinstance(cause, TimeoutError):
                    failure = f"{self.url} cannot be reached ({str(cause) or type(cause).__name__})"
                    away = True
            if attempt < self.retries and self._stop.wait(min(pause, LONGEST_PAUSE)):
                break
        failure = f"{failure}, {self.retries + 1} times"
        raise EagleError(f"{failure}; {AWAY}") if away else Refused(failure)


def _chat_text(message: dict) -> str:
    """Reasoning that a server keeps apart goes back before the answer, as the model wrote it."""
    text = message["content"]
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{text or ''}" if reasoning else text
