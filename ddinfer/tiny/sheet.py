"""A contact sheet of the demo prompts, really drawn: `python -m ddinfer.tiny.sheet FILE.png`.

Prompt k is drawn with seed k, one at a time, as the default job draws it.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from . import DEFAULT, DEMO_PROMPTS, PIPELINES, call_defaults, path
from .evaluate import draw_with, load

_ZOOM, _GAP, _TEXT_HEIGHT, _COLUMNS = 3, 16, 44, 4


def contact_sheet(pictures: list[Image.Image], prompts: list[str]) -> Image.Image:
    """Equal pictures, enlarged without smoothing, four in a row, each above its prompt."""
    width, height = (_ZOOM * side for side in pictures[0].size)
    rows = -(-len(pictures) // _COLUMNS)
    size = (
        _COLUMNS * (width + _GAP) + _GAP,
        rows * (height + _TEXT_HEIGHT + _GAP) + _GAP,
    )
    sheet = Image.new("RGB", size, (236, 236, 240))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for k, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        row, column = divmod(k, _COLUMNS)
        x, y = _GAP + column * (width + _GAP), _GAP + row * (height + _TEXT_HEIGHT + _GAP)
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        lines = "\n".join(textwrap.wrap(prompt, 30))
        pen.multiline_text((x, y + height + 5), lines, fill=(40, 40, 45), font=font)
    return sheet


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ddinfer.tiny.sheet", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--pipeline", choices=PIPELINES, default=DEFAULT)
    parser.add_argument("--weights", type=Path, help="folder of the pipelines (the embedded ones)")
    options = parser.parse_args()
    folder = options.weights / options.pipeline if options.weights else path(options.pipeline)
    pipe, call = load(folder), call_defaults(options.pipeline)
    pictures = [draw_with(pipe, prompt, k, **call) for k, prompt in enumerate(DEMO_PROMPTS)]
    contact_sheet(pictures, list(DEMO_PROMPTS)).save(options.file, optimize=True)


if __name__ == "__main__":
    main()
