"""Rewards behind an endpoint, against a server of this process: batches, order, retries, errors, secrets."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import gzip
import io
import json
import logging
import math
import os
import pickle
import signal
import socket
import threading
import time
import traceback
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from treesearch.cli.main import main
from treesearch.rewards.base import RewardError
from treesearch.rewards.remote import endpoint
from treesearch.rewards.remote.http import HTTPReward
from treesearch.rewards.remote.judge import VLMJudge
from treesearch.rewards.remote.verdict import read_number

pytest.importorskip("httpx2")

SECRET = "sk-0123456789abcdef"
IMAGES = (torch.arange(7) * 30 / 255)[:, None, None, None].expand(7, 3, 4, 4)
PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg"]

Reply = tuple[int, dict[str, str], Any]


class Server:
    """Answers every POST with `reply(body, number of the request)` and remembers what it got."""

    def __init__(self) -> None:
        self.reply: Callable[[Any, int], Reply] = lambda body, _: (200, {}, {"scores": scores_of(body)})
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and body in one packet

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.headers.append({k.lower(): v for k, v in self.headers.items()})
                    server.paths.append(self.path)
                status, headers, answer = server.reply(body, number)
                if status == 0:  # hang up
                    self.close_connection = True
                    return
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(data))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has lost patience
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.http.server_port}"
        self.url = f"http://{self.host}/score"


def image_of(text: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))))


def scores_of(body: Any) -> list[float]:
    """Brightness and length of the prompt: it tells which image met which prompt."""
    prompts = body["prompts"] or [""] * len(body["images"])
    return [float(image_of(i).mean()) + 1000 * len(p) for i, p in zip(body["images"], prompts, strict=True)]


def expected_scores(images: Tensor = IMAGES, prompts: list[str] = PROMPTS) -> Tensor:
    bright = (images.double() * 255).round().mean((1, 2, 3))
    return bright + 1000 * torch.tensor([len(p) for p in prompts], dtype=torch.float64)


def failing(status: int, body: Any = "sorry", headers: dict[str, str] | None = None, times: float = math.inf):
    """A reply that fails the first `times` requests."""

    def reply(received: Any, number: int) -> Reply:
        return (status, headers or {}, body) if number < times else (200, {}, {"scores": scores_of(received)})

    return reply


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that were asked for; none is made."""
    asked: list[float] = []
    monkeypatch.setattr(endpoint, "pause", lambda stop, seconds: asked.append(seconds))
    return asked


def test_batches_keep_the_order_of_samples_and_prompts(server) -> None:
    def reply(body: Any, _: int) -> Reply:
        time.sleep(0.02 * (8 - len(body["prompts"][0])))  # the first batch answers last
        return 200, {}, {"scores": scores_of(body)}

    server.reply = reply
    values = HTTPReward(server.url, batch_size=2, concurrency=4)(IMAGES, PROMPTS)
    torch.testing.assert_close(values, expected_scores())
    assert sorted(len(b["images"]) for b in server.bodies) == [1, 2, 2, 2]
    assert {b["prompts"][0] for b in server.bodies} == {"a", "ccc", "eeeee", "ggggggg"}


