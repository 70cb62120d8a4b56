"""Documentation that is wrong fails: its options, links and commands are held against the code."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from ddinfer.cli import COMMANDS
from ddinfer.cli.options import parse_config

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")
FENCE = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def make_options():
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs/make_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:get_parser")
def test_the_page_of_options_is_what_the_parser_takes():
    maker = make_options()
    page = maker.PAGE.read_text(encoding="utf-8")
    assert page == maker.page_with_table(page), "run: python docs/make_options.py"
    assert page.count("| `--") > 30


def test_every_command_stands_on_the_page_of_the_command_line():
    page = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert re.search(rf"^    ddinfer \[?{name}\b", page, re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


CODE_BLOCK = re.compile(r"```\w+\n.*?```", re.DOTALL)


@pytest.mark.parametrize("language", ["zh", "ko"])
def test_the_translated_quickstart_has_the_code_of_the_english_one(language):
    english = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")
    translated = (ROOT / "docs" / language / "getting-started.md").read_text(encoding="utf-8")
    assert len(CODE_BLOCK.findall(english)) > 5
    assert CODE_BLOCK.findall(translated) == CODE_BLOCK.findall(english)


def job_commands():
    """(page, argv) of every command in the pages that runs a job."""
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "ddinfer/main.py" in words:
                    found.append((page.name, words[words.index("ddinfer/main.py") + 1 :]))
                elif words[:1] == ["ddinfer"] and words[1:2] and words[1].startswith("-"):
                    found.append((page.name, words[1:]))
    return found


def test_commands_in_the_pages_are_understood_by_the_parser():
    commands = job_commands()
    assert len(commands) > 5
    for page, words in commands:
        try:
            parse_config([word for word in words if word != "…"], {})
        except SystemExit as error:
            pytest.fail(f"{page}: {' '.join(words)}: exit {error.code}")


def test_what_the_readme_names_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in re.findall(r"^(launch/\w+)", readme, re.MULTILINE):
        assert (ROOT / script).exists(), script
    import ddinfer

    for name in re.findall(r"ddinfer\.(\w+)\(", readme):
        assert hasattr(ddinfer, name), name
