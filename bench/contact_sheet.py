"""Draws docs/contact_sheet.png: a few 1-shot tasks of ``glyphs``, a class a column, its support image on top.

    python bench/contact_sheet.py [--data.variant hard] [--out FILE]

Any setting of the project may follow; --split (default test) and --out are this command's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from cxgrad_fast.config import preset
from cxgrad_fast.data import open_pool
from cxgrad_fast.episodes import EpisodeSampler

TASKS, QUERIES, ZOOM, GAP = 4, 4, 2, 4
PAPER, FRAME = 255, (225, 90, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "contact_sheet.png")
    arguments, settings = parser.parse_known_args()
    overrides = dict(zip((word.removeprefix("--") for word in settings[::2]), settings[1::2], strict=True))
    config = preset("glyphs-5w1s", {**overrides, "task.shots": 1, "task.queries": QUERIES})
    pool = open_pool(config, arguments.split)
    rows = EpisodeSampler(pool, config).indices(0, TASKS)  # [tasks, ways, 1 + queries]
    sheet = Image.fromarray(np.concatenate([_task(pool.images[task].numpy()) for task in rows], axis=1))
    sheet.save(arguments.out, optimize=True)
    print(
        f"{arguments.out}: {TASKS} tasks of {pool.source}, split '{pool.split}', {arguments.out.stat().st_size} bytes"
    )


def _task(images: np.ndarray) -> np.ndarray:
    """``[ways, 1 + queries, H, W, 3]`` -> one picture, the support row framed."""
    columns = [np.concatenate([_tile(image, row == 0) for row, image in enumerate(way)], axis=0) for way in images]
    return np.pad(np.concatenate(columns, axis=1), ((GAP, GAP), (GAP, GAP), (0, 0)), constant_values=PAPER)


def _tile(image: np.ndarray, support: bool) -> np.ndarray:
    height, width = (side * ZOOM + GAP for side in image.shape[:2])
    tile = np.full((height + 2 * support, width, 3), FRAME if support else PAPER, dtype=np.uint8)
    edge = GAP // 2
    tile[edge : edge + height - GAP, edge : edge + width - GAP] = image.repeat(ZOOM, 0).repeat(ZOOM, 1)
    tile[height:] = PAPER
    return tile


if __name__ == "__main__":
    main()
