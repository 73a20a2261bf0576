"""Experiments to start from, as ``coordexp init`` writes them."""
