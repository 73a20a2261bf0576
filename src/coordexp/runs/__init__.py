"""Run directories: the manifest, the log and the report. Imports no torch."""