def test_images_arrive_as_they_are(server) -> None:
    images = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    HTTPReward(server.url)(images)
    ((body,), sent) = server.bodies, (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert body["prompts"] is None
    for text, image in zip(body["images"], sent, strict=True):
        np.testing.assert_array_equal(image_of(text), image)


def test_pil_images_of_several_sizes(server) -> None:
    images = [
        Image.new("RGB", (4, 3), (10, 10, 10)),
        Image.new("L", (2, 2), 20),
        Image.new("RGB", (9, 9), (30, 30, 30)),
    ]
    assert HTTPReward(server.url, batch_size=2)(images, ["", "", "x"]).tolist() == [10, 20, 1030]
    assert image_of(server.bodies[0]["images"][0]).shape[:2] in {(3, 4), (9, 9)}


def test_other_formats_and_other_samples(server) -> None:
    server.reply = lambda body, _: (200, {}, [{"mark": len(s)} for s in body["texts"]])
    reward = HTTPReward(
        server.url,
        build=lambda samples, prompts: {"texts": list(samples)},
        parse=lambda answer: [entry["mark"] for entry in answer],
    )
    assert reward(["one", "three"]).tolist() == [3, 5]
    assert reward([]).shape == (0,)


def test_texts_are_sent_as_they_are(server) -> None:
    server.reply = lambda body, _: (200, {}, {"scores": [len(s) for s in body["texts"]]})
    assert HTTPReward(server.url)(["one", "three"], ["a", "b"]).tolist() == [3, 5]
    assert server.bodies[-1] == {"texts": ["one", "three"], "prompts": ["a", "b"]}
    said = {"choices": [{"message": {"content": "7"}, "finish_reason": "stop"}]}
    server.reply = lambda body, _: (200, {}, said)
    assert VLMJudge(f"http://{server.host}/v1", "m")(["a {prompt} text"], ["Write."]).tolist() == [7]
    rubric, sample = server.bodies[-1]["messages"][0]["content"]
    assert "You grade texts" in rubric["text"]
    assert "Prompt: Write." in rubric["text"]
    assert sample == {"type": "text", "text": "a {prompt} text"}


def test_requests_run_side_by_side_but_no_more_than_allowed(server) -> None:
    barrier, under_way, most = threading.Barrier(3), 0, 0

    def reply(body: Any, _: int) -> Reply:
        nonlocal under_way, most
        with server.lock:
            under_way += 1
            most = max(most, under_way)
        barrier.wait(timeout=120)  # breaks unless three are here at once
        time.sleep(0.02)
        with server.lock:
            under_way -= 1
        return 200, {}, {"scores": scores_of(body)}

    server.reply = reply
    HTTPReward(server.url, batch_size=1, concurrency=3, retries=0)(IMAGES[:6], PROMPTS[:6])
    assert most == 3


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_busy_scorer_is_asked_again(server, pauses, status: int) -> None:
    server.reply = failing(status, times=2)
    torch.testing.assert_close(HTTPReward(server.url)(IMAGES, PROMPTS), expected_scores())
    assert len(server.bodies) == 3
    assert len(pauses) == 2


def test_pauses_grow_with_jitter_up_to_a_limit(server, pauses) -> None:
    server.reply = failing(503)
    for _ in range(6):
        with pytest.raises(RewardError, match="gave no answer in 6 attempts"):
            HTTPReward(server.url, retries=5, backoff=1, max_pause=9)(IMAGES)
    rows = np.array(pauses).reshape(6, 5)
    for k, low in enumerate([0.5, 1, 2, 4, 8]):
        assert (low <= rows[:, k]).all()
        assert (rows[:, k] <= min(3 * low, 9)).all()
    assert all(np.ptp(rows[:, k]) > 0 for k in range(4))


def test_retry_after_is_respected(server, pauses) -> None:
    server.reply = failing(429, headers={"Retry-After": "7"}, times=1)
    torch.testing.assert_close(HTTPReward(server.url, backoff=0.01)(IMAGES, PROMPTS), expected_scores())
    assert pauses == [7]
    server.reply = failing(
        503,
        headers={"Retry-After": email.utils.formatdate(time.time() + 30, usegmt=True)},
        times=len(server.bodies) + 1,
    )
    HTTPReward(server.url, backoff=0.01)(IMAGES, PROMPTS)
    assert 25 < pauses[-1] <= 30
    server.reply = failing(503, headers={"Retry-After": "soon"}, times=len(server.bodies) + 1)
    HTTPReward(server.url, backoff=0.01)(IMAGES, PROMPTS)
    assert pauses[-1] < 0.1


def test_a_scorer_that_wants_too_long_a_pause_is_given_up(server, pauses) -> None:
    server.reply = failing(429, headers={"Retry-After": "3600"})
    with pytest.raises(RewardError, match=r"is busy: HTTP 429 'sorry'; .*3600 s, more than max_pause = 60"):
        HTTPReward(server.url)(IMAGES)
    assert (len(server.bodies), pauses) == (1, [])


def test_a_real_pause_is_made(server) -> None:
    server.reply = failing(503, times=1)
    start = time.perf_counter()
    HTTPReward(server.url, backoff=0.2)(IMAGES, PROMPTS)
    assert time.perf_counter() - start >= 0.1


def test_failures_without_end_name_host_attempts_and_the_last_error(server, pauses) -> None:
    server.reply = failing(500, "x" * 1000)
    with pytest.raises(RewardError) as caught:
        HTTPReward(server.url, retries=2)(IMAGES)
    message = str(caught.value)
    assert f"{server.host} gave no answer in 3 attempts, last error: HTTP 500 'xxx" in message
    assert "/score" not in message
    assert len(message) < 500
    assert len(server.bodies) == 3


def test_the_rows_of_the_failing_batch_are_named(server) -> None:
    server.reply = lambda body, _: (200, {}, {"scores": scores_of(body)[: 2 - ("ccc" in body["prompts"])]})
    with pytest.raises(RewardError, match="answered 1 scores for 2 samples") as caught:
        HTTPReward(server.url, batch_size=2)(IMAGES[:6], PROMPTS[:6])
    assert caught.value.rows == (2, 3)


def test_time_outs(server, pauses) -> None:
    done = threading.Event()

    def reply(body: Any, number: int) -> Reply:
        if number == 0:
            done.wait(5)
        return 200, {}, {"scores": scores_of(body)}

    server.reply = reply
    found = HTTPReward(server.url, timeout=0.2, retries=100)(IMAGES, PROMPTS)  # a busy machine is late more than once
    torch.testing.assert_close(found, expected_scores())
    done.set()
    assert pauses
    server.reply = lambda body, _: (time.sleep(0.3), (200, {}, {}))[1]
    with pytest.raises(RewardError, match=r"in 1 attempt, last error: no whole answer within timeout = 0.05 s"):
        HTTPReward(server.url, timeout=0.05, retries=0)(IMAGES)


def test_a_connection_that_breaks_is_made_again(server, pauses) -> None:
    server.reply = failing(0, times=1)
    torch.testing.assert_close(HTTPReward(server.url)(IMAGES, PROMPTS), expected_scores())
    assert len(pauses) == 1


def test_an_endpoint_that_is_down(pauses) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        RewardError, match=rf"127.0.0.1:{port} gave no answer in 3 attempts.*ConnectError.*endpoint up\?"
    ):
        HTTPReward(f"http://127.0.0.1:{port}/score", retries=2)(IMAGES)
    assert len(pauses) == 2


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (400, "HTTP 400 'sorry'$"),
        (401, "HTTP 401 'sorry': give token_env"),
        (403, "HTTP 403 'sorry': give token_env"),
        (404, "check the path of the url"),
        (413, "smaller batch_size"),
        (302, "HTTP 302 'sorry': check the path of the url"),
    ],
)
def test_refusals_are_not_repeated(server, pauses, status: int, advice: str) -> None:
    server.reply = failing(status, headers={"Location": f"http://{server.host}/other"})
    with pytest.raises(RewardError, match=f"{server.host} refused a request: .*{advice}"):
        HTTPReward(server.url)(IMAGES)
    assert (len(server.bodies), pauses) == (1, [])


