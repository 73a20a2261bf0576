"""The objective: targets, terms, sums, and the loss on top of a language-model head."""
