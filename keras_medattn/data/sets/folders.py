"""Sets that come as a folder a class: BACH, Kather's CRC-MSI tiles, the three lymphomas."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from keras_medattn.data.manifest import Manifest, ManifestError, places
from keras_medattn.data.sets import common

BACH = ("Normal", "Benign", "InSitu", "Invasive")
MSI = ("MSS", "MSIMUT")
LYMPHOMAS = ("CLL", "FL", "MCL")
MOVED = 0.02  # of the test tiles that Li et al. moved to the training side


def bach(root: Path) -> common.Found:
    """Read `ICIAR2018_BACH_Challenge/Photos/{Normal,Benign,InSitu,Invasive}/*.tif`: 400 breast sections.

    The set names no patients. Where `microscopy_ground_truth.csv` lies beside the folders, it must say the
    same.
    """
    folder = common.home(root, ("ICIAR2018_BACH_Challenge", "Photos"), BACH)
    manifest, matches, ignored = _classes(
        root, {name: [folder / name] for name in BACH}, r"(n|b|is|iv)\d+\.tif"
    )
    notes = common.counted(len(manifest), 400, ignored)
    truth = folder / "microscopy_ground_truth.csv"
    if not truth.is_file():
        return common.Found(manifest, (*notes, f"{truth.name} is not there; the folders give the labels"))
    with open(truth, newline="", encoding="utf-8-sig") as file:
        listed = {row[0].strip(): row[1].strip() for row in csv.reader(file) if len(row) > 1}
    there = {match.string: BACH[label] for match, label in zip(matches, manifest.labels, strict=True)}
    absent = sorted(listed.keys() - there.keys())
    others = sorted(name for name in there.keys() & listed.keys() if there[name] != listed[name])
    problems = []
    if absent:
        problems.append(f"{len(absent)} images of {truth.name} are missing: {common.some(absent)}")
    if others:
        problems.append(
            f"{len(others)} images lie in another class than {truth.name} says: {common.some(others)}"
        )
    return common.Found(manifest, tuple(notes), tuple(problems))


def crc_msi(root: Path) -> common.Found:
    """Read `CRC_DX_{TRAIN,TEST}/{MSS,MSIMUT}/blk-*-TCGA-AA-3489-01Z-00-DX1.png` (zenodo 2530835).

    A class of a side may also lie in a folder of its own, `CRC_DX_TRAIN_MSS/MSS`, as its archive unpacks.
    The patient is the TCGA barcode. The MIMS paper moved 2% of the test tiles to the training side; here
    whole patients are moved, in an order fixed once, while a class's tiles stay within 2%, so that
    no patient stands on two sides. The column `distributed` has the side as distributed.
    """
    if not root.is_dir():
        raise ManifestError(f"{root}: no such folder")
    name = r"blk-\w+-(TCGA-\w{2}-\w{4})-\w{3}-\w{2}-DX\w+\.png"
    sides = []
    for side in ("train", "test"):
        top = f"CRC_DX_{side.upper()}"
        folders = {label: [root / top / label, root / f"{top}_{label}"] for label in MSI}
        sides.append((side, *_classes(root, folders, name)))
    manifest = Manifest(
        root,
        tuple(name for _, table, _, _ in sides for name in table.names),
        np.concatenate([table.labels for _, table, _, _ in sides]),
        MSI,
        patients=tuple(match[1] for _, _, matches, _ in sides for match in matches),
        columns={"distributed": tuple(side for side, table, _, _ in sides for _ in table.names)},
    )
    manifest, moved = _moved(manifest)
    notes = common.counted(len(manifest), 192_312, [path for *_, ignored in sides for path in ignored])
    return common.Found(manifest, (*notes, moved))


def lymphoma(root: Path) -> common.Found:
    """Read `{CLL,FL,MCL}/sj-05-1396-R3_005.tif`: 374 photographs of three lymphomas (Shamir et al., IICBU).

    The number `sj-05-1396`, of the case, is taken as the patient.
    """
    folder = common.home(root, ("lymphoma",), LYMPHOMAS)
    name = r"(sj-\d+-\d+)-.+\.tif"
    manifest, matches, ignored = _classes(root, {label: [folder / label] for label in LYMPHOMAS}, name)
    patients = tuple(match[1] for match in matches)
    return common.Found(
        replace(manifest, patients=patients), tuple(common.counted(len(manifest), 374, ignored))
    )


def _classes(root: Path, folders: dict[str, list[Path]], name: str):
    """One class after the other, each from the first of its folders that is there."""
    names, labels, matches, ignored = [], [], [], []
    for label, candidates in folders.items():
        folder = next((one for one in candidates if one.is_dir()), None)
        if folder is None:
            raise ManifestError(
                f"{candidates[0]}: no such folder; it holds the class {label}. Unpack the set whole"
            )
        found, other = common.images(folder, re.compile(name, re.IGNORECASE))
        if not found:
            raise ManifestError(
                f"{folder}: no images of the class {label} by the set's names. Unpack it again"
            )
        names += common.relative((path for path, _ in found), root)
        labels += [label] * len(found)
        matches += [match for _, match in found]
        ignored += other
    classes = tuple(folders)
    return Manifest(root, tuple(names), places(labels, classes), classes), matches, ignored


def _moved(manifest: Manifest) -> tuple[Manifest, str]:
    sides = np.array(manifest.columns["distributed"], object)
    patients = np.array(manifest.patients)
    tiles, people = 0, 0
    for label in range(len(manifest.class_names)):
        mine = (manifest.labels == label) & (sides == "test")
        room = MOVED * mine.sum()
        for patient in np.random.default_rng(label).permutation(np.unique(patients[mine])):
            his = (patients == patient) & (sides == "test")
            if his.sum() <= room and (manifest.labels[his] == label).all():
                sides[his] = "train"
                room -= his.sum()
                tiles, people = tiles + his.sum(), people + 1
    share = tiles / max(1, (np.array(manifest.columns["distributed"]) == "test").sum())
    note = f"{tiles} test tiles ({share:.1%}) of {people} patients are moved to the training side"
    return replace(manifest, splits=tuple(sides)), note
