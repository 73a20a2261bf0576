"""Measurements of this package's own speed, with the circumstances they were made in."""
