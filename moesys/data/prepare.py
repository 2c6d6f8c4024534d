"""Prepare a data folder: text in, Megatron .bin/.idx and manifest.json out. Safe to kill and run again.

    OUTPUT/manifest.json   written last: the folder is finished if and only if it is there
    OUTPUT/inputs.json     every input file with its size, time and hash
    OUTPUT/.prep/          while unfinished: plan.json (the identity), tokenizer.json, the parts

A run that finds its own identity (moesys.data.recipe) goes on from the parts that are there; one that
finds another says what differs and stops. The output does not depend on the number of workers, nor on
where the parts were cut (but for the choice of the tokenizer's sample in a corpus larger than it).
"""

import fcntl
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesys.data.assemble import OUTPUT_FILES, EmptySplit, assemble, require_megatron, write_json
from moesys.data.manifest import FILE as MANIFEST
from moesys.data.manifest import DataManifest
from moesys.data.parts import Counts, PartJob, start_worker, tokenise_part
from moesys.data.recipe import PrepArguments, Recipe, Reporter, size_of
from moesys.data.tokenizer import eod_id, load_tokenizer, token_bytes, train_tokenizer

_TYPICAL_BYTES_PER_TOKEN = 3.5
_OTHER = "use another --output, the arguments and inputs it was made with, or --overwrite"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    manifest: DataManifest
    num_parts: int
    reused_parts: int
    """Parts that an earlier run had finished."""
    was_finished: bool
    """There was nothing to do."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What `prepare` would do."""

    state: str
    """What the output folder holds, in words."""
    files: int
    input_bytes: int
    documents: dict[str, int]
    """By split, like text_bytes."""
    text_bytes: dict[str, int]
    skipped: dict[str, int]
    """By reason."""
    parts: int
    disk_bytes: int
    """In the end, if a token stands for 3.5 bytes. Twice this while preparing."""
    disk_most_bytes: int
    """In the end, if every byte is a token."""
    disk_free_bytes: int


def prepare(arguments: PrepArguments, reporter: Reporter) -> Prepared:
    """Make, go on with, or confirm `arguments.output`.

    Raises:
        ValueError: bad arguments or inputs, or the folder holds another prep; says what to do.
    """
    arguments.check()
    folder = _Folder(arguments.output)
    recipe = Recipe(arguments, reporter, folder.listing)
    num_parts = len(recipe.parts)
    folder.path.mkdir(parents=True, exist_ok=True)
    with _lock(folder.path):
        if folder.is_finished(recipe):
            shutil.rmtree(folder.work, ignore_errors=True)
            return Prepared(
                manifest=DataManifest.load(folder.path),
                num_parts=num_parts,
                reused_parts=num_parts,
                was_finished=True,
            )
        require_megatron()
        folder.begin(recipe, reporter)
        tokenizer_path = folder.work / "tokenizer.json"
        if not tokenizer_path.exists():
            _make_tokenizer(recipe, tokenizer_path, reporter)
        jobs = recipe.jobs(tokenizer_path, folder.work)
        missing = [job for job in jobs if not job.path.exists()]
        reused = num_parts - len(missing)
        if reused:
            reporter.line(f"resumed: {reused} of {num_parts} parts were done")
        _tokenise(jobs, missing, arguments.workers, reporter)
        reporter.line("writing .bin and .idx (megatron-core takes some seconds to load)")
        try:
            manifest = assemble(
                jobs,
                folder.path,
                folder.work,
                arguments=recipe.manifest_arguments(),
                identity=recipe.identity,
            )
        except EmptySplit:
            shutil.rmtree(folder.work)  # these parts are no use to any other arguments
            raise
        shutil.rmtree(folder.work)
    return Prepared(manifest=manifest, num_parts=num_parts, reused_parts=reused, was_finished=False)


def dry_run(arguments: PrepArguments, reporter: Reporter) -> DryRun:
    """Read every document once, without tokenising or writing anything.

    Raises:
        ValueError: bad arguments or inputs.
    """
    folder = _Folder(arguments.output)
    recipe = Recipe(arguments, reporter, folder.listing)
    counts = Counts.zero()
    reporter.phase("reading", recipe.total_bytes)
    for pieces in recipe.parts:
        for document, split in recipe.documents(pieces, counts):
            counts.documents[split] += 1
            counts.text_bytes[split] += len(document.text.encode())
        reporter.advance(size_of(pieces))
    documents, text = sum(counts.documents.values()), sum(counts.text_bytes.values())
    vocab_size = arguments.trained_vocab_size
    if arguments.tokenizer is not None:
        vocab_size = token_bytes(load_tokenizer(arguments.tokenizer), arguments.tokenizer).size
    itemsize = 2 if vocab_size < 65500 else 4  # megatron's choice
    index_bytes = documents * (4 + 8 + 8)
    here = folder.path.absolute()
    existing = next(path for path in (here, *here.parents) if path.exists())
    return DryRun(
        state=folder.state(recipe),
        files=len(recipe.files),
        input_bytes=recipe.total_bytes,
        documents=counts.documents,
        text_bytes=counts.text_bytes,
        skipped=counts.skipped,
        parts=len(recipe.parts),
        disk_bytes=round(text / _TYPICAL_BYTES_PER_TOKEN + documents) * itemsize + index_bytes,
        disk_most_bytes=(text + documents) * itemsize + index_bytes,
        disk_free_bytes=shutil.disk_usage(existing).free,
    )


