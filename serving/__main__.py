"""`python -m serving ARGS` is `medattn serve ARGS`."""

import sys

from keras_medattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
