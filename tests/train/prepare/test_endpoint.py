"""Answers from a server: a small one that speaks the protocol, and all that it may do wrong."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from data_helpers import chat, read_jsonl, write_jsonl

from configs.fim_tokens import find_fim_tokens
from configs.schema import DataConfig
from eagle.errors import EagleError
from records.card import card_path, who_answered
from train.prepare import regenerate as work
from train.prepare.answering import Endpoint, Sampling


class Server:
    """`reply(path, body)` gives (status, body, headers); what was asked is kept in `seen`."""

    def __init__(self, reply):
        server = self
        self.reply, self.seen, self.headers = reply, [], []
        self.now, self.most = set(), 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append((self.path, body))
                server.headers.append(dict(self.headers))
                server.now.add(self)
                server.most = max(server.most, len(server.now))
                status, content, headers = server.reply(self.path, body)
                server.now.remove(self)
                if status is None:  # hang up
                    self.connection.close()
                    return
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(data), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # a client that waits no longer
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = []

    def start(reply):
        running.append(Server(reply))
        return running[-1]

    yield start
    for server in running:
        server.http.shutdown()
        server.http.server_close()


def answer(path, body, text=None, finish="stop"):
    """What a server of the protocol says; its text depends on the prompt alone."""
    if path.endswith("/chat/completions"):
        said = text if text is not None else f"re: {body['messages'][-1]['content']}"
        choice = {"message": {"role": "assistant", "content": said}}
    else:
        choice = {"text": f"middle of {len(body['prompt'])}"}
    choices = [choice | {"finish_reason": finish}]
    return 200, {"choices": choices, "usage": {"completion_tokens": 3}}, {}


def write(url, cfg, output, base=None, temperatures=(0.0,), retries=6, **options):
    sampling = Sampling(temperatures, max_new_tokens=20)
    options = {"concurrency": 3, "timeout": 5.0, **options}
    engine = Endpoint(url, "served", sampling, base=base, **options)
    engine.pause, engine.retries = 0.01, retries
    return work.regenerate(cfg, work.find_files(cfg), output, engine, quiet=True)


def said(path):
    """Of each chat in a file, what the last turn says."""
    return [row["messages"][-1]["content"] for row in read_jsonl(path)]


def settings(data_format, path, **more):
    return DataConfig(format=data_format, path=str(path), max_bad_fraction=1, **more)


def test_chats_are_answered_turn_by_turn(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVED_KEY", "secret")
    server = serve(answer)
    chats = [chat("one", "OLD", "two", "OLD"), chat("three", "OLD")]
    path = write_jsonl(tmp_path / "chat.jsonl", chats)
    more = dict(temperatures=(0.0, 0.8), api_key_env="SERVED_KEY", body={"top_k": 20})
    card = write(server.url, settings("chat", path), tmp_path / "new.jsonl", **more)
    first, second = read_jsonl(tmp_path / "new.jsonl")
    assert [m["content"] for m in first["messages"]] == ["one", "re: one", "two", "re: two"]
    assert [m["content"] for m in second["messages"]] == ["three", "re: three"]
    asked = {body["messages"][-1]["content"]: body for _, body in server.seen}
    assert [m["content"] for m in asked["two"]["messages"]] == ["one", "re: one", "two"]
    assert asked["two"]["temperature"] == 0.0 and asked["three"]["temperature"] == 0.8
    given = {"model": "served", "max_tokens": 20, "top_k": 20}
    assert given.items() <= asked["two"].items()
    assert asked["one"]["seed"] != asked["two"]["seed"]
    assert all(path == "/v1/chat/completions" for path, _ in server.seen)
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers)
    assert card["target"] == {"id": "served", "fingerprint": None, "adapter": None, "dtype": None}
    assert card["counts"]["tokens"] == 9
    assert "secret" not in card_path(tmp_path / "new.jsonl").read_text()
    writer = who_answered([tmp_path / "new.jsonl"], None, "f" * 64, None)
    assert writer == "written by served at an endpoint"


def test_middles_are_asked_for_in_tokens(serve, tmp_path, tokenizer_dir, tokenizer):
    server = serve(answer)
    record = {"prefix": "def ", "middle": "OLD", "suffix": "\n"}
    path = write_jsonl(tmp_path / "fim.jsonl", [record])
    write(server.url, settings("fim", path), tmp_path / "new.jsonl", str(tokenizer_dir))
    ((asked, body),) = server.seen
    fim = find_fim_tokens(tokenizer)
    assert asked == "/v1/completions"
    assert (body["prompt"][0], body["prompt"][-1]) == (fim.prefix, fim.middle)
    assert read_jsonl(tmp_path / "new.jsonl")[0]["middle"] == f"middle of {len(body['prompt'])}"
    with pytest.raises(EagleError, match="fim prompts need the target's tokenizer: give --base"):
        write(server.url, settings("fim", path), tmp_path / "other.jsonl")


def test_requests_run_together_and_come_out_in_order(serve, tmp_path):
    def slowly(path, body):
        time.sleep(0.02 if "0" in body["messages"][-1]["content"] else 0.002)
        return answer(path, body)

    server = serve(slowly)
    path = write_jsonl(tmp_path / "chat.jsonl", [chat(f"question {n}", "x") for n in range(40)])
    card = write(server.url, settings("chat", path), tmp_path / "new.jsonl", concurrency=4)
    assert said(tmp_path / "new.jsonl") == [f"re: question {n}" for n in range(40)]
    assert 2 <= server.most <= 4 and card["counts"]["written"] == 40


def test_busy_and_broken_servers_are_asked_again(serve, tmp_path):
    troubles = [
        (429, {"error": "slow down"}, {"Retry-After": 0}),
        (503, b"", {}),
        (200, b"<html>", {}),
        (None, None, {}),
        (500, {"error": "oops"}, {}),
        (429, {}, {"Retry-After": "soon"}),
    ]
    asked = []

    def shaky(path, body):
        asked.append(time.monotonic())
        return troubles[len(asked) - 1] if len(asked) <= len(troubles) else answer(path, body)

    server = serve(shaky)
    path = write_jsonl(tmp_path / "chat.jsonl", [chat("one", "OLD")])
    card = write(server.url, settings("chat", path), tmp_path / "new.jsonl")
    assert len(asked) == 7 and card["counts"]["failed"] == 0
    assert said(tmp_path / "new.jsonl") == ["re: one"]


def test_a_request_that_is_refused_is_set_aside(serve, tmp_path):
    error = {"error": {"message": "maximum context length is 4096"}}
    null, none = {"choices": [{"message": {"content": None}}]}, {"choices": []}
    replies = {  # to a question of this text, and what is kept of it
        "long": (lambda *_: (400, error, {}), "400 Bad Request: .*maximum context length"),
        "empty": (lambda *asked: answer(*asked, text="  "), "the answer is empty"),
        "odd": (lambda *_: (200, none, {}), "replied without an answer"),
        "null": (lambda *_: (200, null, {}), "replied without an answer"),
        "down": (lambda *_: (503, b"", {}), "503 Service Unavailable: , 2 times"),
        "slow": (lambda *_: time.sleep(1.0) or (503, b"", {}), "not answer in 0.3 s, 2 times"),
        "filtered": (
            lambda *asked: answer(*asked, finish="content_filter"),
            "ended the answer by 'content_filter'",
        ),
    }

    def reply(path, body):
        return replies.get(body["messages"][-1]["content"], [answer])[0](path, body)

    path = write_jsonl(tmp_path / "chat.jsonl", [chat(name, "OLD") for name in ("fine", *replies)])
    cfg, output = settings("chat", path), tmp_path / "new.jsonl"
    card = write(serve(reply).url, cfg, output, retries=1, timeout=0.3)
    assert card["counts"]["written"] == 1 and card["counts"]["failed"] == len(replies)
    messages = {r["line"]: r["message"] for r in read_jsonl(tmp_path / "new.quarantine.jsonl")}
    for line, (_, pattern) in enumerate(replies.values(), 2):
        assert re.search(pattern, messages[line]), (pattern, messages[line])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_us_ends_the_run(serve, tmp_path, status):
    server = serve(lambda path, body: (status, {"error": "no"}, {}))
    path = write_jsonl(tmp_path / "chat.jsonl", [chat("one", "OLD")] * 3)
    with pytest.raises(EagleError, match=f"replied {status} .*check --endpoint .*--api_key_env"):
        write(server.url, settings("chat", path), tmp_path / "new.jsonl", concurrency=1)


def test_a_server_that_goes_away_loses_nothing(serve, tmp_path):
    """The run stops with what to do; started again with another server it goes on, each once."""
    path = write_jsonl(tmp_path / "chat.jsonl", [chat(f"question {n}", "OLD") for n in range(30)])
    asked = []

    def dying(path, body):
        asked.append(body["messages"][-1]["content"])
        return answer(path, body) if len(asked) <= 15 else (None, None, {})

    first, output, cfg = serve(dying), tmp_path / "new.jsonl", settings("chat", path)
    lost = "cannot be reached .*, 2 times; start the server .*same command"
    with pytest.raises(EagleError, match=lost):
        write(first.url, cfg, output, retries=1, concurrency=2)
    assert not output.exists()
    _, *kept = read_jsonl(tmp_path / "new.journal")  # the first line says what they belong to
    assert 13 <= len(kept) <= 15
    second = serve(answer)
    write(second.url, cfg, output, concurrency=2)
    assert said(output) == [f"re: question {n}" for n in range(30)]
    assert len(second.seen) == 30 - len(kept)


def test_reasoning_kept_apart_goes_back_into_the_text(serve, tmp_path):
    def reply(path, body):
        message = {"content": "four", "reasoning_content": "two and two"}
        return 200, {"choices": [{"message": message, "finish_reason": "stop"}]}, {}

    path = write_jsonl(tmp_path / "chat.jsonl", [chat("2 + 2?", "OLD")])
    write(serve(reply).url, settings("chat", path), tmp_path / "new.jsonl")
    assert said(tmp_path / "new.jsonl") == ["<think>\ntwo and two\n</think>\n\nfour"]
