"""The rules of the audit: pure functions of a read log, each with a code. :mod:`.registry` holds them all."""
