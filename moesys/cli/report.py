"""moesys report: one self-contained HTML page about a run, finished or not."""

import argparse
import json
import os
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "report",
        help="make one self-contained HTML page about a run",
        description="Read a run folder (metrics.jsonl and, where present, config.yaml, summary.json and "
        "data_manifest.json) and write one HTML page that needs no network. Works while the run goes on.",
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="the run folder (run.dir)")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="default: RUN/report.html; with --json: stdout"
    )
    parser.add_argument(
        "--json", action="store_true", help="write the run's figures as JSON instead of a page"
    )


def run(args: argparse.Namespace) -> int:
    from moesys.report.run import read_run

    found = read_run(args.run_folder)
    if args.json:
        from moesys.report.figures import figures

        text = json.dumps(figures(found), indent=2)
        if args.output is None:
            print(text)
        else:
            _write(args.output, text + "\n")
        return 0
    from moesys.report.page import render

    path = args.output or args.run_folder / "report.html"
    _write(path, render(found))
    print(path)
    return 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