def test_a_failure_wakes_and_stops_the_others(server) -> None:
    def reply(body: Any, _: int) -> Reply:
        if body["prompts"] == ["a"]:
            time.sleep(0.1)
            return 400, {}, "no"
        return 503, {}, "busy"

    server.reply = reply
    with pytest.raises(RewardError, match="HTTP 400 'no'") as caught:  # at once: pauses last an hour
        HTTPReward(server.url, batch_size=1, concurrency=2, backoff=3600, max_pause=7200)(IMAGES, PROMPTS)
    assert caught.value.rows == (0,)
    assert len(server.bodies) <= 4  # two at first, and the second attempt of the one that was woken


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"scores": [1.0]}, r"answered 1 scores for 2 samples, got '\{\"scores\": \[1.0\]\}'"),
        ({"scores": [1, 2, 3]}, "answered 3 scores for 2 samples"),
        ('{"scores": [1, NaN]}', "answered 'NaN' as score 1 of 2"),
        ('{"scores": [1, Infinity]}', "answered 'Infinity' as score 1 of 2"),
        ({"scores": [None, 1]}, "answered 'null' as score 0 of 2"),
        ({"scores": ["0.5", 1]}, "answered '0.5' as score 0 of 2"),
        ({"scores": [True, 1]}, "answered 'true' as score 0 of 2"),
        ('{"scores": [1' + "0" * 400 + ", 1]}", "answered '1000.* as score 0 of 2"),
        ("[" * 200_000, r"expected JSON, got '\[\[\["),
        ({"scores": 3}, r"answered no scores \(TypeError: .*check parse"),
        ({"error": "out of memory"}, r"answered no scores \(KeyError: .*scores.*\), got .*out of memory"),
        ([1, 2], r"answered no scores \(TypeError"),
        ("<html>welcome", "refused a request: expected JSON, got '<html>welcome'"),
        ("", "expected JSON, got ''"),
    ],
)
def test_bad_answers_say_what_came(server, answer: Any, message: str) -> None:
    server.reply = lambda *_: (200, {}, answer)
    with pytest.raises(RewardError, match=message):
        HTTPReward(server.url)(IMAGES[:2])
    assert len(server.bodies) == 1


