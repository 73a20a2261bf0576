"""The command line: one subcommand a file, heavy imports inside the commands."""
