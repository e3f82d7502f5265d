"""``python -m ift_tune``, the same as ``ift-tune``."""

from ift_tune.cli import main

if __name__ == "__main__":  # the worker processes of a search import this module under another name
    main()