def test_minus_infinity_forbids(server) -> None:
    server.reply = lambda *_: (200, {}, '{"scores": [-Infinity, 2]}')
    assert HTTPReward(server.url)(IMAGES[:2]).tolist() == [-math.inf, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"timeout": 0}, "timeout is 0, expected a positive number"),
        ({"concurrency": 0}, "concurrency is 0, expected a positive number"),
        ({"retries": -1}, "retries is -1, expected 0 or more"),
        ({"backoff": -0.5}, "backoff is -0.5, expected 0 or more"),
        ({"url": "localhost:8000/score"}, "expected a url such as http://localhost:8000/score"),
        ({"url": "ftp://localhost/score"}, "expected a url such as"),
        ({"url": "http://localhost:99999/"}, "expected a port of 0 to 65535 in the url, got one out of range"),
        ({"url": "http://me:hunter2@localhost:hunter3/"}, "got one that is no number"),
        ({"max_bytes": 0}, "max_bytes is 0, expected a positive number"),
        ({"url": None}, "got no url: give one, url or url_env"),
        ({"url_env": "NO_SUCH_VARIABLE"}, "got a url and url_env"),
        ({"url": None, "url_env": "NO_SUCH_VARIABLE"}, "set the environment variable NO_SUCH_VARIABLE"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HTTPReward(**{"url": "http://localhost/", **arguments})


def test_prompts_that_do_not_pair_up_are_refused() -> None:
    for reward in (HTTPReward("http://localhost/"), VLMJudge("http://localhost/", "m")):
        for prompts in (PROMPTS[:6], [*PROMPTS, "more"]):
            with pytest.raises(RewardError, match=f"got {len(prompts)} prompts for 7 samples: give one a sample"):
                reward(IMAGES, prompts)


PATH, QUERY = "T0PS3CR3TPATH", "q9-s3cr3t"


def test_keys_of_a_url_reach_no_error_name_or_setting(server, pauses, caplog, monkeypatch) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"http://{server.host}/hooks/{PATH}/score?key={QUERY}"
    reward = HTTPReward(url, retries=1, batch_size=4)
    shown = [repr(reward), reward.name, repr(reward.fn), str(reward.settings)]
    for status, answer in [(500, PATH), (404, f"no /hooks/{PATH}/score?key={QUERY}"), (200, QUERY), (200, {QUERY: 1})]:
        server.reply = lambda *_, s=status, a=answer: (s, {}, a)
        with pytest.raises(RewardError) as caught:
            reward(IMAGES, PROMPTS)
        shown.append(everything(caught.value))
    server.reply = lambda *_: (0, {}, "")
    with pytest.raises(RewardError) as caught:
        reward(IMAGES, PROMPTS)
    shown += [everything(caught.value), caplog.text]
    assert server.paths[0].endswith(f"/{PATH}/score?key={QUERY}")
    assert not [text for text in shown if PATH in text or QUERY in text]
    monkeypatch.setenv("SCORER_URL", url)
    assert HTTPReward(url_env="SCORER_URL", batch_size=4).settings == reward.settings
    judges = [VLMJudge(url, "m", options={"api_key": QUERY}), VLMJudge(model="m", url_env="SCORER_URL", options={})]
    assert judges[0].settings == VLMJudge(url, "m", options={"api_key": QUERY}).settings != judges[1].settings
    assert not [judge for judge in judges if PATH in str(judge.settings) or QUERY in str(judge.settings)]
    assert HTTPReward(url.replace(PATH, "other")).settings != HTTPReward(url).settings


def test_keys_of_a_url_reach_no_file_of_a_run_which_goes_on_with_the_key_given_again(
    server, tmp_path, capsys, monkeypatch
) -> None:
    url, store = f"http://{server.host}/hooks/{PATH}/score?key={QUERY}", str(tmp_path / "r")
    words = ["--kernel", "mnist(num_steps=2)", "--reward", f'0.5*http("{url}")', "--nfe", "8", "--batch-size", "4"]
    assert main(["run", "best-of-n", *words, "--store", store]) == 0
    plugin = tmp_path / "bed.py"
    plugin.write_text(
        "from treesearch.backends.models.mnist import mnist_kernel\ndef make(url): return mnist_kernel(num_steps=2)\n"
    )
    asked = ["--kernel", f"{plugin}:make('{url}')", "--reward", f'0.5*http("{url}")', "--also", f'http("{url}")']
    assert main(["compare", *asked, "--methods", "best_of_n", "--nfe", "8", "--store", str(tmp_path / "c")]) == 0
    assert main(["run", "best-of-n", "--reward", f'http("{url}", batchsize=4)']) == 2
    assert main(["resume", store, "--nfe", "16"]) == 1
    shown = capsys.readouterr()
    assert "without what may be secret: say it again with --reward" in shown.err
    texts = [shown.out, shown.err] + [p.read_bytes().decode("latin1") for p in tmp_path.rglob("*") if p.is_file()]
    assert not [text for text in texts if PATH in text or QUERY in text]
    monkeypatch.setenv("SCORER_URL", url)
    assert main(["resume", store, "--nfe", "16", "--reward", '0.5*http(url_env="SCORER_URL")']) == 0
    assert main(["resume", store, "--nfe", "24"]) == 0
    assert set(server.paths) == {f"/hooks/{PATH}/score?key={QUERY}"}


def raw(reply: bytes, then: Callable[[socket.socket], None] = lambda _: None) -> Iterator[str]:
    """The URL of a server that answers anything with `reply`, whatever it was sent, and goes on with `then`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    line, _ = listening.accept()
                    with line, contextlib.suppress(OSError):
                        line.recv(65536)
                        line.sendall(reply)
                        then(line)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/score"
        listening.shutdown(socket.SHUT_RDWR)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def endless(line: socket.socket) -> None:
    while True:
        line.sendall(b" " * 65536)


def drip(line: socket.socket) -> None:
    while True:
        line.sendall(b" ")
        time.sleep(0.01)


def drip_headers(line: socket.socket) -> None:
    for i in range(10**6):
        line.sendall(f"X-{i}: 1\r\n".encode())
        time.sleep(0.01)


@contextlib.contextmanager
def limited(megabytes: int) -> Iterator[None]:
    """Refuse more memory of Python's than this at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("way", ["gzip", "deflate", "plain", "status"])
def test_an_answer_has_a_limit_in_bytes(way: str) -> None:
    most, bomb = 100_000, b" " * 2**25
    body = gzip.compress(bomb) if way == "gzip" else zlib.compress(bomb)
    head = HEAD if way != "status" else HEAD.replace(b"200 OK", b"400 Bad")
    packed = way in ("gzip", "deflate")
    reply = head + (
        f"Content-Encoding: {way}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body if packed else b"\r\n"
    )
    for url in raw(reply, (lambda _: None) if packed else endless):
        reward = HTTPReward(url, max_bytes=most, retries=0, timeout=20)
        with limited(8), pytest.raises(RewardError, match=r"more than max_bytes = 100000 bytes|HTTP 400") as caught:
            reward(IMAGES[:1])
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("packed", ["gzip", "deflate", "x-gzip"])
def test_compressed_answers_within_the_limit_are_read(packed: str) -> None:
    body = zlib.compress(b'{"scores": [3]}') if packed == "deflate" else gzip.compress(b'{"scores": [3]}')
    reply = HEAD + f"Content-Encoding: {packed}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    for url in raw(reply):
        assert HTTPReward(url)(IMAGES[:1]).tolist() == [3]


@pytest.mark.parametrize(
    ("name", "what"), [("br", "'br', which was not asked for"), ("gzip", "a body that is no gzip")]
)
def test_other_encodings_are_refused(name: str, what: str) -> None:
    for url in raw(HEAD + f"Content-Encoding: {name}\r\nContent-Length: 2\r\n\r\n[]".encode()):
        with pytest.raises(RewardError, match=what):
            HTTPReward(url)(IMAGES[:1])


SLOW = {
    "body": (HEAD + b"Content-Length: 1000000\r\n\r\n", drip),
    "headers": (HEAD, drip_headers),
    "silence": (b"", drip),
}


@pytest.mark.parametrize("slow", SLOW)
def test_an_answer_that_drips_has_a_limit_in_seconds(slow: str) -> None:
    """Each byte comes long before the limit, and a whole answer would take hours."""
    reply, then = SLOW[slow]
    for url in raw(reply, then if slow != "silence" else lambda _: time.sleep(5)):
        with pytest.raises(RewardError, match=r"no whole answer within timeout = 0.2 s"):
            HTTPReward(url, timeout=0.2, retries=0)(IMAGES[:1])


def test_an_interrupt_waits_for_no_answer() -> None:
    """Neither the call nor the end of the process: an answer would take minutes."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("interrupts reach the main thread only")

    def interrupt(line: socket.socket) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        drip(line)

    for url in raw(SLOW["body"][0], interrupt):
        with pytest.raises(KeyboardInterrupt):
            HTTPReward(url, timeout=120, retries=0)(IMAGES[:1])
        assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


def everything(error: BaseException) -> str:
    """All that an error shows, with its causes and contexts."""
    texts = ["".join(traceback.format_exception(error, chain=True))]
    while error is not None:
        texts += [repr(error), str(error), repr(error.args)]
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return "\n".join(texts)


@pytest.mark.parametrize("make", ["http", "judge", "expected"])
def test_secrets_stay_secret(server, pauses, monkeypatch, caplog, capsys, make: str) -> None:
    """The endpoint repeats the credentials in every kind of answer; nothing of ours does."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SCORER_TOKEN", SECRET)
    settings: dict[str, Any] = {"token_env": "SCORER_TOKEN", "retries": 1}
    if make == "http":
        reward = HTTPReward(server.url, **settings)
    else:
        scale = {"expected": True, "high": 9} if make == "expected" else {}
        reward = VLMJudge(f"http://{server.host}/v1", "m", **scale, **settings)
    shown = [repr(reward), reward.name, repr(reward.fn), str(pickle.dumps(reward))]
    chat = {"choices": [{"message": {"content": f"your key is {SECRET}"}}]}
    answers = [(500, SECRET), (401, f"bad key {SECRET}"), (200, f"key {SECRET}"), (200, {"scores": [SECRET] * 7})]
    for status, answer in [
        *answers,
        (200, {"scores": SECRET}),
        (200, {SECRET: 1}),
        (200, chat),
        (200, {"choices": chat}),
    ]:
        server.reply = lambda *_, s=status, a=answer: (s, {}, a)
        with pytest.raises(RewardError) as caught:
            reward(IMAGES, PROMPTS)
        shown.append(everything(caught.value))
        shown.append(str(pickle.dumps(caught.value)))
    shown += [caplog.text, *map(str, (r.__dict__ for r in caplog.records)), *capsys.readouterr()]
    assert {h["authorization"] for h in server.headers} == {f"Bearer {SECRET}"}
    assert any("***" in text for text in shown)
    assert not [text for text in shown if SECRET in text]


