"""Writes the table of options into command-line.md, from the parser itself.

python -m docs.make_options
"""

from __future__ import annotations

from pathlib import Path

import tyro

from ddinfer.cli.options import option_groups

PAGE = Path(__file__).parent / "command-line.md"
BEGIN, END = "<!-- options: made by make_options.py -->", "<!-- end of options -->"


def options(group: type) -> list[tuple[str, str]]:
    """(how it is spelt, what it does) for every option of a group, in its order."""
    parser = tyro.extras.get_parser(group, use_underscores=True)
    found = []
    for action in parser._actions:
        if action.dest == "help" or "--help" in action.option_strings:
            continue
        # --no_x stands in the help of its own; the page says once that every switch has one.
        names = [n for n in action.option_strings if not n.startswith("--no_")]
        names.sort(key=len, reverse=True)
        value = "" if action.nargs == 0 or not action.metavar else f" {action.metavar}"
        spelt = ", ".join(f"`{name}{value}`" for name in names)
        text = " ".join((action.help or "").replace("(default: None)", "").split())
        for shown in (" (default: False)", " (sets: True)", " (repeatable)"):
            text = text.replace(shown, "")
        found.append((spelt.replace("|", "\\|"), text.replace("|", "\\|")))
    return found


def table() -> str:
    lines = [BEGIN, ""]
    for group in option_groups().values():
        rows = [f"| {spelt} | {text} |" for spelt, text in options(group)]
        lines += [f"**{group.__doc__}**", "", "| option | |", "|---|---|", *rows, ""]
    return "\n".join([*lines, END])


def page_with_table(page: str) -> str:
    """The page's text with the table between its marks renewed."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + table() + tail


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
