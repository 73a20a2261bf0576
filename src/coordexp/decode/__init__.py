"""Generation, readouts, predictions."""
