"""moesys prep: text into tokens in the Megatron format, with a manifest. Safe to kill and run again."""

import argparse
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from moesys.data.prepare import DryRun, Prepared

_PLAIN_INTERVAL_S = 5.0
_AGAIN = "the same command goes on from the finished parts"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "prep",
        help="turn text into a data folder to train on",
        description="Tokenise files, folders or JSONL (plain or .gz) into Megatron .bin/.idx files and a "
        "manifest.json. One file or JSONL line is one document. Killed at any point, the same command "
        "goes on from the parts that are done; finished, it does nothing.",
    )
    parser.add_argument(
        "--input",
        metavar="PATH",
        nargs="+",
        required=True,
        help="files, folders (read recursively, without hidden entries), or 'stdlib': the Python standard "
        "library's own sources (./stdlib is a folder of that name)",
    )
    parser.add_argument("--output", metavar="FOLDER", required=True, help="the data folder to make")
    parser.add_argument(
        "--include",
        metavar="GLOB",
        nargs="+",
        default=[],
        help="take only files of a folder whose name or relative path matches, e.g. '*.py' (default: all)",
    )
    parser.add_argument(
        "--jsonl-key",
        metavar="KEY",
        default="text",
        help="where a .jsonl line keeps its text (default: text)",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="a byte-level tokenizer.json (default: train one)"
    )
    parser.add_argument(
        "--vocab-size", metavar="V", type=int, help="of the tokenizer to train (default: 4096)"
    )
    parser.add_argument(
        "--tokenizer-sample-bytes",
        metavar="N",
        type=int,
        default=256 << 20,
        help="train the tokenizer on about this much of a larger corpus (default: 256 MiB)",
    )
    parser.add_argument(
        "--eod-token",
        metavar="TOKEN",
        default="<|endoftext|>",
        help="what --tokenizer calls the end of a document (default: <|endoftext|>)",
    )
    parser.add_argument(
        "--val-fraction",
        metavar="X",
        type=float,
        default=0.02,
        help="share of documents held out, chosen by the hash of their content (default: 0.02)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of that choice (default: 0)"
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes; changes nothing in the output (default: the usable cores)",
    )
    parser.add_argument(
        "--part-bytes",
        metavar="N",
        type=int,
        help="text per unit of work (default: a 256th of the input, between 1 and 64 MiB)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what another prep left in the folder"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read everything, write nothing, say what would be done",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the manifest (or the dry run) as JSON"
    )


def run(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from moesys.data.prepare import dry_run, prepare
    from moesys.data.recipe import PrepArguments

    arguments = PrepArguments(
        inputs=args.input,
        output=args.output,
        include=args.include,
        jsonl_key=args.jsonl_key,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        tokenizer_sample_bytes=args.tokenizer_sample_bytes,
        eod_token=args.eod_token,
        val_fraction=args.val_fraction,
        seed=args.seed,
        part_bytes=args.part_bytes,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    # Progress goes to stderr, so that --json leaves stdout to its reader.
    with BarReporter() if sys.stderr.isatty() else PlainReporter() as reporter:
        if args.dry_run:
            plan = dry_run(arguments, reporter)
            text = json.dumps(asdict(plan), indent=1) if args.json else _describe_plan(plan)
        else:
            began = time.monotonic()
            try:
                prepared = prepare(arguments, reporter)
            except KeyboardInterrupt:
                reporter.line(f"stopped: {_AGAIN}")
                raise
            except OSError as error:  # a full disk, a file that may not be read
                raise ValueError(f"{error}: once that is mended, {_AGAIN}") from error
            text = _describe(prepared, args.output, time.monotonic() - began)
            if args.json:
                text = json.dumps(prepared.manifest.to_json(), indent=1)
    print(text)
    return 0


class PlainReporter:
    """One line per phase, and one every few seconds of it, on stderr."""

    def __enter__(self) -> "PlainReporter":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def phase(self, label: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._label, self._total, self._done, self._start = (
            label,
            total_bytes,
            done_bytes,
            done_bytes,
        )
        self._began = self._printed = time.monotonic()
        self.line(f"{label}: {_megabytes(total_bytes)}")

    def advance(self, count_bytes: int) -> None:
        self._done += count_bytes
        now = time.monotonic()
        if now - self._printed < _PLAIN_INTERVAL_S:
            return
        self._printed = now
        rate = (self._done - self._start) / (now - self._began)
        left_s = (self._total - self._done) / max(rate, 1e-9)
        self.line(
            f"{self._label}: {_megabytes(self._done)} of {_megabytes(self._total)}, "
            f"{100 * self._done / max(1, self._total):.0f}%, {_megabytes(rate)}/s, {left_s:.0f} s left"
        )


class BarReporter:
    """A bar per phase with speed and time left, on a terminal's stderr."""

    _progress: "Progress"
    _task: "TaskID | None" = None

    def __enter__(self) -> "BarReporter":
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def phase(self, label: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._task = self._progress.add_task(label, total=total_bytes, completed=done_bytes)

    def advance(self, count_bytes: int) -> None:
        assert self._task is not None
        self._progress.advance(self._task, count_bytes)


def _describe(prepared: "Prepared", output: str, seconds: float) -> str:
    manifest = prepared.manifest
    rows = [
        f"  {name:6}{split.documents:>12,} documents {split.tokens:>16,} tokens {_megabytes(split.bytes):>12}, "
        f"{split.bytes / split.tokens:.2f} bytes per token"
        for name, split in manifest.splits.items()
    ]
    if prepared.was_finished:
        head = f"{output}: finished before, nothing to do ({seconds:.1f} s)"
    else:
        head = f"{output}: {prepared.num_parts} parts, {prepared.reused_parts} of them from before ({seconds:.1f} s)"
    skipped = _counts({k: v for k, v in manifest.skipped.items() if k != "first"})
    return "\n".join(
        [
            head,
            *rows,
            f"  vocabulary {manifest.tokenizer.vocab_size}; skipped: {skipped}",
            f"  a model without context reaches {manifest.unigram_bits_per_byte:.4f} bits per byte "
            f"(single bytes: {manifest.byte_entropy_bits:.4f})",
        ]
    )


def _describe_plan(plan: "DryRun") -> str:
    rows = [
        f"  {name:6}{plan.documents[name]:>12,} documents {_megabytes(plan.text_bytes[name]):>12}"
        for name in plan.documents
    ]
    return "\n".join(
        [
            f"the output folder: {plan.state}",
            f"{plan.files:,} files, {_megabytes(plan.input_bytes)}, in {plan.parts} parts; skipped: {_counts(plan.skipped)}",
            *rows,
            f"disk: about {_megabytes(plan.disk_bytes)} in the end and twice that while preparing, "
            f"{_megabytes(plan.disk_most_bytes)} if every byte is a token; free: {_megabytes(plan.disk_free_bytes)}",
        ]
    )


def _counts(skipped: dict[str, Any]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items())) or "none"


def _megabytes(count_bytes: float) -> str:
    return f"{count_bytes / 1e6:,.1f} MB"
