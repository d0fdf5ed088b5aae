"""Answer images with an exported LiteRT file: `python classify.py FOLDER/model.tflite IMAGE...`.

It needs `ai-edge-litert`, `numpy` and `pillow`, and `medattn.json` beside the file. Pillow's resize is not
TensorFlow's: its probabilities differ from the server's in the third decimal.
"""

import json
import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image


def main(file: str, *images: str) -> None:
    """Print the class of each image and its probability."""
    about = json.loads((Path(file).parent / "medattn.json").read_text())
    height, width = about["image_size"]
    classify = Interpreter(file).get_signature_runner("serving_default")
    for name in images:
        picture = Image.open(name)
        if picture.mode.startswith("I"):
            raise ValueError(f"{name}: of 16 bits; map {about['window']} to 0..255 first")
        if about.get("scaled_decoding"):
            picture.draft(picture.mode, (2 * width, 2 * height))
        sized = picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        [probabilities] = classify(image=np.asarray(sized)[None])["probabilities"]
        place = int(probabilities.argmax())
        if about["threshold"] is not None:
            place = int(probabilities[1] >= about["threshold"])
        print(f"{name}: {about['class_names'][place]} ({probabilities[place]:.4f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
