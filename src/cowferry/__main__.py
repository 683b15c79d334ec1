"""`python -m cowferry`."""

from cowferry.cli import main

if __name__ == "__main__":
    main()