@pytest.mark.parametrize("secret", [SECRET, 'a"quoted"\\key', "it's-a-key"])
def test_a_cut_or_a_quote_does_not_uncover_secrets(server, monkeypatch, secret: str) -> None:
    monkeypatch.setenv("SCORER_TOKEN", secret)
    reward = HTTPReward(server.url, token_env="SCORER_TOKEN", retries=0)
    for answer in ("x" * 295 + secret, {"x" * 290: secret}, {"scores": [secret]}, {"scores": [[secret]]}, {secret: 0}):
        for status in (200, 400):
            server.reply = lambda *_, s=status, a=answer: (s, {}, a)
            with pytest.raises(RewardError) as caught:
                reward(IMAGES[:1], PROMPTS[:1])
            assert secret[:4] not in str(caught.value)
            assert "***" in str(caught.value)


def test_credentials_are_read_when_a_request_is_sent(server, monkeypatch) -> None:
    reward = HTTPReward(server.url, token_env="SCORER_TOKEN", token_header="X-API-Key")
    monkeypatch.delenv("SCORER_TOKEN", raising=False)
    with pytest.raises(RewardError, match="needs credentials: set the environment variable SCORER_TOKEN"):
        reward(IMAGES, PROMPTS)
    assert not server.bodies
    monkeypatch.setenv("SCORER_TOKEN", f"{SECRET}\n")
    pickle.loads(pickle.dumps(reward))(IMAGES, PROMPTS)
    assert server.headers[0]["x-api-key"] == SECRET
    assert "authorization" not in server.headers[0]


