"""`python -m qinit`, as torchrun starts it: the command line."""

from qinit_cli.main import main

if __name__ == "__main__":
    main()
