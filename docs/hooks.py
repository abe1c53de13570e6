"""What the site adds to the pages of docs/: the command reference, and the result files that pages link to.

MkDocs calls the functions by their names.
"""

import re
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from chiaroscuro.cli import app

ROOT = Path(__file__).resolve().parent.parent

# The pages in docs/ are read in the repository too, so they link to its files by `../`. On the site these files lie
# at the same path below the site's root.
OUTSIDE = re.compile(r"(?<=\]\()\.\./(?=(?:experiments|recipes)/)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the command reference and the linked results to the files of the site."""
    files.append(File.generated(config, "commands.md", content=command_reference()))
    for page in sorted(Path(config.docs_dir).glob("*.md")):
        for name in re.findall(r"\]\(\.\./((?:experiments|recipes)/[^)#]+)\)", page.read_text("utf-8")):
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to the repository's files at their place on the site."""
    return OUTSIDE.sub("", markdown)


def command_reference() -> str:
    """Write the reference of every command as typer knows it: usage, arguments, options and defaults."""
    group = typer.main.get_group(app)
    reference = get_docs_for_click(obj=group, ctx=typer.Context(group, info_name="chiaroscuro"), name="chiaroscuro")
    reference = reference.replace("# `chiaroscuro`", "# Commands", 1)
    reference = re.sub(r"^\* `--help`: .*\n", "", reference, flags=re.MULTILINE)
    for name, command in group.commands.items():  # the list has each summary cut short
        summary = " ".join((command.help or "").partition("\n\n")[0].split())
        reference = re.sub(
            rf"^\* `{name}`: .*$", f"* [`{name}`](#chiaroscuro-{name}): {summary}", reference, flags=re.M
        )
    return re.sub(r"^Example: (chiaroscuro .*)$", r"```sh\n\1\n```", reference, flags=re.MULTILINE)