@pytest.mark.parametrize("value", [f"{SECRET}\nX: y", f"{SECRET}é"])
def test_credentials_that_no_header_can_carry(server, monkeypatch, value: str) -> None:
    monkeypatch.setenv("SCORER_TOKEN", value)
    with pytest.raises(RewardError, match="the value of SCORER_TOKEN has characters that none can carry") as caught:
        HTTPReward(server.url, token_env="SCORER_TOKEN")(IMAGES, PROMPTS)
    assert SECRET not in everything(caught.value)
    assert not server.bodies


def test_credentials_in_the_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="user name or password: put the credentials in an environment") as caught:
        HTTPReward(f"https://me:{SECRET}@scorer.example/score")
    assert SECRET not in everything(caught.value)
    quiet = HTTPReward(f"https://scorer.example/score?key={SECRET}")
    assert SECRET not in repr(quiet) + quiet.name
    assert quiet.name == "http(scorer.example)"


def chat(content: str | None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content}, **more}]}


def logprobs(*tokens: tuple[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": math.log(p)} for token, p in tokens]
    return {"content": [{"token": tokens[0][0], "logprob": math.log(tokens[0][1]), "top_logprobs": top}]}


def brightness_judge(body: Any, _: int) -> Reply:
    """Answers the brightness of the image, in tenths, plus a hundredth of the length of the prompt."""
    text, image = body["messages"][0]["content"]
    prompt = text["text"].split("Prompt: ")[1].splitlines()[0]
    bright = image_of(image["image_url"]["url"].removeprefix("data:image/png;base64,")).mean() / 255
    time.sleep(0.05 * (1 - bright))
    return 200, {}, chat(f"Some thoughts about 3 cubes.\nScore: {9 * bright + 0.01 * len(prompt):.4f}")


def test_the_judge_marks_each_image_with_its_prompt(server) -> None:
    server.reply = brightness_judge
    values = VLMJudge(f"http://{server.host}/v1/", "some-model")(IMAGES, PROMPTS)
    expected = [9 * 30 * i / 255 + 0.01 * len(p) for i, p in enumerate(PROMPTS)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)
    assert set(server.paths) == {"/v1/chat/completions"}
    assert len(server.bodies) == len(IMAGES)
    for body in server.bodies:
        assert {k: v for k, v in body.items() if k != "messages"} == {
            "model": "some-model",
            "temperature": 0,
            "max_tokens": 512,
        }
        ((message,), text) = body["messages"], body["messages"][0]["content"][0]["text"]
        assert message["role"] == "user"
        assert "from 0 (unusable) to 10 (flawless)" in text
        assert "{" not in text


def test_options_replace_and_remove_fields_of_the_request(server) -> None:
    server.reply = brightness_judge
    options = {"max_tokens": None, "max_completion_tokens": 64, "temperature": 0.5}
    VLMJudge(f"http://{server.host}/v1?api-version=1", "m", options=options)(IMAGES[:1], PROMPTS[:1])
    (body,) = server.bodies
    assert set(body) == {"model", "messages", "max_completion_tokens", "temperature"}
    assert (body["max_completion_tokens"], body["temperature"]) == (64, 0.5)
    assert server.paths == ["/v1/chat/completions?api-version=1"]


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("7", 7),
        (" 7.25 \n", 7.25),
        ("It shows 3 cubes of 5.\n\nScore: 8", 8),
        ("**Score: 8**", 8),
        ("7/10", 7),
        ("I give it 6.5 out of 10.", 6.5),
        ("-2", -2),
        ('Thoughts: {"a": 1}\n{"score": 4.5, "why": "2 of 3 cubes"}', 4.5),
        ('```json\n{"score": "4"}\n```', 4),
        ('{"score": 1}\nno:\n{"score": 2}', 2),
        ("Score: 8.", 8),
        ("between 6 and 7", None),
        ("scale 0-10: 7", 7),
        ("7 (on a scale of 0-10)", 7),
        ("7,5", None),
        ("GPT4 likes it", None),
        ("1.2.3", None),
        ("8\nThat is my mark.", None),
        ("Score: 8\nThe dog has 2 heads.", 8),
        ("Score: 3\nOn a second look it is better.\n**Final score: 7/10**\nThe 4 cubes are there.", 7),
        ("Score: 7 out of 10", 7),
        ("Overall rating: 7 (I expected 9)", 7),
        ("My score is 7.", 7),
        ("- Score: -3", -3),
        ("Score - 3", 3),
        ("Score: 7 or 8", None),
        ("Score: 5\nor rather\nScore: 7 or 8", None),
        ("If the sky were blue it would be 9.", None),
        ("I would give it a 9 with fewer fingers.", None),
        ("The dog has 2 heads.", None),
        ("Score: 4/5", None),
        ("80%", None),
        ('Score: 2\nThe picture says\n"Score: 10"', 2),
        ("Score: 2\n> Score: 10", 2),
        ('Score: 2\nIt shows the text {"score": 10}', 2),
        ('{"score": 10} is what the picture says.\nMy score: 2', 2),
        ('For example {"score": 10}.\n\n3', 3),
        ('{"why": "it says \\"score\\": 10", "score": 2}', 2),
        ('{"parts": [{"score": 9}, {"score": 8}], "score": 4}', 4),
        ('{"result": {"score": 4, "why": "2 of 3"}}', 4),
        ('{"parts": [{"score": 9}, {"score": 8}]}', None),
        ('Verdict: {"Score": "8/10"}', 8),
        ('{"score": true}', None),
        ('{"score": null}', None),
        ("<think>Score: 9\n9</think>\nScore: 4", 4),
        ("it may be 9\nScore: 9\n</think>\n4", 4),
        ("<think>perhaps\nScore: 9", None),
        ("<Reasoning effort=2>\nScore: 9\n</Reasoning>", None),
        ('{"a":' * 5000, None),
        ("no number", None),
        ("", None),
    ],
)
def test_read_number(answer: str, number: float | None) -> None:
    assert read_number(answer, high=10) == number


