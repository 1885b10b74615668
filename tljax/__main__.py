"""The command line: one verb each, thin."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from tljax.preemption import AGAIN, Preempted, Signals

EXAMPLES = """examples:
  tljax train --config=configs/digits.py --workdir=runs/digits
  tljax train --config=configs/fashion_dinov2.py:lora --workdir=runs/lora --config.optim.lr=1e-3
  tljax sweep --config=configs/fashion_dinov2.py:probe --lr=1e-3,1e-2 --workdir=runs/probe
  tljax eval runs/lora --data=fashion
  tljax predict runs/lora photos/ --out=preds.jsonl
  tljax export runs/digits exported --to=timm
"""


def make_parser() -> argparse.ArgumentParser:
    """Describe the verbs and their options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "tljax", description="Transfer learning in JAX.", epilog=EXAMPLES, formatter_class=formatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks of input errors")
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument(
        "--config",
        required=True,
        metavar="FILE[:WORD]",
        help="a Python file with get_config(); WORD is its argument, mostly a strategy; or a run's "
        "run.json, to train it again; change any key with --config.KEY=VALUE",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add = lambda name, text, *parents: verbs.add_parser(  # noqa: E731 - one line a verb
        name, help=text, description=text, parents=[common, *parents]
    )
    train = add("train", "train, or go on with, a run in a folder", config)
    train.add_argument("--workdir", required=True, help="folder of the run, or gs://..")
    inspect = add("inspect", "print the tables and the plan of a config, without training", config)
    inspect.add_argument("--topology", help="plan for TPUs that are elsewhere, such as v5e:2x2")
    sweep = add("sweep", "train many heads on features computed once; keep the best", config)
    sweep.add_argument("--lr", required=True, help="peak learning rates: 1e-3,1e-2")
    sweep.add_argument("--decay", default="0", help="weight decays (default: 0)")
    sweep.add_argument("--read", help="blocks to read: blocks/5,blocks/8 (default: the config's)")
    sweep.add_argument("--workdir", required=True, help="a new folder, of the best run")
    evaluate = add("eval", "evaluate a finished run again, or on other data with the same labels")
    evaluate.add_argument("workdir", help="folder of the run")
    evaluate.add_argument("--data", help="another data set, image folder or text file, or a run's")
    evaluate.add_argument("--split", default="test", choices=("validation", "test"))
    fisher = add("fisher", "estimate a run's Fisher information, for strategy ewc")
    fisher.add_argument("workdir", help="folder of the run")
    fisher.add_argument("--examples", type=int, help="so many of its training examples (all)")
    fisher.add_argument("--labels", default="sampled", help="sampled (default), expected or true")
    soup = add("soup", "average the weights of finished runs into a new one")
    soup.add_argument("out", help="a new folder, of a finished run")
    soup.add_argument("runs", nargs="+", metavar="RUN", help="finished runs")
    soup.add_argument("--weights", type=numbers, help="of the runs: .3,.7 (default: equal)")
    soup.add_argument("--greedy", action="store_true", help="add runs while validation allows it")
    soup.add_argument("--alphas", type=numbers, help="WiSE-FT between two: 0,.25,.5,.75,1")
    predict = add("predict", "label images or texts with a finished run")
    predict.add_argument("workdir", help="folder of the run")
    predict.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files or folders")
    predict.add_argument("--out", default="preds.jsonl", help="JSONL to write")
    export = add("export", "write weights for transformers, timm, PEFT or big_vision")
    export.add_argument("source", help="a run, or whatever tljax.load takes")
    export.add_argument("folder", help="a new folder")
    export.add_argument("--to", default="hf", help="hf, timm, npz or peft (default: hf)")
    export.add_argument("--merge", action="store_true", help="fold LoRA into the kernels")
    export.add_argument("--dtype", help="of the file: float32, bfloat16, float16; as the source")
    export.add_argument("--naming", help="peft: for transformers 5 or 4 (default: 5)")
    export.add_argument("--base", help="peft: name or folder of the base model for the adapter")
    export.add_argument("--tower", help="of a CLIP: vision or text")
    ckpt = add("ckpt", "look into the checkpoints of runs, or remove some")
    words = ckpt.add_subparsers(dest="what", required=True, metavar="WHAT")
    look = lambda name, text: words.add_parser(name, help=text, description=text, parents=[common])  # noqa: E731
    for name, text in (("ls", "list what is saved"), ("verify", "read all of it")):
        look(name, text).add_argument("run", help="folder of the run")
    compare = look("diff", "compare two states leaf by leaf")
    compare.add_argument("one", help="RUN, or RUN@STEP")
    compare.add_argument("other", help="RUN, or RUN@STEP")
    prune = look("prune", "remove all steps but some")
    prune.add_argument("run", help="folder of the run")
    prune.add_argument("--keep", type=int, default=1, help="newest steps that stay (default: 1)")
    prune.add_argument("--best", type=int, default=0, help="best steps that stay (default: 0)")
    demo = add("demo", "adapt real weights to real data by every strategy, and compare")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of results")
    demo.add_argument("--fast", action="store_true", help="a quick check, not a result")
    return parser


def numbers(text: str) -> tuple[float, ...]:
    """Read numbers between commas."""
    return tuple(float(part) for part in text.split(","))


def overrides_of(rest: Sequence[str], verb: str, parser: argparse.ArgumentParser) -> dict[str, str]:
    """Read --config.KEY=VALUE arguments; anything else unknown ends the program."""
    found = {}
    for word in rest:
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not word.startswith("--config.") or not equals:
            parser.error(f"unknown argument {word}; a config key is set by --config.KEY=VALUE")
        if verb not in ("train", "inspect", "sweep"):
            parser.error(f"{word}: {verb} reads the config that the run was trained with")
        found[key] = value
    return found


def run(arguments: argparse.Namespace, overrides: dict[str, str], signals: Signals) -> None:
    """Do what the verb says."""
    # Imported late, so that --help and a misspelt verb answer at once.
    from tljax import inference, plan, train
    from tljax.build import build, precision, read_config
    from tljax.storage import place, to_json

    if arguments.verb in ("train", "inspect"):
        config = read_config(arguments.config, overrides)
        with precision(config):
            if arguments.verb == "train":
                told = arguments.workdir, arguments.command, signals
                print(to_json(train.train(build(config), *told)))
            else:
                topology = arguments.topology
                experiment = build(config, devices=plan.devices_of(topology) if topology else None)
                print(train.tables(experiment))
                compiled = plan.compile_step(experiment)
                cost = plan.cost_of(compiled, config.run.microbatches)
                print(plan.describe(experiment, cost))
    elif arguments.verb == "sweep":
        from tljax import sweep

        lists = sweep.read_lists(arguments.lr, arguments.decay, arguments.read)
        config = read_config(arguments.config, overrides)
        with precision(config):
            best = sweep.sweep(config, *lists, arguments.workdir, arguments.command)
        print(to_json(best))
    elif arguments.verb == "eval":
        scores = inference.evaluate_run(arguments.workdir, arguments.split, arguments.data)
        print(to_json(scores))
    elif arguments.verb == "fisher":
        from tljax.fisher import fisher_run

        print(fisher_run(arguments.workdir, arguments.examples, arguments.labels))
    elif arguments.verb == "soup":
        from tljax.soup import soup

        ways = {name: getattr(arguments, name) for name in ("weights", "greedy", "alphas")}
        print(to_json(soup(arguments.out, arguments.runs, **ways, command=arguments.command)))
    elif arguments.verb == "ckpt":
        from tljax import ckpt

        if arguments.what == "diff":
            print(ckpt.diff(arguments.one, arguments.other))
        elif arguments.what == "prune":
            print(ckpt.prune(arguments.run, max(arguments.keep, 1), arguments.best))
        else:
            print({"ls": ckpt.ls, "verify": ckpt.verify}[arguments.what](arguments.run))
    elif arguments.verb == "predict":
        count = inference.predict_run(arguments.workdir, arguments.paths, arguments.out)
        print(f"{count} predictions in {arguments.out}")
    elif arguments.verb == "export":
        from tljax import exporter, pretrained

        exporter.require_new(place(arguments.folder))
        pre = pretrained.load(arguments.source, tower=arguments.tower)
        print(f"{pre.origin}: {pre.report.totals()}; {pre.verified}")
        names = ("to", "merge", "dtype", "naming", "base")
        options = {name: getattr(arguments, name) for name in names}
        print(f"{exporter.export(pre, arguments.folder, **options)}: read again, same outputs")
    else:
        from tljax import demo

        demo.run(arguments.out, arguments.fast)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 85 (saved: run it again), 2 for bad input, 1 for failure."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    overrides = overrides_of(rest, arguments.verb, parser)
    arguments.command = shlex.join(["tljax", *(sys.argv[1:] if argv is None else argv)])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # A program that was compiled once starts at once; jax reads this when it is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/tljax/jax"))
    from tljax.types import BadInput, RunFailed

    try:
        with Signals() if arguments.verb == "train" else nullcontext(Signals()) as signals:
            run(arguments, overrides, signals)
    except Preempted as error:
        print(f"tljax: {error}: nothing is lost; the same command goes on", file=sys.stderr)
        return AGAIN
    except Exception as error:
        from tljax.storage import refusals  # late, as above

        if arguments.debug or not isinstance(error, (BadInput, RunFailed, *refusals())):
            raise
        print(f"tljax: {error}", file=sys.stderr)  # what refuses names its file: disk full, ..
        return 2 if isinstance(error, BadInput | FileNotFoundError) else 1
    except KeyboardInterrupt:
        print("tljax: interrupted; a run goes on from its last save", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
