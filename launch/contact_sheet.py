"""Puts the images of an output folder on one sheet with their prompts: OUT/sheet.png."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS, CELL, CAPTION, GAP = 4, 192, 40, 12


def contact_sheet(folder: Path) -> Path:
    """Draw the sheet of a finished job; returns its path."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    rows = -(-len(records) // COLUMNS)
    size = (COLUMNS * (CELL + GAP) + GAP, rows * (CELL + CAPTION + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for k, record in enumerate(records):
        x = GAP + (k % COLUMNS) * (CELL + GAP)
        y = GAP + (k // COLUMNS) * (CELL + CAPTION + GAP)
        with Image.open(folder / record["file_name"]) as picture:
            sheet.paste(
                picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y)
            )
        caption = "\n".join(textwrap.wrap(record["prompt"], 30)[:2])
        draw.multiline_text((x, y + CELL + 4), caption, fill="black", font=font)
    target = folder / "sheet.png"
    sheet.save(target)
    return target


if __name__ == "__main__":
    print(contact_sheet(Path(sys.argv[1])))
