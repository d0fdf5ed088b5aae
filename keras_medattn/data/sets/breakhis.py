"""BreakHis: breast tumours at four magnifications (Spanhol et al., IEEE TBME 2016), with its five folds."""

from __future__ import annotations

import re
from pathlib import Path

from keras_medattn.data.manifest import Manifest, ManifestError, places
from keras_medattn.data.sets import common

CLASSES = ("benign", "malignant")
SUBTYPES = {
    "A": "adenosis",
    "F": "fibroadenoma",
    "PT": "phyllodes_tumor",
    "TA": "tubular_adenoma",
    "DC": "ductal_carcinoma",
    "LC": "lobular_carcinoma",
    "MC": "mucinous_carcinoma",
    "PC": "papillary_carcinoma",
}
IMAGES = 7786  # 7909 less the 123 of TWICE
TWICE = "SOB_M_DC-14-13412-"  # the photographs of SOB_M_LC-14-13412- once more
_NAME = re.compile(rf"SOB_([BM])_({'|'.join(SUBTYPES)})-(\d\d-\d+[A-Z]*)-(40|100|200|400)-\d+\.png")


def read(root: Path) -> common.Found:
    """Read `BreaKHis_v1/histology_slides/breast/{benign,malignant}/SOB/SUBTYPE/SLIDE/40X/SOB_*.png`.

    The label is benign or malignant; columns `magnification` and `subtype`. A patient is what the set and
    its folds count as one, the slide id (`14-22549AB` and `14-22549CD` are two). One patient's photographs
    stand in the set twice, as ductal and as lobular carcinoma of 14-13412, on two sides of given folds: the
    ductal copy is left out, so that 81 patients are left of the published 82.

    The folds are read from the lists `dsfold1.txt` to `dsfold5.txt` (`name|magnification|fold|train`), or
    from the folders `fold1/{train,test}/40X` that the set's own script makes of them; without them there
    are none.
    """
    folder = common.home(root, ("BreaKHis_v1", "histology_slides", "breast"), CLASSES)
    found, ignored = common.images(folder, _NAME)
    misplaced = [path for path, match in found if _label(match) != path.relative_to(folder).parts[0]]
    found = [(path, match) for path, match in found if path not in set(misplaced)]
    names = {path.name for path, _ in found}
    twice = {name for name in names if name.startswith(TWICE) and name.replace("_DC", "_LC") in names}
    found = [(path, match) for path, match in found if path.name not in twice]
    notes = common.counted(len(found), IMAGES, [*ignored, *misplaced])
    if twice:
        notes.append(
            f"{len(twice)} images {TWICE}*.png are left out: they stand in the set again as lobular carcinoma"
        )
    kept = [path.name for path, _ in found]
    if len(set(kept)) < len(kept):
        raise ManifestError(f"{folder}: an image stands in two folders. Unpack the set again")
    folds, problems = _folds(root, kept, twice)
    if folds is None and not problems:
        notes.append(
            "no fold lists dsfold1.txt to dsfold5.txt: folds are drawn by patient, not the given ones"
        )
    manifest = Manifest(
        root,
        common.relative((path for path, _ in found), root),
        places([_label(match) for _, match in found], CLASSES),
        CLASSES,
        patients=tuple(match[3] for _, match in found),
        folds=folds,
        columns={
            "magnification": tuple(match[4] for _, match in found),
            "subtype": tuple(SUBTYPES[match[2]] for _, match in found),
        },
    )
    return common.Found(manifest, tuple(notes), tuple(problems))


def _label(match: re.Match[str]) -> str:
    return {"B": "benign", "M": "malignant"}[match[1]]


def _folds(root: Path, names: list[str], twice: set[str]):
    """The side of every image in each fold, and what is wrong with them."""
    tables = {path.stem[-1]: _listed(path) for path in root.rglob("dsfold[1-5].txt")}
    tables = tables or {
        path.name[-1]: {
            image.name: side for side in ("train", "test") for image in (path / side).rglob("*.png")
        }
        for path in root.rglob("fold[1-5]")
    }
    if not tables:
        return None, []
    problems = [f"fold {fold} of the given folds is missing" for fold in "12345" if fold not in tables]
    for fold, sides in sorted(tables.items()):
        absent = sorted(sides.keys() - set(names) - twice)
        unlisted = [name for name in names if name not in sides]
        if absent:
            problems.append(f"fold {fold} names {len(absent)} images that are missing: {common.some(absent)}")
        if unlisted:
            problems.append(f"fold {fold} leaves out {len(unlisted)} images: {common.some(unlisted)}")
    if problems:
        return None, problems
    return tuple(tuple(tables[fold][name] for name in names) for fold in "12345"), []


def _listed(path: Path) -> dict[str, str]:
    """A list's side of each image."""
    sides = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        fields = [field.strip() for field in line.split("|")]
        if fields == [""]:
            continue
        if len(fields) != 4 or fields[3] not in ("train", "test"):
            raise ManifestError(
                f"{path}: line {number} must read name|magnification|fold|train or test. Received: {line!r}"
            )
        sides[fields[0]] = fields[3]
    return sides
