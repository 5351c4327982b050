"""`python -m dagjax`."""

from dagjax.cli import main

if __name__ == "__main__":
    main()
