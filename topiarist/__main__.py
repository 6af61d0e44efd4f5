"""`python -m topiarist`."""

from topiarist.cli.app import main

if __name__ == "__main__":
    main()
