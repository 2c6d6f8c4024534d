"""moesys ckpt upcycle, merge, leave and prune: checkpoints made of others."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesys.cli.byte_progress import ByteProgress, size_text

if TYPE_CHECKING:
    from moesys.grow.part import Part
    from moesys.grow.write import Growth

_OUT = "a new run folder; it begins at step 0, with a new optimizer"


def add_actions(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    grown = "OUT is a run folder with config.yaml: moesys train --config OUT/config.yaml goes on from it. "
    upcycle = actions.add_parser(
        "upcycle",
        help="grow a dense model to experts; without noise it computes the same function",
        description="Every feed-forward becomes experts under a new router with normalised softmax weights. "
        + grown,
        epilog="example: moesys ckpt upcycle runs/dense runs/moe --experts 8 --top-k 2",
    )
    upcycle.add_argument("run", metavar="RUN", type=Path, help="a dense run, or a checkpoint of it")
    upcycle.add_argument("out", metavar="OUT", type=Path, help=_OUT)
    upcycle.add_argument("--experts", metavar="E", type=int, required=True, help="of each layer")
    upcycle.add_argument(
        "--top-k",
        metavar="K",
        type=int,
        required=True,
        help="experts per token; with --split G a multiple of G",
    )
    upcycle.add_argument(
        "--split",
        metavar="G",
        type=int,
        default=1,
        help="cut each feed-forward into G narrower experts (default: 1)",
    )
    upcycle.add_argument(
        "--drop-share",
        metavar="R",
        type=float,
        default=0.0,
        help="hidden units of each expert that are drawn anew, 0.5 in Drop-Upcycling (default: 0)",
    )
    upcycle.add_argument(
        "--noise",
        metavar="S",
        type=float,
        default=0.0,
        help="deviations of a weight matrix that are added to it (default: 0)",
    )
    upcycle.add_argument(
        "--dense-layers",
        metavar="N",
        type=int,
        default=0,
        help="the first N layers stay dense (default: 0)",
    )

    merge = actions.add_parser(
        "merge",
        help="several runs into one MoE: their experts side by side",
        description="average: MoEs, all but experts and router rows averaged (AoE). btx: dense models, whose "
        "feed-forwards become experts under a new router (Branch-Train-Mix). bam: their attentions too. flexolmo: MoEs that share all "
        "but experts and router rows with the first, the public one; each can leave again. "
        + grown,
        epilog="example: moesys ckpt merge runs/all base=runs/public runs/math runs/code --method flexolmo",
    )
    merge.add_argument("out", metavar="OUT", type=Path, help=_OUT)
    merge.add_argument(
        "parts", metavar="[NAME=]RUN", nargs="+", help="named as run.name, or as written here"
    )
    merge.add_argument("--method", choices=("average", "btx", "bam", "flexolmo"), required=True)
    merge.add_argument(
        "--top-k",
        metavar="K",
        type=int,
        help="experts per token (default: the parts'; btx, bam: 2)",
    )
    merge.add_argument(
        "--shared-kv", action="store_true", help="bam: one averaged set of keys and values"
    )

    leave = actions.add_parser(
        "leave",
        help="take a part's experts out of a flexolmo merge",
        description="What is left is bit for bit the merge of the others. " + grown,
        epilog="example: moesys ckpt leave runs/all runs/without_math --part math",
    )
    leave.add_argument("run", metavar="RUN", type=Path, help="a merge by flexolmo")
    leave.add_argument("out", metavar="OUT", type=Path, help=_OUT)
    leave.add_argument("--part", metavar="NAME", required=True, help="the part that leaves")
    leave.add_argument(
        "--top-k", metavar="K", type=int, help="experts per token (default: as before)"
    )

    prune = actions.add_parser(
        "prune",
        help="keep the experts that a sample uses most",
        description="The sample is the run's validation data, --data, --text, or the --recorded steps of the run, for "
        "which no model is loaded. " + grown,
        epilog="example: moesys ckpt prune runs/moe runs/small --keep 4 --by premoe --text a.txt",
    )
    prune.add_argument("run", metavar="RUN", type=Path, help="a run with experts")
    prune.add_argument("out", metavar="OUT", type=Path, help=_OUT)
    prune.add_argument("--keep", metavar="N", type=int, required=True, help="experts of each layer")
    prune.add_argument(
        "--by",
        choices=("utilisation", "premoe"),
        default="utilisation",
        help="slots (default), or PreMoE's score: the router's probabilities where it is sure",
    )
    prune.add_argument(
        "--threshold",
        metavar="R",
        type=float,
        default=0.5,
        help="with premoe: the share of a token's weight from which it is sure (default: 0.5)",
    )
    sample = prune.add_mutually_exclusive_group()
    sample.add_argument("--text", metavar="FILE", type=Path, nargs="+", help="UTF-8 texts")
    sample.add_argument("--data", metavar="DIR", type=Path, help="a folder of moesys prep")
    sample.add_argument(
        "--recorded", metavar="STEPS", type=int, help="the loads of its last STEPS recorded steps"
    )
    prune.add_argument(
        "--max-tokens", metavar="N", type=int, default=65536, help="of the sample (default: 65536)"
    )
    for parser in (upcycle, merge):
        parser.add_argument(
            "--seed", type=int, default=0, help="of what is drawn: routers, noise (default: 0)"
        )
    for parser in (upcycle, merge, leave, prune):
        parser.add_argument(
            "--dry-run", action="store_true", help="print what would be made, write nothing"
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from moesys.cli.configuration import import_from_working_folder
    from moesys.grow.write import write_growth

    import_from_working_folder()
    if args.out.exists():
        raise ValueError(f"{args.out} exists: name a new folder")
    makers = {"upcycle": _upcycle, "merge": _merge, "leave": _leave, "prune": _prune}
    growth = makers[args.action](args)
    facts = _facts(growth, args.out)
    if not args.dry_run:
        progress = ByteProgress(args.out.name)
        facts["path"] = str(write_growth(growth, args.out, progress))
        progress.finish()
    if args.json:
        print(json.dumps(facts | {"written": not args.dry_run}, indent=2))
        return 0
    print(f"{args.out}: {_model_line(growth)}")
    for line in _lines(growth):
        print(f"  {line}")
    if args.dry_run:
        from moesys.config.compose import to_yaml

        print(to_yaml(growth.config(args.out)), end="")
        print("# nothing was written (--dry-run)")
    else:
        print(f"  no optimizer state; train it: moesys train --config {args.out}/config.yaml")
    return 0


def _upcycle(args: argparse.Namespace) -> "Growth":
    from moesys.grow.part import open_part
    from moesys.grow.upcycle import Upcycling, upcycle

    how = Upcycling(
        num_experts=args.experts,
        top_k=args.top_k,
        split=args.split,
        drop_share=args.drop_share,
        noise=args.noise,
        num_dense_layers=args.dense_layers,
        seed=args.seed,
    )
    return upcycle(open_part(args.run), how)


def _merge(args: argparse.Namespace) -> "Growth":
    from moesys.grow.merge import merge
    from moesys.grow.part import open_part

    parts = []
    for word in args.parts:
        name, equals, path = word.partition("=")
        parts.append(open_part(Path(path), name) if equals else open_part(Path(word)))
    if args.shared_kv and args.method != "bam":
        raise ValueError(f"--shared-kv has no effect with --method {args.method}: leave it out")
    progress = ByteProgress("comparing")
    growth = merge(
        parts,
        args.method,
        top_k=args.top_k,
        shares_kv=args.shared_kv,
        seed=args.seed,
        on_progress=progress,
    )
    progress.finish()
    return growth


def _leave(args: argparse.Namespace) -> "Growth":
    from moesys.grow.merge import leave
    from moesys.grow.part import open_part

    return leave(open_part(args.run), args.part, args.top_k)


def _prune(args: argparse.Namespace) -> "Growth":
    from moesys.grow.part import open_part
    from moesys.grow.prune import prune

    part = open_part(args.run)
    if part.model.num_dense_layers == part.model.num_layers:
        raise ValueError(f"{args.run} has no MoE layer")
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens {args.max_tokens} must be at least 1")
    if args.recorded is not None and args.by == "premoe":
        raise ValueError(
            "--by premoe needs the model's scores: use --text or --data, not --recorded"
        )
    scores, sample = _scores(args, part)
    return prune(part, scores, args.keep, {"by": args.by, "sample": sample, "scores": scores})


def _scores(args: argparse.Namespace, part: "Part") -> tuple[list[list[float]], str]:
    if args.recorded is not None:
        from moesys.moe.routers.load_replay import recorded_loads

        if args.recorded < 1:
            raise ValueError(f"--recorded {args.recorded} must be at least 1")
        loads_M = [load_SE[-args.recorded :] for load_SE in recorded_loads(str(part.run))]
        return [load_SE.sum(0).tolist() for load_SE in loads_M], f"{len(loads_M[0])} recorded steps"
    from moesys.grow.prune import measured_scores
    from moesys.grow.sample import of_data, of_texts
    from moesys.route.visits import model_of

    if args.text:
        name = ", ".join(map(str, args.text))
        sequences = of_texts(part.config, args.text, args.max_tokens)
    else:
        folders = [args.data] if args.data else [*map(Path, part.config.data.folders.values())]
        name = f"validation data of {', '.join(map(str, folders))}"
        sequences = of_data(part.config, folders, args.max_tokens)
    model, _ = model_of(part.config, part.folder)
    return measured_scores(model, sequences, args.by, args.threshold), name


def _facts(growth: "Growth", out: Path) -> dict[str, Any]:
    from moesys.config.build import to_dict

    return {
        "path": str(out),
        "from": [str(part.folder) for part in growth.parts],
        "parameters": growth.num_parameters,
        "active_parameters": growth.num_active,
        "bytes": growth.num_bytes,
        "origin": growth.origin,
        "model": to_dict(growth.model),
    }


def _model_line(growth: "Growth") -> str:
    model = growth.model
    experts = _number([model.moe_of(layer).num_experts for layer in model.moe_layers])
    return (
        f"{len(model.moe_layers)} of {model.total_layers} layers with {experts} "
        f"expert{'' if experts == '1' else 's'} of width {model.moe.d_expert}, {model.moe.top_k} per token; "
        f"{growth.num_parameters:,} parameters, {growth.num_active:,} active; {size_text(growth.num_bytes)}"
    )


def _lines(growth: "Growth") -> list[str]:
    origin = growth.origin
    if origin["operation"] == "upcycle":
        return []
    lines = [
        f"of {one['name']}: {_number(one['experts'])} in each layer"
        for one in origin.get("parts", ())
    ]
    if lines:
        return lines
    for layer, (kept, scores) in enumerate(zip(origin["kept"], origin["scores"], strict=True)):
        share = sum(scores[e] for e in kept) / max(1e-30, sum(scores))
        lines.append(f"MoE layer {layer}: experts {_ids(kept)} stay, with {share:.1%} of the score")
    return lines


def _number(by_layer: list[int]) -> str:
    return str(by_layer[0]) if len(set(by_layer)) == 1 else f"{min(by_layer)} to {max(by_layer)}"


def _ids(ids: list[int]) -> str:
    if len(ids) > 1 and ids == list(range(ids[0], ids[-1] + 1)):
        return f"{ids[0]} to {ids[-1]}"
    return ", ".join(map(str, ids))