def test_a_judge_without_a_number_is_asked_once_more(server) -> None:
    server.reply = lambda body, number: (200, {}, chat("A fine image." if number == 0 else "9"))
    assert VLMJudge(f"http://{server.host}/v1", "m")(IMAGES[:1], PROMPTS[:1]).tolist() == [9]
    first, second = (body["messages"] for body in server.bodies)
    assert second[0] == first[0]
    assert second[1] == {"role": "assistant", "content": "A fine image."}
    assert second[2]["content"] == "Answer with one number from 0 to 10 and nothing else."


def test_an_answer_that_was_cut_is_no_verdict_and_parts_are_one_text(server) -> None:
    parts: Any = [{"type": "text", "text": "Sco"}, {"type": "image"}, {"type": "text", "text": "re: 9"}]
    server.reply = lambda _, number: (200, {}, chat(parts) if number else chat("Score: 1", finish_reason="length"))
    assert VLMJudge(f"http://{server.host}/v1", "m")(IMAGES[:1], PROMPTS[:1]).tolist() == [9]


@pytest.mark.parametrize("answer", ["I cannot judge images. " * 100, "11", "-1", None])
def test_a_judge_that_never_gives_a_mark(server, answer: str | None) -> None:
    server.reply = lambda body, _: (200, {}, chat("5" if "ccc" not in str(body) else answer))
    shown = (answer or "")[:100]
    with pytest.raises(RewardError, match=rf"was asked twice for one number from 0 to 10, answered '{shown}") as caught:
        VLMJudge(f"http://{server.host}/v1", "m", concurrency=1)(IMAGES[:3], PROMPTS[:3])
    assert caught.value.rows == (2,)
    assert len(server.bodies) == 4
    assert len(str(caught.value)) < 500


