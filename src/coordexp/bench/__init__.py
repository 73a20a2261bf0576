"""Measurements of speed and memory, with the circumstances written beside every number."""
