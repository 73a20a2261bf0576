"""Other people's trainers, with this package's objective and metrics."""
