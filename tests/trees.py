"""Tiny trees with the true names and layout of the public sets; `TREES[name](folder)` answers the root.

Every class has ten images or patients, and of two classes the second is brighter, so that default splits work
and a model can learn them.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

SUBTYPES = {
    "A": "benign/SOB/adenosis",
    "F": "benign/SOB/fibroadenoma",
    "PT": "benign/SOB/phyllodes_tumor",
    "TA": "benign/SOB/tubular_adenoma",
    "DC": "malignant/SOB/ductal_carcinoma",
    "LC": "malignant/SOB/lobular_carcinoma",
    "MC": "malignant/SOB/mucinous_carcinoma",
    "PC": "malignant/SOB/papillary_carcinoma",
}


def picture(path: Path, seed: int, label: int, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> None:
    """Write noise, brighter for higher labels, in the kind that the name's suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    low = 35 * label
    pixels = np.random.default_rng(seed).integers(low, low + 60, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def generic(folder: Path) -> Path:
    """A folder a class."""
    for place, label in enumerate(("none", "spot")):
        for number in range(10):
            picture(folder / label / f"{number:02d}.png", 100 * place + number, place)
    return folder


def volumes(folder: Path) -> Path:
    """A CSV of ten volumes a class, each a folder of three to five slices."""
    rows = [("path", "label", "patient")]
    for number in range(20):
        for piece in range(3 + number % 3):
            picture(
                folder / f"v{number:02d}" / f"slice_{piece + 1}.png",
                10 * number + piece,
                number % 2,
                (32, 24),
            )
        rows.append((f"v{number:02d}", ("normal", "edema")[number % 2], f"p{number}"))
    with open(folder / "volumes.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "volumes.csv"


def breakhis(folder: Path) -> Path:
    """Three slides a subtype, each an image at four magnifications, and the lists of five folds.

    SOB_M_DC-14-13412 and SOB_M_LC-14-13412 are the same photographs, on two sides of every fold.
    """
    slides = [
        (kind, f"14-{2000 + 37 * i + 10 * place}{'AB' * (i % 2)}")
        for place, kind in enumerate(SUBTYPES)
        for i in range(3)
    ]
    slides += [("DC", "14-13412"), ("LC", "14-13412")]
    names = []
    for place, (kind, slide) in enumerate(slides):
        side = SUBTYPES[kind].startswith("malignant")
        letter = "BM"[side]
        for magnification in (40, 100, 200, 400):
            name = f"SOB_{letter}_{kind}-{slide}-{magnification}-001.png"
            home = folder / "BreaKHis_v1/histology_slides/breast" / SUBTYPES[kind]
            seed = magnification + 1000 * (0 if slide == "14-13412" else place + 1)
            picture(home / f"SOB_{letter}_{kind}_{slide}" / f"{magnification}X" / name, seed, int(side))
            names.append((place, name, magnification))
    for fold in range(1, 6):
        lines = [
            f"{name}|{magnification}|{fold}|{'test' if place % 5 == fold - 1 else 'train'}\n"
            for place, name, magnification in names
        ]
        (folder / f"dsfold{fold}.txt").write_text("".join(lines))
    return folder


def bach(folder: Path) -> Path:
    """Ten photographs of each of four classes, and the table of their labels."""
    photos, rows = folder / "ICIAR2018_BACH_Challenge" / "Photos", []
    for place, (label, start) in enumerate(
        {"Normal": "n", "Benign": "b", "InSitu": "is", "Invasive": "iv"}.items()
    ):
        for number in range(1, 11):
            name = f"{start}{number:03d}.tif"
            picture(photos / label / name, 100 * place + number, place, (64, 48))
            rows.append((name, label))
    with open(photos / "microscopy_ground_truth.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def crc_msi(folder: Path) -> Path:
    """Ten patients of two tiles a class to train on; to test on one of a tile and five of ten, a class."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for start, side, tiles in ((0, "TRAIN", [2] * 10), (50, "TEST", [1] + [10] * 5)):
        for place, label in enumerate(("MSS", "MSIMUT")):
            for patient, count in enumerate(tiles):
                barcode = f"TCGA-A{letters[place]}-{3400 + start + patient}"
                for tile in range(count):
                    name = f"blk-AAAA{letters[patient]}{letters[tile]}-{barcode}-01Z-00-DX1.png"
                    seed = 1000 * start + 500 * place + 20 * patient + tile
                    picture(folder / f"CRC_DX_{side}" / label / name, seed, place, (32, 32))
    return folder


def lymphoma(folder: Path) -> Path:
    """Ten cases of a lymphoma, of which every second has two photographs."""
    for place, label in enumerate(("CLL", "FL", "MCL")):
        for case in range(10):
            for number in range(1 + case % 2):
                name = f"sj-05-{1000 + 100 * place + case}-R{case % 4}_{number + 1:03d}.tif"
                picture(folder / label / name, 100 * place + 2 * case + number, place, (70, 52))
    return folder


def idrid(folder: Path) -> Path:
    """Sixty photographs of the true width and few rows, ten a grade to train on and two to test on."""
    home = folder / "B. Disease Grading"
    truths = home / "2. Groundtruths"
    truths.mkdir(parents=True)
    for letter, side, word, each in (
        ("a", "a. Training Set", "Training", 10),
        ("b", "b. Testing Set", "Testing", 2),
    ):
        lines = ["Image name,Retinopathy grade,Risk of macular edema ,,\n"]
        for number in range(1, 5 * each + 1):
            grade, risk = number % 5, number % 3
            path = home / "1. Original Images" / side / f"IDRiD_{number:03d}.jpg"
            picture(path, number + 1000 * (letter == "b"), grade, (4288, 16))
            lines.append(f"{path.stem},{grade},{risk},,\n")
        (truths / f"{letter}. IDRiD_Disease Grading_{word} Labels.csv").write_text("".join(lines))
    return folder


def jaffe(folder: Path) -> Path:
    """Ten persons with a face of each emotion, and ratings of two studies."""
    emotions = ("HA", "SA", "SU", "AN", "DI", "FE")
    first, second, number = [], [], 0
    for person in ("KA", "KL", "KM", "KR", "MK", "NA", "NM", "TM", "UY", "YM"):
        for place, emotion in enumerate(emotions):
            number += 1
            picture(folder / "jaffe" / f"{person}.{emotion}1.{number}.tiff", number, place, (256, 256), "L")
            ratings = ["4.50" if i == place else f"{1.5 + 0.1 * i:.2f}" for i in range(6)]
            first.append(f"{number} {' '.join(ratings)} {person}-{emotion}1\n")
            second.append(f"{number} {' '.join(ratings[:5])} {person}-{emotion}1\n")
    (folder / "README_FIRST.txt").write_text(
        "Semantic Ratings Data\n# HAP SAD SUR ANG DIS FEA PIC\n"
        + "".join(first)
        + "Semantic Ratings Data (Fear Excluded)\n# HAP SAD SUR ANG DIS PIC\n"
        + "".join(second)
    )
    return folder


TREES = {
    "": generic,
    "volumes": volumes,
    "breakhis": breakhis,
    "bach": bach,
    "crc_msi": crc_msi,
    "lymphoma": lymphoma,
    "lymphoma_by_image": lymphoma,
    "idrid_retinopathy": idrid,
    "idrid_edema": idrid,
    "idrid_referable": idrid,
    "jaffe": jaffe,
    "jaffe_by_image": jaffe,
}
