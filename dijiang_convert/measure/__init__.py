"""Measures models: beside their originals, by position in a text, in time and memory. Nothing is trained here."""
