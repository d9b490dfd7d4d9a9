"""The endpoint client against a real HTTP server that is busy, broken, slow or wrong."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from chat_server import chat_server, said

from luthier.endpoint import Endpoint
from luthier.errors import UserError

BUSY = {"error": {"message": "slow down"}}


def asks(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def endpoint(server, tmp_path, **options):
    return Endpoint(server.url, "m", **{"cache": tmp_path / "answers.sqlite", "backoff": 0.01, **options})


def test_answers_come_in_the_order_of_the_questions_whatever_the_order_they_arrive_in(tmp_path):
    def reply(body, number):
        time.sleep(0.1 if said(body) == "0" else 0.001 * (number % 3))
        return 200, f"answer {said(body)}"

    with chat_server(reply) as server:
        answers = endpoint(server, tmp_path, concurrency=4)(asks(*map(str, range(40))), range(40))
    assert answers == [f"answer {i}" for i in range(40)]
    assert 2 <= server.most_under_way <= 4
    assert {b["seed"] for b in server.bodies} == set(range(40))


def test_what_was_answered_is_not_asked_again(tmp_path):
    with chat_server(lambda body, number: (200, f"{said(body)} {number}")) as server:
        first = endpoint(server, tmp_path)
        got = first(asks("a", "b", "a"), [1, 2, 1])
        assert got[0] == got[2] and len(server.bodies) == 2 and first.usage.cached == 1
        second = endpoint(server, tmp_path)
        assert second(asks("b", "a"), [2, 1]) == [got[1], got[0]]
        assert (len(server.bodies), second.usage.requests, second.usage.cached) == (2, 0, 2)
        # another seed, parameter or model is another question
        second(asks("a"), [9])
        endpoint(server, tmp_path, temperature=0.1)(asks("a"), [1])
        Endpoint(server.url, "other", cache=tmp_path / "answers.sqlite")(asks("a"), [1])
        assert len(server.bodies) == 5
        endpoint(server, tmp_path, cache=False)(asks("a"), [1])
        assert len(server.bodies) == 6


def test_progress_is_told_as_answers_come(tmp_path):
    heard = []
    with chat_server(lambda body, number: (200, "ok")) as server:
        endpoint(server, tmp_path)(asks("a"), [0])
        endpoint(server, tmp_path)(asks("a", "b", "c", "b"), [0] * 4, progress=lambda *n: heard.append(n))
    # One is on disk, and one is asked for twice.
    assert heard == [(2, 4), (3, 4), (4, 4)]


def test_busy_and_broken_answers_are_tried_again(tmp_path):
    troubles = [(429, BUSY), (500, b"oops"), (200, b"{broken"), (200, {"choices": []}), (200, " ")]
    with chat_server(lambda body, number: troubles[number] if number < len(troubles) else (200, "at last")) as server:
        model = endpoint(server, tmp_path)
        assert model(asks("a"), [0]) == ["at last"]
    assert (len(server.bodies), model.usage.retries) == (6, 5)


def test_an_endpoint_that_answers_now_and_then_goes_on(tmp_path):
    with chat_server(lambda body, number: (200, "ok") if int(said(body)) % 8 == 0 else (500, b"")) as server:
        answers = endpoint(server, tmp_path, retries=0, concurrency=1)(asks(*map(str, range(40))), range(40))
    assert [i for i, a in enumerate(answers) if a == "ok"] == [0, 8, 16, 24, 32]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(tmp_path, form):
    def reply(body, number):
        wait = "1" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        return (429, BUSY, {"Retry-After": wait}) if number == 0 else (200, "ok")

    with chat_server(reply) as server:
        began = time.monotonic()
        assert endpoint(server, tmp_path, backoff=0)(asks("a"), [0]) == ["ok"]
        assert time.monotonic() - began > 0.9


def test_one_row_that_fails_leaves_the_others_and_says_why(tmp_path):
    def reply(body, number):
        return (503, b"down") if said(body) == "bad" else (200, "ok")

    with chat_server(reply) as server:
        answers = endpoint(server, tmp_path, retries=2)(asks("a", "bad", "b"), [0, 0, 0])
    assert answers[0] == answers[2] == "ok"
    assert "3 tries" in str(answers[1]) and "503" in str(answers[1])
    assert len(server.bodies) == 5


def test_a_request_that_is_refused_is_not_repeated(tmp_path):
    message = {"error": {"message": "context too long"}}
    with chat_server(lambda body, number: (400, message) if said(body) == "long" else (200, "ok")) as server:
        answers = endpoint(server, tmp_path)(asks("long", "a"), [0, 0])
    assert "context too long" in str(answers[0]) and answers[1] == "ok" and len(server.bodies) == 2


def test_an_answer_cut_at_the_limit_is_none(tmp_path):
    cut = {"choices": [{"message": {"content": "half a sen"}, "finish_reason": "length"}]}
    with chat_server(lambda body, number: (200, cut)) as server:
        (answer,) = endpoint(server, tmp_path)(asks("a"), [0])
    assert "cut at max_tokens" in str(answer) and len(server.bodies) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_at_once_and_tells_no_key(tmp_path, monkeypatch, status):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with chat_server(lambda body, number: (status, {"error": {"message": "no: sk-secret"}})) as server:
        model = endpoint(server, tmp_path, api_key_env="MY_KEY", concurrency=1)
        with pytest.raises(UserError, match=r"refuses every request.*\*\*\*") as caught:
            model(asks(*map(str, range(50))), range(50))
    assert len(server.bodies) == 1
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(caught.value) + repr(model)
    assert b"sk-secret" not in b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert ("MY_KEY" in str(caught.value)) == (status != 404)


def test_no_key_is_sent_unless_named_and_a_missing_one_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    with chat_server(lambda body, number: (200, "ok")) as server:
        endpoint(server, tmp_path)(asks("a"), [0])
        assert "Authorization" not in server.headers[0]
        with pytest.raises(UserError, match="NOT_THERE is not set"):
            endpoint(server, tmp_path, api_key_env="NOT_THERE")


def test_an_interrupted_job_goes_on_where_it_stopped(tmp_path):
    broken = threading.Event()

    def reply(body, number):
        if number >= 12 and not broken.is_set():
            return 401, {"error": "the key has expired"}
        return 200, f"answer {said(body)}"

    questions = asks(*map(str, range(30)))
    with chat_server(reply) as server:
        with pytest.raises(UserError, match="expired"):
            endpoint(server, tmp_path, concurrency=1)(questions, range(30))
        assert len(server.bodies) == 13
        broken.set()
        assert endpoint(server, tmp_path)(questions, range(30)) == [f"answer {i}" for i in range(30)]
        assert len(server.bodies) == 13 + 18


def test_an_endpoint_that_is_down_stops_the_job_before_every_row_has_waited(tmp_path):
    with chat_server(lambda body, number: (500, b"")) as server:
        with pytest.raises(UserError, match="in a row failed"):
            endpoint(server, tmp_path, retries=1, concurrency=2)(asks(*map(str, range(500))), range(500))
        assert len(server.bodies) <= 24
    with pytest.raises(UserError, match="cannot be reached"):
        Endpoint(server.url, "m", cache=False, retries=0)(asks(*map(str, range(20))), range(20))


def test_a_slow_endpoint_times_out(tmp_path):
    def reply(body, number):
        time.sleep(0.5 if number == 0 else 0)
        return 200, "ok"

    with chat_server(reply) as server:
        model = endpoint(server, tmp_path, timeout=0.2)
        assert model(asks("a"), [0]) == ["ok"] and model.usage.retries == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "no web address"),
        ({"model": ""}, "no model's name"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"retries": -1}, "retries=-1"),
        ({"timeout": 0}, "timeout=0"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(UserError, match=message):
        Endpoint(**{"base_url": "http://localhost/v1", "model": "m", "cache": False, **options})


def test_what_is_sent(tmp_path):
    with chat_server(lambda body, number: (200, "ok")) as server:
        endpoint(server, tmp_path, temperature=None, parameters={"top_p": 0.5}, send_seed=False)(asks("问"), [7])
        (body,) = server.bodies
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "问"}],
        "max_tokens": 1024,
        "top_p": 0.5,
    }
