"""The synthesis script of the original program, with its flags."""

import sys

from fedfactory.cli import main

if __name__ == "__main__":
    sys.argv[0] = "generate_volumes.py"
    main(["generate-volumes", *sys.argv[1:]])