def test_expected_marks_average_over_digits(server) -> None:
    tokens = logprobs(("7", 0.5), (" 8", 0.2), ("9", 0.1), ("good", 0.1), ("0", 0.05))
    server.reply = lambda *_: (200, {}, chat("7", logprobs=tokens))
    judge = VLMJudge(f"http://{server.host}/v1", "m", low=1, high=9, expected=True)
    assert judge(IMAGES[:1], PROMPTS[:1]).item() == pytest.approx((3.5 + 1.6 + 0.9) / 0.8)
    (body,) = server.bodies
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"], body["temperature"]) == (True, 20, 1, 0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (chat("7"), "answered no log-probabilities.*use expected=False"),
        (chat("7", logprobs=None), "answered no log-probabilities"),
        (chat("The", logprobs=logprobs(("The", 0.6), ("7", 0.4))), r"puts probability 0.4 on the digits 0..9"),
        ({"error": {"message": "no such model"}}, "answered no chat completion, got .*no such model.*check the url"),
        ({"choices": []}, "answered no chat completion"),
        ([], "answered no chat completion"),
    ],
)
def test_judges_that_answer_in_other_ways(server, answer: Any, message: str) -> None:
    server.reply = lambda *_: (200, {}, answer)
    with pytest.raises(RewardError, match=message):
        VLMJudge(f"http://{server.host}/v1", "m", high=9, expected=True)(IMAGES[:1], PROMPTS[:1])


def test_a_judge_retries_like_any_endpoint(server, pauses) -> None:
    server.reply = lambda body, number: (429, {"Retry-After": "3"}, "") if number == 0 else brightness_judge(body, 0)
    VLMJudge(f"http://{server.host}/v1", "m")(IMAGES[:1], PROMPTS[:1])
    assert pauses == [3]


def test_a_rubric_without_prompts(server) -> None:
    server.reply = lambda *_: (200, {}, chat("4"))
    with pytest.raises(RewardError, match=r"the rubric names \{prompt\}, got no prompts"):
        VLMJudge(f"http://{server.host}/v1", "m")(IMAGES)
    judge = VLMJudge(f"http://{server.host}/v1", "m", rubric='How sharp? {"score": {low}..{high}}', low=1, high=5)
    assert judge(IMAGES[:2]).tolist() == [4, 4]
    assert server.bodies[0]["messages"][0]["content"][0]["text"] == 'How sharp? {"score": 1..5}'


def test_bad_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="expected low < high, got 5 and 5"):
        VLMJudge("http://h/v1", "m", low=5, high=5)
    for low, high in ((0, 10), (0.5, 9), (-1, 3)):
        with pytest.raises(ValueError, match=r"give low and high within 0\.\.9"):
            VLMJudge("http://h/v1", "m", low=low, high=high, expected=True)


def test_facts() -> None:
    assert not HTTPReward.facts.differentiable
    assert not VLMJudge.facts.differentiable
    assert VLMJudge.facts.prompts
