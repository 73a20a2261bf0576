"""``python -m coordexp``."""

from coordexp.cli.interrupts import start

if __name__ == "__main__":
    start()
