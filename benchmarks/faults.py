"""How many planted faults the audit finds, and how much of what it finds is one.

    python benchmarks/faults.py twins FOLDER [--sheet PAIRS.png]
    python benchmarks/faults.py mislabels FOLDER [--size 192] [--seeds 1]

`twins` plants copies of 500 pictures of FOLDER (class folders, or split folders with class folders) in a
temporary folder, each in four ways: JPEG quality 40, a crop of 80 % of each side at a random place, mirrored,
resized by 0.5 to 2. Pairs of pictures that nobody planted are counted apart and drawn into a contact sheet: a
person must say whether they are the same picture. `mislabels` gives 5 % of the pictures the label of another
class. FOLDER is only read. Prints JSON.
"""

import argparse
import io
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from automl_cv.cache import Images, decode_rows
from automl_cv.copies import set_copies_aside
from automl_cv.data import encode_targets
from automl_cv.pixels import Policy, decode
from automl_cv.review import out_of_fold, project, rank_mislabels, review_features
from automl_cv.scan import scan
from automl_cv.sources import open_source
from automl_cv.twins import find_pairs, group_pairs

CHANGES = ("quality_40", "crop_80", "mirrored", "resized")
BASES, SHARE = 500, 0.05


def change(image: Image.Image, kind: str, random: np.random.Generator) -> bytes:
    """Return a changed copy of a picture as JPEG."""
    width, height = image.size
    if kind == "crop_80":
        w, h = round(0.8 * width), round(0.8 * height)
        left, top = random.integers(0, width - w + 1), random.integers(0, height - h + 1)
        image = image.crop((left, top, left + w, top + h))
    elif kind == "mirrored":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    elif kind == "resized":
        scale = random.uniform(0.5, 2)
        image = image.resize((round(scale * width), round(scale * height)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40 if kind == "quality_40" else 90)
    return file.getvalue()


def read_manifest(url: str) -> tuple[pd.DataFrame, dict]:
    """Scan a source, copies set aside, and return its items by name too."""
    source = open_source(url)
    manifest, items = set_copies_aside(scan(source)), source.by_name()
    return manifest, items


def plant_copies(items: dict, manifest: pd.DataFrame, folder: Path) -> dict[str, tuple[str, str]]:
    """Link all used pictures into a folder, add changed copies, and return copy: (original, change)."""
    random, planted = np.random.default_rng(0), {}
    used = manifest[(manifest.status == "used") & (manifest.split != "unlabelled")]
    for path in used.path:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(items[path].read())
    for path in random.permutation(used.path.to_list())[:BASES]:
        for kind in CHANGES:
            copy = str(Path(path).with_name(f"{Path(path).stem}_{kind}.jpg"))
            (folder / copy).write_bytes(change(decode(items[path].read())[0], kind, random))
            planted[copy] = path, kind
    return planted


def draw_pairs(pairs: list, items: dict, path: Path) -> None:
    """Paste pairs of pictures side by side."""
    sheet = Image.new("RGB", (6 * 216, 104 * -(-len(pairs) // 6)), "white")
    for i, pair in enumerate(pairs):
        for k, name in enumerate((pair.first, pair.second)):
            picture = decode(items[name].read())[0].resize((100, 100))
            sheet.paste(picture, (i % 6 * 216 + 100 * k, i // 6 * 104))
    sheet.save(path)


def measure_twins(url: str, sheet: str) -> dict:
    """Plant copies and look for them."""
    manifest, items = read_manifest(url)
    with tempfile.TemporaryDirectory() as folder:
        planted = plant_copies(items, manifest, Path(folder))
        manifest, items = read_manifest(folder)
        started = time.monotonic()
        pairs = find_pairs(manifest, lambda name: items[name].read())
        seconds = time.monotonic() - started
        natural = [pair for pair in pairs if pair.first not in planted and pair.second not in planted]
        if sheet and natural:
            draw_pairs(natural, items, Path(sheet))
    family = {name: planted.get(name, (name,))[0] for name in manifest.path}
    one_scene = {name: i for i, names in enumerate(group_pairs(natural)) for name in names}
    scene = {name: one_scene.get(original, original) for name, original in family.items()}
    group = {name: i for i, names in enumerate(group_pairs(pairs)) for name in names}
    found = {copy: copy in group and group[copy] == group.get(original)
             for copy, (original, _) in planted.items()}
    others = [pair for pair in pairs if pair not in natural]
    wrong = [pair for pair in others if scene[pair.first] != scene[pair.second]]
    right = sum(family[pair.first] == family[pair.second] for pair in others)
    return {"pictures": len(manifest), "planted": len(planted), "seconds": round(seconds, 1),
            "recall": {kind: sum(found[c] for c, (_, k) in planted.items() if k == kind) / BASES
                       for kind in CHANGES},
            "precision": round(1 - len(wrong) / len(others), 4), "pairs": len(pairs),
            "pairs_not_planted": len(natural),
            "precision_if_all_of_those_were_wrong": round(right / len(pairs), 4)}


def measure_mislabels(url: str, size: int, backbone: str, seeds: int) -> dict:
    """Give 5 % of the pictures a wrong label and look for them."""
    manifest = set_copies_aside(scan(open_source(url)))
    rows, policy = manifest[manifest.status == "used"].reset_index(drop=True), Policy(size, size)
    images, classes = Images(decode_rows(url, rows, policy), np.zeros(len(rows))), sorted(set(rows.label))
    started = time.monotonic()
    features, weak = review_features(images, backbone)
    extraction, results, points = time.monotonic() - started, [], project(features)
    for seed in range(seeds):
        random, targets = np.random.default_rng(seed), encode_targets(rows.label, classes).copy()
        wrong = random.permutation(len(rows))[:round(SHARE * len(rows))]
        targets[wrong] = (targets[wrong] + random.integers(1, len(classes), len(wrong))) % len(classes)
        started = time.monotonic()
        listed = rank_mislabels(out_of_fold(points, targets, np.arange(len(rows)), len(classes)), targets)
        hits = np.isin(listed, wrong).sum()
        results.append({"seed": seed, "planted": len(wrong), "listed": len(listed),
                        "precision": round(hits / len(listed), 4), "recall": round(hits / len(wrong), 4),
                        "seconds": round(time.monotonic() - started, 1)})
    return {"pictures": len(rows), "size": size, "weak": weak, "extraction_seconds": round(extraction, 1),
            "results": results}


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["twins", "mislabels"])
    parser.add_argument("folder")
    parser.add_argument("--sheet", default="")
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    result = measure_twins(given.folder, given.sheet) if given.what == "twins" else \
        measure_mislabels(given.folder, given.size, given.backbone, given.seeds)
    result["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(result, indent=2))
