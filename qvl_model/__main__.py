"""`python -m qvl_model` is the command `qvl`."""

from .cli import main

if __name__ == "__main__":
    main()
