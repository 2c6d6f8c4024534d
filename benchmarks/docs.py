"""Write docs/benchmarks.md, and the section "Measured" of other pages of docs/, from benchmarks/results/*.json; with --check, fail if
they are not up to date."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import (
    COMPRESSION,
    FSSDP,
    RELIABILITY,
    ROUTERS,
    Sections,
    section,
    with_section,
)
from benchmarks.results import RESULTS, ROOT, cell_text, tables

PAGE = ROOT / "docs" / "benchmarks.md"
MEASURED_PAGES: Mapping[str, tuple[str, Sections]] = {
    "reliability": ("reliability", RELIABILITY),
    "routers": ("routers", ROUTERS),
    "compression": ("compression", COMPRESSION),
    "placement": ("fssdp", FSSDP),
}
"""Pages of docs/ with a section of a benchmark's."""

INTRODUCTION = """\
# Benchmarks

Written by `make docs` from `benchmarks/results/*.json`; change neither by hand. Repeat a figure with its
command, all of them with `make bench`, those of a GPU with `make gpu`. Machines are shared and noisy:
compare figures of one result with each other, not across results from different machines.
"""


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """The whole page, in Markdown. Pure: the same results give the same text."""
    parts = [INTRODUCTION]
    if records:
        overview = [
            {"benchmark": f"[{record['name']}](#{record['name']})", "figure": key, "value": value}
            for record in records
            for key, value in record["headline"].items()
        ]
        parts.append(_table(overview))
    else:
        parts.append("No results yet.\n")
    parts.extend(_section(record) for record in records)
    return "\n".join(parts)


def measured_page(page_name: str, text: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The page as it is, with what its benchmark has measured. Pure."""
    name, sections = MEASURED_PAGES[page_name]
    record = next((record for record in records if record["name"] == name), None)
    return with_section(text, section(name, sections, record, _table, _where, tables, _source))


def _section(record: Mapping[str, Any]) -> str:
    parts = [
        f"## {record['name']}\n",
        f"    {record['command']}\n",
        f"{_where(record['env'])}\n",
    ]
    for rows in tables(record["rows"]):
        parts += [*_source(record, rows), _table(rows)]
    return "\n".join(parts)


def _source(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What gave this table, where it is not what gave the others."""
    source = record.get("sources", {}).get(next(iter(rows[0])))
    return [f"`{source['command']}`. {_where(source['env'])}\n"] if source else []


def _where(env: Mapping[str, Any]) -> str:
    """Machine, software and commit in one line."""
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    gpus = (
        f"{len(env['gpus'])} x {env['gpus'][0]} (driver {env['driver']})"
        if env["gpus"]
        else "no GPU"
    )
    commit = env["commit"][:12] if env["commit"] else "no commit recorded"
    return (
        f"{env['cpu']}, {env['cores']} cores, {env['memory_gib']} GiB, {gpus}; {env['os']}, Python {env['python']}; "
        f"moesys {env['moesys']}, {packages}; {env['date'][:10]}, "
        f"{commit}{' with local changes' if env['dirty'] else ''}."
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(row[c]) for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    return cell_text(value).replace("|", "\\|").replace("\n", " ")


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every result in `folder`, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 if the page is stale"
    )
    check = parser.parse_args().check
    records = read_results()
    pages = {PAGE: page(records)}
    for name in MEASURED_PAGES:
        path = ROOT / "docs" / f"{name}.md"
        if path.exists():
            pages[path] = measured_page(name, path.read_text(), records)
    stale = {path: text for path, text in pages.items() if not _says(path, text)}
    for path, text in stale.items():
        name = path.relative_to(ROOT)
        if check:
            print(f"{name} is not what benchmarks/results says: run `make docs`", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            beside = path.with_suffix(".md.tmp")
            beside.write_text(text)
            os.replace(beside, path)
            print(f"wrote {name}")
    return int(check and bool(stale))


def _says(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main())
