"""`python -m hookgraph` is `hookgraph`."""

from hookgraph.cli import main

if __name__ == "__main__":
    main()
