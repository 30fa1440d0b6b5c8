"""What a refusal says: an error that a person can put right is one line."""

from __future__ import annotations

import pytest

from dijiang_convert.errors import DijiangError


def message(call: pytest.ExceptionInfo[DijiangError]) -> str:
    """The error's text, which must be one line."""
    text = str(call.value)
    assert text and "\n" not in text and text == text.strip()
    return text
