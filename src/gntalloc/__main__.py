"""`python -m gntalloc` is `gntalloc`."""

from gntalloc.cli import main

if __name__ == "__main__":
    main()
