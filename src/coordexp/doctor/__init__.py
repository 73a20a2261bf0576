"""What ``coordexp doctor`` looks at: the machine, a checkpoint, coordinates in a file. Nothing is changed or repaired."""
