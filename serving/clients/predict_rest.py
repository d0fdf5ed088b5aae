"""Ask a TensorFlow Serving about images over REST: `python predict_rest.py http://HOST:PORT MODEL IMAGE...`.

It needs nothing but Python.
"""

import base64
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

TRIES = 5


def ask(url: str, body: dict) -> dict:
    """POST JSON, again where the server is busy or not there yet."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for turn in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code not in (429, 502, 503) or turn == TRIES - 1:
                raise SystemExit(f"{url} answers {error.code}: {error.read().decode()}") from None
        except urllib.error.URLError as error:
            if turn == TRIES - 1:
                raise SystemExit(f"{url} does not answer: {error.reason}") from None
        time.sleep(0.2 * 2**turn)
    raise AssertionError("not reached")


def main(server: str, model: str, *images: str) -> None:
    """Print the class of each image and its probability."""
    rows = [{"b64": base64.b64encode(Path(name).read_bytes()).decode()} for name in images]
    answer = ask(f"{server}/v1/models/{model}:predict", {"instances": rows})
    for name, row in zip(images, answer["predictions"], strict=True):
        print(f"{name}: {row['class_name']} ({row['probabilities'][row['label']]:.4f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
