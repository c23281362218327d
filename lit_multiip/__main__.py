"""``python -m lit_multiip``."""

from lit_multiip.cli import main

if __name__ == "__main__":
    main()
