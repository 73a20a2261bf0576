"""Typed, strict configuration: one file, one experiment."""
