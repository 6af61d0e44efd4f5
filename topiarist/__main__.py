"""`python -m topiarist`."""

from topiarist.cli import main

if __name__ == "__main__":
    main()
