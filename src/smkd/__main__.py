"""`python -m smkd`."""

from smkd.cli import main

if __name__ == "__main__":
    main()
