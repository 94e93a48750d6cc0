"""`python -m seg3dcam`: the command line, where no `seg3dcam` command is installed."""

from seg3dcam.cli import main

if __name__ == "__main__":
    main()
