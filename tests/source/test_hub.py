"""What the Hub refuses, and a Hub that is not there: each is told in one line, without the token."""

from __future__ import annotations

import importlib
import json
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from dijiang_convert.errors import DijiangError
from dijiang_convert.source import hub as hub_module
from dijiang_convert.source.hub import hub_errors
from dijiang_convert.source.resolve import download, read_config, resolve
from tests.hub import Hub
from tests.refusals import message
from tests.source.repositories import BASE, CONFIG, WEIGHTS, resolve_elsewhere


def test_missing_repository() -> None:
    with pytest.raises(DijiangError) as call:
        resolve("sources/missing")
    assert message(call).startswith("sources/missing is not on the Hub, or is private: ")


def test_invalid_repository_name(hub: Hub) -> None:
    with pytest.raises(DijiangError) as call:
        resolve("sources/a--b")
    assert "a--b" in message(call)


def test_private_repository_needs_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("sources/private", BASE, private=True)
    assert read_config(resolve("sources/private")) == json.loads(CONFIG)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DijiangError) as call:
        resolve("sources/private")
    assert "HF_TOKEN" in message(call)


def test_gated_repository(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("sources/gated", BASE | {"model.safetensors": WEIGHTS})
    hub.gate("sources/gated")
    expected = f"sources/gated is gated: ask for access at {hub.url}/sources/gated, then run `hf auth login`"
    source = resolve("sources/gated")  # the look-up is open, as on the Hub
    for token in (hub.token, None):  # without a token the Hub answers 401, with one 403
        if token is None:
            monkeypatch.delenv("HF_TOKEN")
        for step in (read_config, download):
            with pytest.raises(DijiangError) as call:
                step(source)
            assert message(call).startswith(expected)


def test_missing_revision(hub: Hub) -> None:
    hub.add_repo("sources/revisions", BASE)
    with pytest.raises(DijiangError) as call:
        resolve("sources/revisions", "step7")
    assert message(call).startswith("sources/revisions has no revision step7: ")


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "valid token"),
        (403, "this token may not"),
        (429, "in a few minutes"),
        (500, "try again later"),
        (503, "status 503"),
        (418, "status 418"),
    ],
)
def test_refusals_of_the_hub(status: int, told: str, hub: Hub, waits: list[float]) -> None:
    failing = hub.failing("/api/models/sources/refused", status, "first\nsecond")
    with failing, pytest.raises(DijiangError) as call:
        resolve("sources/refused")
    assert told in message(call) and "sources/refused" in message(call)


def test_invalid_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("sources/open", BASE)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(DijiangError) as call:
        resolve("sources/open")
    assert "valid token" in message(call) and "hf_expired" not in message(call)


def test_token_is_never_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    echo = f"no rights for Bearer secret-of-a-proxy, {hub.token}, hf_SomeoneElsesToken1; see hf_hub_download"
    with hub.failing("/api/models/sources/echo", 403, echo), pytest.raises(DijiangError) as call:
        resolve("sources/echo")
    text = message(call)
    assert "no rights for" in text and "see hf_hub_download" in text
    assert hub.token not in text and "secret-of-a-proxy" not in text and "SomeoneElse" not in text

    monkeypatch.setenv("HF_TOKEN", "unusual+token")
    with pytest.raises(DijiangError) as call, hub_errors("sources/echo"):
        raise OSError("disk full near unusual+token")
    assert message(call) == "the Hub client failed on sources/echo: disk full near ***"


def test_a_hub_that_was_there_is_waited_for(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """And one that never was is told at once: it is rather a wrong address."""
    lost = importlib.import_module(hub_module._http_error().__module__.partition(".")[0]).ConnectError("no route")
    for reached in (False, True):
        monkeypatch.setattr(hub_module, "_reached", reached)
        answers: list[BaseException | str] = [lost, lost, "there"]

        def call(answers: list[BaseException | str] = answers) -> str:
            if isinstance(answer := answers.pop(0), str):
                return answer
            raise answer

        if reached:
            assert hub_module.patiently(call) == "there" and waits == [1, 2]
        else:
            with pytest.raises(type(lost)):
                hub_module.patiently(call)
            assert waits == []


def test_unreachable_hub() -> None:
    endpoint = "http://127.0.0.1:9"
    done = resolve_elsewhere("resolve('o/n')", HF_ENDPOINT=endpoint)
    assert done.stdout.startswith(f"cannot reach {endpoint} for o/n (ConnectError): check"), done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("resolve('o/n')", "o/n at main was not downloaded before, and offline mode is on: unset HF_HUB_OFFLINE"),
        (
            "read_config(Source('n', 'o/n', '0' * 40, None))",
            "cannot reach the Hub for o/n: offline mode is on; unset HF_HUB_OFFLINE",
        ),
    ],
)
def test_offline_mode(code: str, told: str) -> None:
    done = resolve_elsewhere(code, HF_HUB_OFFLINE="1")
    assert done.stdout == f"{told}\n", done.stderr


def test_import_is_light() -> None:
    check = "import sys; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    done = resolve_elsewhere(f"import dijiang_convert.push, dijiang_convert.checkpoint.card; {check}")
    assert done.stdout.strip() == "set()", done.stderr


def test_loopback_hub_serves_ranges(hub: Hub) -> None:
    """The client resumes a broken download by a Range request."""
    data = bytes(range(256)) * 8
    hub.add_repo("sources/ranges", {"model.safetensors": data})
    url = f"{hub.url}/sources/ranges/resolve/main/model.safetensors"
    with urlopen(Request(url, headers={"Range": "bytes=2000-"})) as part:
        assert (part.status, part.read()) == (206, data[2000:])
        assert part.headers["Content-Range"] == "bytes 2000-2047/2048"
    with pytest.raises(HTTPError) as call:
        urlopen(Request(url, headers={"Range": "bytes=4000-"}))
    assert call.value.code == 416
