"""Talking to the Hub: patience where a failure will pass, one line about it where it won't, and no token in either."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..errors import DijiangError
from ..files import FULL
from ..progress import say

TIMEOUT = 30  # seconds; the client's own default for look-ups is to wait for ever
WAITS = (1, 2, 4, 8)  # seconds between tries, where the Hub does not say how long
LONGEST_WAIT = 300  # the Hub counts requests over five minutes
PASSING = (429, 500, 502, 503, 504)

T = TypeVar("T")

_reached = False  # a Hub that was there once will be back; one that never was is rather a wrong address


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns; it is called again after too many requests, a server's error or a lost connection."""
    global _reached
    for wait in (*WAITS, None):
        try:
            result = call()
        except (_http_error(), OSError) as error:
            if wait is None or not wait_if_passing(error, wait):
                raise
        else:
            _reached = True
            return result
    raise AssertionError  # the last try returns or raises


def wait_if_passing(error: BaseException, wait: int = WAITS[-1]) -> bool:
    """Whether a failure will pass, after a pause if it will: as long as the Hub says, or else `wait` seconds."""
    pause = _pause(error, wait)
    if pause is not None:
        told = f"{one_line(error, 100)}: trying again in {pause} s"
        say(told)
        time.sleep(pause)
    return pause is not None


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Tell any failure of the Hub client inside the block as one line about `repo_id`.

    Raises:
        DijiangError: whatever the client raised, with what to do about it and without any token.
    """
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_redact_record)
    try:
        yield
    except (_http_error(), OSError, RuntimeError, ValueError) as error:
        raise DijiangError(_explain(error, repo_id, revision)) from error


def own_token() -> str | None:
    """The user's token, None where there is none or its file can't be read."""
    from huggingface_hub import get_token

    try:
        return get_token()
    except (OSError, RuntimeError, ValueError):
        return None


def redact(text: str) -> str:
    """`text` without tokens that a server or proxy may have echoed, nor what addresses hide or sign."""
    if token := own_token():
        text = text.replace(token, "***")
    text = re.sub(r"\bhf_(oauth_\S+|[A-Za-z0-9]{16,})|(?<=Bearer )\S+", "***", text)
    text = re.sub(r"(?<=://)[^/\s@]+@", "***@", text)
    return re.sub(r"(://[^\s?\"']+)\?[^\s\"']+", r"\1?***", text)


def _redact_record(record: logging.LogRecord) -> bool:
    """A filter of the client's own log, which names the addresses that it asks."""
    record.msg, record.args = redact(record.getMessage()), None
    return True


def one_line(message: object, limit: int = 200) -> str:
    text = redact(" ".join(str(message).split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _http_error() -> type[Exception]:
    """The base of all HTTP errors of the client, which comes from httpx or, in newer clients, httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The client wraps what happened, at times twice."""
    while error is not None:
        yield error
        error = error.__cause__


def _pause(error: BaseException, wait: int) -> int | None:
    """How many seconds to wait before trying again; None if that would not help."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            status, headers = cause.response.status_code, cause.response.headers
            if status not in PASSING:
                return None
            asked = re.search(r"t=(\d+)", headers.get("RateLimit", "")) if status == 429 else None
            text = asked[1] if asked else headers.get("Retry-After", "")
            pause = int(text) + 1 if text.isdigit() else wait
            return pause if pause <= LONGEST_WAIT else None
        names = {base.__name__ for base in type(cause).__mro__}
        passing = {"TimeoutException", "ReadError", "WriteError", "RemoteProtocolError"}
        if names & (passing | {"ConnectError"} if _reached else passing):
            return wait
    return None


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    endpoint = redact(constants.ENDPOINT)
    page = f"{endpoint}/{repo_id}"
    for cause in _causes(error):
        match cause:
            case errors.GatedRepoError():  # this case must come before its base, RepositoryNotFoundError
                return f"{repo_id} is gated: ask for access at {page}, then run `hf auth login` or set HF_TOKEN"
            case errors.RepositoryNotFoundError():
                return (
                    f"{repo_id} is not on the Hub, or is private: check the name,"
                    " or run `hf auth login` or set HF_TOKEN to see private repositories"
                )
            case errors.RevisionNotFoundError():
                return f"{repo_id} has no revision {revision}: choose a branch, tag or commit from {page}"
            case OSError() if cause.errno in FULL:
                return f"no space left for what the Hub sends of {repo_id}: free some, or set HF_HOME elsewhere"
            case errors.OfflineModeIsEnabled():
                return f"cannot reach the Hub for {repo_id}: offline mode is on; unset HF_HUB_OFFLINE"
            case errors.BadRequestError():  # the client's error around it says more
                break
            case errors.HfHubHTTPError():
                return _explain_status(cause.response.status_code, cause.server_message or "", repo_id)
            case _ if isinstance(cause, _http_error()):
                return (
                    f"cannot reach {endpoint} for {repo_id} ({type(cause).__name__}):"
                    " check the connection, any proxy and HF_ENDPOINT, then try again"
                )
            case OSError(errno=int(), filename=str() as path):  # the client's cache, or the file of its token
                reason = f"can't use {one_line(path)} for {repo_id} ({cause.strerror})"
                return f"{reason}: free some space there, or set HF_HOME to a folder that can be written"
            case RuntimeError() if "home directory" in str(cause):
                return f"there is no home folder to keep {repo_id} in: set HF_HOME to a folder that can be written"
    return f"the Hub client failed on {repo_id}: {one_line(error)}"


def _explain_status(status: int, said: str, repo_id: str) -> str:
    reason = f" ({one_line(said)})" if said else ""
    if status == 401:
        return f"the Hub wants a valid token for {repo_id}{reason}: run `hf auth login` or set HF_TOKEN"
    if status == 403:
        return f"this token may not do that to {repo_id}{reason}: run `hf auth login` with one that may"
    if status in (409, 412):
        return f"{repo_id} changed at the same time{reason}: try again"
    if status == 429:
        return f"the Hub limits how often {repo_id} may be asked for{reason}: try again in a few minutes"
    if status >= 500:
        return f"the Hub failed on {repo_id} with status {status}{reason}: try again later"
    return f"the Hub refused the request for {repo_id} with status {status}{reason}"
