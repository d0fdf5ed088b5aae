"""`python -m training ARGS` is `medattn train ARGS`."""

import sys

from keras_medattn.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
