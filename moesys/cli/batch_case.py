"""What `moesys plan batch` is asked: read from options, configuration and files, and refused with all reasons at once."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moesys.cli.pipeline import fewest_ranks

if TYPE_CHECKING:
    from moesys.config.schema import RunConfig
    from moesys.plan.batch.cost import BatchCosts
    from moesys.plan.batch.plan import BatchPlan
    from moesys.plan.placement import Integers

_RANKS_OF_LONGEST = 8
_ANY_LENGTH = 1 << 40
_SAID_BY_A_PLAN = ("lengths", "batch_tokens", "longest_tokens", "ranks")

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class BatchCase:
    """A batch, the ranks for it, and what work on them costs."""

    lengths_S: "Integers"
    num_ranks: int
    stages: int
    capacity_tokens: int
    meets: bool
    """Ranks do in every layer, for experts."""
    costs: "BatchCosts"
    block_token_bytes: int
    activation_token_bytes: float
    """Of a token, on a rank of one stage."""
    policies: tuple[str, ...]
    saved: "BatchPlan | None"
    """In the place of policies."""

    @property
    def caption(self) -> str:
        """In a line."""
        tokens, longest = int(self.lengths_S.sum()), int(self.lengths_S.max(initial=0))
        stages = f" of {self.stages} stages" if self.stages > 1 else ""
        return (
            f"{len(self.lengths_S):,} sequences, {tokens:,} tokens, longest {longest:,}; {self.num_ranks:,} ranks{stages}, "
            f"{self.capacity_tokens:,} tokens each, meet in {'every layer' if self.meets else 'rings'}"
        )

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "sequences": len(self.lengths_S),
            "tokens": int(self.lengths_S.sum()),
            "longest_tokens": int(self.lengths_S.max(initial=0)),
            "ranks": self.num_ranks,
            "pp": self.stages,
            "capacity_tokens": self.capacity_tokens,
            "meets_in_every_layer": self.meets,
        }


def read_case(args: argparse.Namespace) -> BatchCase:
    """Raises ValueError with every reason."""
    from moesys.plan.activations import token_bytes
    from moesys.plan.batch.cost import block_token_bytes, costs_of
    from moesys.plan.batch.plan import problems as unfit
    from moesys.plan.batch.policies import POLICIES

    wrong_numbers = [*_wrong_numbers(args)]
    problems = [*wrong_numbers, *_wrong_words(args), *_wrong_files(args)]
    saved = _asked(problems, _saved, args.load) if args.load is not None else None
    ranks = saved.num_ranks if saved is not None else args.ranks
    config = None if wrong_numbers else _asked(problems, _config, args, ranks)
    if config is None or (args.load is not None and saved is None):
        raise ValueError(_told(problems))
    parallel, model = config.parallel, config.model
    num_ranks = ranks or fewest_ranks(config) // (parallel.pp * parallel.tp)
    if saved is None:
        capacity = args.capacity_tokens or config.train.micro_batch_tokens // parallel.cp
        lengths_S = _asked(problems, _lengths, args, config, num_ranks, capacity)
    else:
        lengths_S, capacity = saved.lengths_S, args.capacity_tokens
        found = unfit(saved, capacity or sys.maxsize)
        problems += [f"--load {args.load}: {reason}" for reason in found]
        capacity = capacity or (0 if found else int(saved.tokens_MR().max(initial=0)))
    if lengths_S is None or problems:
        raise ValueError(_told(problems))
    # Ranks of tp share a data rank's tokens, and the heads of its keys.
    costs = costs_of(
        model,
        args.flops_per_s * parallel.tp,
        bytes_per_s=1e9 * args.gbytes_per_s * parallel.tp,
        hop_s=1e-6 * args.hop_us,
        key_bytes=config.train.compute_bytes,
    )
    return BatchCase(
        lengths_S=lengths_S,
        num_ranks=num_ranks,
        stages=parallel.pp,
        capacity_tokens=capacity,
        meets=bool(model.moe_layers or model.memory_layers.layers) and parallel.exchanges_over_data,
        costs=costs,
        block_token_bytes=block_token_bytes(model, config.train.compute_bytes),
        activation_token_bytes=token_bytes(config) / parallel.pp,
        policies=POLICIES if args.policy is None else tuple(args.policy.split(",")),
        saved=saved,
    )


def _asked(problems: list[str], ask: Callable[..., _T], *arguments: Any) -> _T | None:
    """What is asked for; None where the reasons are added to the problems."""
    from moesys.config.errors import ConfigError

    try:
        return ask(*arguments)
    except ConfigError as error:
        problems += map(str, error.problems)
    except ValueError as error:
        problems.append(str(error))
    return None


def _told(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return "".join([f"{len(problems)} problems", *(f"\n  - {problem}" for problem in problems)])


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _wrong_numbers(args: argparse.Namespace) -> Iterator[str]:
    for name in ("batch_tokens", "longest_tokens", "ranks", "pp", "capacity_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            yield f"{_option(name)} {value} must be at least 1"
    for name in ("flops_per_s", "gbytes_per_s"):
        if not 0 < (value := getattr(args, name)) < inf:
            yield f"{_option(name)} {value} must be above 0, and a number"
    if not 0 <= args.hop_us < inf:
        yield f"--hop-us {args.hop_us} must be at least 0, and a number"


def _wrong_words(args: argparse.Namespace) -> Iterator[str]:
    from moesys.config.errors import did_you_mean
    from moesys.plan.batch.policies import POLICIES

    named = args.policy.split(",") if args.policy is not None else []
    for policy in named:
        if policy not in POLICIES:
            yield f"--policy {policy!r} is no planner of batches: {did_you_mean(policy, POLICIES)}"
    if len(set(named)) < len(named):
        yield f"--policy {args.policy} has one twice"
    if args.save is not None and len(named) != 1 and args.load is None:
        yield f"--save {args.save} has room for one plan: name one --policy"
    if args.load is not None:
        for name in (*_SAID_BY_A_PLAN, "policy", "save"):
            if getattr(args, name) is not None:
                yield f"{_option(name)} has no place beside --load: the plan says it"


def _wrong_files(args: argparse.Namespace) -> Iterator[str]:
    for name in ("save", "svg", "html"):
        path: Path | None = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            yield f"{_option(name)} {path}: there is no folder {path.parent}"
        if path is not None and path.is_dir():
            yield f"{_option(name)} {path} is a folder"


def _saved(path: Path) -> "BatchPlan":
    from moesys.plan.batch.plan import BatchPlan

    try:
        return BatchPlan.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--load {path} is no batch plan: {type(error).__name__}: {error}"
        ) from error


def _config(args: argparse.Namespace, ranks: int | None) -> "RunConfig":
    """Checked for these data ranks, of which each has a micro-batch of a sample for each stage: real ones are planned here."""
    from moesys.config.compose import compose
    from moesys.config.validate import validate

    overrides = [*args.overrides, *([f"parallel.pp={args.pp}"] if args.pp is not None else [])]
    config = compose(overrides, args.config_dir)
    parallel = config.parallel
    if parallel.pp > 1 and parallel.pp_schedule != "1f1b":
        raise ValueError(
            f"parallel.pp_schedule={parallel.pp_schedule} is not planned with: use 1f1b"
        )
    world_size = ranks * parallel.pp * parallel.tp if ranks else fewest_ranks(config)
    samples = parallel.pp * world_size // (parallel.pp * parallel.tp * parallel.cp)
    train = replace(
        config.train,
        micro_batch_tokens=config.data.seq_len,
        global_batch_tokens=config.data.seq_len * max(1, samples),
    )
    validate(replace(config, train=train), world_size=world_size)
    return config


def _lengths(
    args: argparse.Namespace, config: "RunConfig", num_ranks: int, capacity_tokens: int
) -> "Integers":
    """Of the batch."""
    from moesys.plan.batch.fit import check_fits
    from moesys.plan.batch.lengths import DISTRIBUTIONS, cut, drawn, first

    tokens = args.batch_tokens or config.train.global_batch_tokens
    if args.lengths in DISTRIBUTIONS:
        longest = args.longest_tokens or min(num_ranks, _RANKS_OF_LONGEST) * capacity_tokens
        lengths_S = drawn(args.lengths, tokens, longest, config.run.seed)
    elif args.lengths is not None:
        lengths_S = _given(args.lengths)
        lengths_S = lengths_S if args.batch_tokens is None else first(lengths_S, tokens)
    else:
        lengths_S = _documents(config, tokens, args.longest_tokens)
    if args.longest_tokens is not None:
        lengths_S = cut(lengths_S, args.longest_tokens)
    try:
        check_fits(lengths_S.tolist(), num_ranks, capacity_tokens)
    except ValueError as error:
        raise ValueError(f"{error} (--longest-tokens, or --ranks and --capacity-tokens)") from error
    return lengths_S


def _given(what: str) -> "Integers":
    """Numbers, or a file of them."""
    import numpy as np

    from moesys.config.errors import did_you_mean
    from moesys.plan.batch.lengths import DISTRIBUTIONS

    text = what
    if not set(what) <= set("0123456789,"):
        try:
            text = Path(what).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--lengths {what} is neither numbers such as 512,64 nor a file nor made up: "
                f"{did_you_mean(what, DISTRIBUTIONS)} ({error})"
            ) from error
    words = text.replace(",", " ").split()
    wrong = [word for word in words if not word.isdecimal() or not 0 < int(word) < 2**40]
    if wrong or not words:
        few = f"{wrong[0]!r} is none" if wrong else "there is none"
        raise ValueError(f"--lengths {what} must be whole numbers of tokens, from 1 on: {few}")
    return np.array([int(word) for word in words], dtype=np.int64)


def _documents(config: "RunConfig", tokens: int, longest: int | None) -> "Integers":
    """Of the run's data, as its first step has them."""
    from moesys.data.indexed import IndexedTokens
    from moesys.data.sequence_order import SequenceOrder
    from moesys.data.source import Source

    data, batch = config.data, config.batch
    order = SequenceOrder(
        [
            Source(name=name, tokens=IndexedTokens(Path(folder) / "train"), weight=weight)
            for (name, folder), weight in zip(data.folders.items(), data.weights, strict=True)
        ],
        longest_tokens=longest or (data.seq_len if batch.is_planned else _ANY_LENGTH),
        global_batch_tokens=tokens,
        seed=config.run.seed,
        shuffle=data.shuffle,
        long_documents=batch.long_documents,
        empty_documents=batch.empty_documents,
    )
    return order.step_from(0).lengths_S
