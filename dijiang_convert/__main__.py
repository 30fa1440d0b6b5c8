"""`python -m dijiang_convert` is `dijiang`."""

from .cli import app

app(prog_name="dijiang")
