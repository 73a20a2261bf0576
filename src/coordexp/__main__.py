"""``python -m coordexp``."""

from coordexp.cli.main import main

if __name__ == "__main__":
    main()
