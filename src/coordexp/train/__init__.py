"""Training: the trainer, its meters and callbacks."""
