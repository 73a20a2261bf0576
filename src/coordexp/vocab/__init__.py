"""The coordinate vocabulary of a tokenizer and a model."""