class _Folder:
    """The output folder: whose work it holds, and taking possession of it."""

    def __init__(self, output: str) -> None:
        self.path = Path(output)
        self.work = self.path / ".prep"
        self.listing = _stored_listing(self.path / "inputs.json")
        """Input files of the prep found here, [] if none."""

    def state(self, recipe: Recipe) -> str:
        found = self._identity()
        if found is None:
            return "empty"
        if changes := recipe.changes(found, self.listing):
            return f"another prep ({changes}): needs --overwrite"
        if (self.path / MANIFEST).exists():
            return "finished: nothing to do"
        return f"unfinished, {self._parts_done()} of {len(recipe.parts)} parts done: would go on"

    def is_finished(self, recipe: Recipe) -> bool:
        """This very prep is complete.

        Raises:
            ValueError: finished but damaged, or something else is in the way; never with --overwrite.
        """
        if recipe.arguments.overwrite:
            try:
                return DataManifest.load(self.path).identity == recipe.identity
            except ValueError:
                return False
        if (self.path / MANIFEST).exists():
            identity = DataManifest.load(self.path).identity
            if changes := recipe.changes(identity, self.listing):
                raise ValueError(
                    f"{self.path} holds the prep of something else ({changes}): {_OTHER}"
                )
            return True
        found = self._identity()
        if found is None:
            strangers = [name for name in OUTPUT_FILES if (self.path / name).exists()]
            if strangers:
                names = ", ".join(strangers)
                raise ValueError(f"{self.path} holds {names} without a {MANIFEST}: {_OTHER}")
        elif (changes := recipe.changes(found, self.listing)) and self._parts_done():
            what = f"{self._parts_done()} finished parts of something else ({changes})"
            raise ValueError(f"{self.path} holds {what}: {_OTHER}")
        return False

    def begin(self, recipe: Recipe, reporter: Reporter) -> None:
        """Make the folder this recipe's: what another left is removed, what is ours is kept."""
        found = self._identity()
        if found is not None and (changes := recipe.changes(found, self.listing)):
            reporter.line(f"starting over: {self.path} held another prep ({changes})")
        if found != recipe.identity or (self.path / MANIFEST).exists():
            (self.path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(exist_ok=True)
        for leftover in self.work.glob("*.tmp"):
            leftover.unlink()
        write_json(self.path / "inputs.json", {"files": recipe.listing})
        write_json(self.work / "plan.json", recipe.identity)

    def _identity(self) -> dict[str, Any] | None:
        """Of the prep found here, finished or not; {} if its manifest cannot be read."""
        if (self.path / MANIFEST).exists():
            identity = _read_json(self.path / MANIFEST).get("identity")
            return identity if isinstance(identity, dict) else {}
        return dict(_read_json(self.work / "plan.json")) or None

    def _parts_done(self) -> int:
        return len(list(self.work.glob("part-*.npz")))


def _make_tokenizer(recipe: Recipe, path: Path, reporter: Reporter) -> None:
    """A checked tokenizer.json at `path`: the user's, or one trained on the training documents."""
    arguments = recipe.arguments
    beside = path.with_suffix(".tmp")
    if arguments.tokenizer is not None:
        shutil.copyfile(arguments.tokenizer, beside)
    else:
        parts = recipe.tokenizer_parts()
        reporter.phase("training the tokenizer", sum(map(size_of, parts)))
        texts = _training_texts(recipe, parts, reporter)
        train_tokenizer(texts, arguments.trained_vocab_size).save(str(beside))
    name = arguments.tokenizer or str(path)
    tokenizer = load_tokenizer(str(beside))
    eod_id(tokenizer, arguments.eod_token, name)
    vocab_size = token_bytes(tokenizer, name).size
    if arguments.tokenizer is None and vocab_size < arguments.trained_vocab_size:
        wanted = arguments.trained_vocab_size
        reporter.line(f"the text has pairs for a vocabulary of {vocab_size}, not of {wanted}")
    os.replace(beside, path)


def _training_texts(
    recipe: Recipe, parts: Sequence[Sequence[Any]], reporter: Reporter
) -> Iterator[str]:
    for pieces in parts:
        for document, split in recipe.documents(pieces, Counts.zero()):
            if split == "train":
                yield document.text
        reporter.advance(size_of(pieces))


def _tokenise(
    jobs: Sequence[PartJob], missing: Sequence[PartJob], workers: int, reporter: Reporter
) -> None:
    sizes = [size_of(job.pieces) for job in jobs]
    done_bytes = sum(sizes) - sum(sizes[job.index] for job in missing)
    reporter.phase("tokenising", sum(sizes), done_bytes)
    if not missing:
        return
    others = set(multiprocessing.active_children())
    # spawn: a fork would inherit the tokenizer library's threads in whatever state they are.
    pool = ProcessPoolExecutor(
        min(workers, len(missing)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
    )
    try:
        for future in as_completed([pool.submit(tokenise_part, job) for job in missing]):
            reporter.advance(sizes[future.result()])
    except BaseException as error:
        # A part may take a minute more, and an unfinished one leaves nothing: do not wait.
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        if isinstance(error, BrokenProcessPool):
            fix = "run the same command again with fewer --workers; finished parts are kept"
            raise ValueError(
                f"a worker process was killed, perhaps for lack of memory: {fix}"
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One prep per folder at a time. The kernel lets go when the process dies, however it dies."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait for it, or stop it"
            raise ValueError(f"{folder}: another `moesys prep` is at work here: {fix}") from None
        except OSError:
            pass  # some network file systems have no locks: go without
        yield
    finally:
        os.close(handle)


def _read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; {} if the file is missing or holds none."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _stored_listing(path: Path) -> list[dict[str, Any]]:
    """Recipe.listing as stored; [] if the file is missing or damaged (hashes are then made again)."""
    files = _read_json(path).get("files")
    keys = {"name", "path", "size_bytes", "mtime_ns", "xxh3"}
    if not isinstance(files, list):
        return []
    return files if all(isinstance(f, dict) and keys <= f.keys() for f in files) else []
