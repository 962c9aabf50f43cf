"""Tuned and modelled kernel configurations: data files, described in SCHEMA.md."""
