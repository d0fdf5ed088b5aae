"""Prepares IDRiD's images of 224 x 224 for the study of the global mask, `idrid_mask.sh`.

    python training/studies/idrid_mask.py IDRID_224 OUT --task edema

IDRID_224 holds images that are cut to columns 260 to 3685 and shrunk by area to 224 x 224 already, and a
`manifest.csv` with the columns `path,retinopathy,edema,split`; names end as distributed: `IDRiD_001.jpg`.
Right eyes are flipped here, by the lists of Xu et al., and written as PNG with a `manifest.csv` for
training. From the distribution itself `medattn train` makes the same by `data.set = "idrid_edema"`.
"""

import argparse
import csv
from pathlib import Path

from PIL import Image, ImageOps

from keras_medattn.data.sets import idrid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", choices=["edema", "retinopathy"], default="edema")
    arguments = parser.parse_args()
    with open(arguments.source / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = []
    for row in rows:
        name = Path(row["path"]).with_suffix(".png").name
        with Image.open(arguments.source / row["path"]) as image:
            right = idrid.flipped(row["split"], row["path"])
            (ImageOps.mirror(image) if right else image).save(arguments.out / name)
        table.append((name, row[arguments.task], row["split"]))
    with open(arguments.out / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *table])


if __name__ == "__main__":
    main()
