"""Who writes the answers: the target in this process, or one that is served elsewhere.

Both take a list of `Ask` and yield (number of the ask, its `Answer`) as soon as one is done. Know
models and HTTP; know nothing of records.
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
        order = sorted(
            range(len(asks)), key=lambda n: -len(asks[n].ids)
        )  # what runs alone at the end is short
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
        text = ids[:-1] if ids[-1] in self.ends else ids
        return Answer(
            ask.opened + decode_after(self.model.tokenizer, ask.ids, text, cut), ids, len(ids), cut
        )


def decode_after(tokenizer: Any, prompt: list[int], ids: list[int], cut: bool) -> str:
    """The text of `ids` where `prompt` stands before them, special tokens included. Of a `cut` text
    a half character at the end is left out."""
    before, both = (
        tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for part in (prompt[-TAIL:], [*prompt[-TAIL:], *ids])
    )
    alone = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = both[len(before) :] if both.startswith(before) else alone
    return text.rstrip("\ufffd") if cut else text


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
        self.url, self.model, self.sampling, self.key = url.rstrip("/"), model, sampling, key
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.extra, self.pause = extra or {}, pause
        self.block = 4 * concurrency
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
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": temperature,
            "seed": seed % 2**31,
        }
        if 0 < self.sampling.top_p < 1:
            body["top_p"] = self.sampling.top_p
        if self.sampling.top_k:
            body["top_k"] = self.sampling.top_k
        chat = ask.messages is not None
        body |= {"messages": ask.messages} if chat else {"prompt": ask.ids}
        try:
            reply = self._post("chat/completions" if chat else "completions", body | self.extra)
            choice = reply["choices"][0]
            text = _chat_text(choice["message"]) if chat else choice["text"]
            if not isinstance(text, str):
                raise KeyError("text")
        except RequestError as error:
            return Answer(error=str(error))
        except (KeyError, IndexError, TypeError, AttributeError):
            return Answer(error=f"{self.url} replied without an answer: {json.dumps(reply)[:200]}")
        if choice.get("finish_reason") not in ("stop", "length"):
            return Answer(error=f"{self.url} ended the answer by {choice.get('finish_reason')!r}")
        tokens = (reply.get("usage") or {}).get("completion_tokens") or 0
        return Answer(text, None, tokens, choice["finish_reason"] == "length")

    def _post(self, path: str, body: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(f"{self.url}/{path}", data, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
                reason = f"{self.url}/{path} replied {error.code} {error.reason}: {said}"
                if error.code in OURS:
                    raise EagleError(
                        f"{reason}; check --endpoint (it ends in /v1 as a rule), --endpoint_model and "
                        "--api_key_env"
                    ) from error
                if error.code not in BUSY:
                    raise RequestError(reason) from error
                wait, fatal = _retry_after(error.headers.get("Retry-After")), False
            except ValueError as error:  # JSON
                reason, wait, fatal = f"{self.url} replied no JSON ({error})", None, False
            except TimeoutError:
                reason, wait, fatal = (
                    f"{self.url} did not answer in {self.timeout:g} s",
                    None,
                    False,
                )
            except (OSError, http.client.HTTPException) as error:
                slow = isinstance(getattr(error, "reason", None), TimeoutError)
                cause = getattr(error, "reason", None) or str(error) or type(error).__name__
                reason, wait, fatal = f"{self.url} cannot be reached ({cause})", None, not slow
            if attempt < self.retries and self._stop.wait(self._pause(attempt, wait)):
                break
        if fatal:
            raise EagleError(
                f"{reason}, {self.retries + 1} times; start the server or correct --endpoint, and run the same "
                "command again: what was written stays"
            )
        raise RequestError(f"{reason}, {self.retries + 1} times")

    def _pause(self, attempt: int, asked: float | None) -> float:
        """Seconds: what the server asks for, else doubling with a random part so that not all come
        at once.
        """
        if asked is not None:
            return min(asked, LONGEST_PAUSE)
        return min(self.pause * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)


class RequestError(Exception):
    """The server does not serve this one request."""


def _chat_text(message: dict) -> str:
    """The answer; reasoning that a server keeps apart goes back before it, as the model wrote
    it.
    """
    text = message["content"]
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{text or ''}" if reasoning else text


def _retry_after(value: str | None) -> float | None:
    try:
        return max(float(value), 0.0) if value else None
    except ValueError:  # a date: wait as for a server that says nothing
        return None
