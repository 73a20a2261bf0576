"""Numbers from a predictions file and a records file. Reads files only: no model, no images, no torch."""
