"""Prove theorems by N independent passes each, with one model or an ensemble over N_eff (§5.3, C.5, Tables 2 and 6).

    python prove.py --model runs/lean-neff8/epoch-3 --theorems leandojo_benchmark_4/random/test.json --passes 4096
    python prove.py --ensemble --baseline runs/lean-neff1/epoch-3     # the last epoch of each runs/lean-neff*
    python prove.py --ensemble --minif2f test
    RAY_ADDRESS=HOST:6379 python prove.py --ensemble                  # several nodes are just a larger Ray cluster

A pass is a walk: sample one tactic given the proof state, apply it, and so on until a tactic fails, no goal is left or
--max-steps are done. pass@N is the chance that one of N independent passes proves a theorem, and M models with N
passes each have

    pass@N = 1 - Π_m (1 - pass_m@N)        beside which cross-entropy (--baseline) gets M x N passes.

Passes in the same place of the search tree share its work: their next tactics are sampled in one request, and each
distinct tactic is applied once, in a Lean process that a Ray worker keeps on a CPU core; vLLM samples for all theorems
in flight. A place is a path, as equal texts need not be equal states. A pass counts if its own path, applied from the
start in a fresh environment (one for all of a theorem's proofs), proves it without sorry, admit or native_decide.

A theorem's time (--time-limit) is that of its own tactics and its share of sampling, never waiting. It is looked at
between blocks of --block passes, so that slow passes are not left out: see `unbiased_pass_at_n`. The paper's number
counts passes that had not ended in time as failures; tables show it, and the unbiased one where it differs. (A block
that goes on for twice the time, and 20 tactics' time-outs beyond it, is left; if it is the first, nothing is known.)

In --out it writes a line of JSON a theorem and model as soon as it ends (a run that is started again goes on from
there), prove.json with all estimates, the tables as Markdown on standard output, and success.png.
"""

import argparse
import atexit
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

# The settings that take the place of the defaults when the model is one of examples/: there, a larger block costs
# hardly any more, and its tactics take no time.
EXAMPLE_SETTINGS = {"engine": "transformers", "block": 4096}
TABLE_NS = "16,64,256,1024,4096"
MINIF2F = "https://github.com/yangky11/miniF2F-lean4", "be17324"  # its commit for Lean 4.20, as far as it is given
UNTRUSTED = re.compile(
    r"\b(sorry\w*|admit|native_decide|bv_decide|ofReduce\w+|trustCompiler)\b|\+\s*native|\bnative\s*:=|\x7f"
)
LONGEST_REQUEST = 4000  # bytes; a pty takes no line above 4,095
BROKEN = ("timeout", "crash")  # outcomes that say nothing of the tactic yet
BRANCHING_PASSES = 64  # branching is measured at states that at least so many passes have come to


def parse_arguments(argv=None, settings=None):
    """argparse and the checks that need nothing but the arguments. settings: defaults in place of those here."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--model CKPT | --ensemble [CKPT ...]] [--flag VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("who proves what")
    what.add_argument("--model", nargs="+", metavar="CKPT", default=[], help="checkpoints of train_lean_step.py")
    what.add_argument("--ensemble", nargs="*", metavar="CKPT", help="and their ensemble (default: runs/lean-neff*)")
    what.add_argument("--baseline", metavar="CKPT", help="M times the passes for M models (paper: CE, 20k for 5 x 4k)")
    what.add_argument("--theorems", type=Path, help="a file of LeanDojo's benchmark (paper: its random test.json)")
    what.add_argument("--minif2f", choices=["test", "valid", "both"], help="in place of --theorems (paper: test)")
    what.add_argument("--only-untraced", action="store_true", help="theorems without a trace (paper: expert iteration)")
    what.add_argument("--max-theorems", type=int, help="the first so many only")
    search = parser.add_argument_group("the search")
    search.add_argument("--passes", type=int, default=4096, help="a theorem and model (paper: 4096; 1024 to iterate)")
    search.add_argument("--ns", help=f"the table's N, by commas (paper: {TABLE_NS}; up to --passes)")
    search.add_argument("--max-steps", type=int, default=50, help="of a pass (paper: 50)")
    search.add_argument("--time-limit", type=float, help="seconds a theorem (paper: 5000 at 4k passes)")
    search.add_argument("--tactic-timeout", type=float, default=30, help="seconds a tactic")
    search.add_argument("--start-timeout", type=float, default=300, help="seconds until a theorem's first state")
    search.add_argument("--block", type=int, default=256, help="passes between two looks at the clock")
    search.add_argument("--merge", choices=["path", "text"], default="path", help="what makes two passes' states one")
    search.add_argument("--stop-at-first", action="store_true", help="one proof of a theorem is enough")
    search.add_argument("--seed", type=int, default=0)
    lean = parser.add_argument_group("Lean")
    lean.add_argument("--dojo", metavar="MODULE:CLASS", help="the environment (default: lean_dojo:Dojo)")
    lean.add_argument("--workers", type=int, help="theorems at a time, each in a Lean process (default: CPU cores)")
    sampling = parser.add_argument_group("sampling, at temperature 1 as in the paper")
    sampling.add_argument("--engine", default="auto", choices=["auto", "vllm", "transformers"], help="what samples")
    sampling.add_argument("--gpu-memory", type=float, default=0.85, help="vLLM's share of each GPU")
    sampling.add_argument("--gpus-per-engine", type=int, default=1)
    sampling.add_argument("--max-new-tokens", type=int, help="of a tactic (default: the checkpoint's)")
    where = parser.add_argument_group("what is written")
    where.add_argument("--out", type=Path, help="default: runs/prove-<folder>-<file> of the theorems")
    where.add_argument("--save-proofs", type=Path, metavar="FILE", help="proofs, for train_lean_step.py --extra")
    parser.set_defaults(**settings or {})
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and name != "seed" and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {value}")
    try:
        default = [n for n in map(int, TABLE_NS.split(",")) if n <= args.passes] or [args.passes]
        args.ns = sorted({int(n) for n in args.ns.split(",")}) if args.ns else default
    except ValueError:
        parser.error(f"--ns takes whole numbers separated by commas, not {args.ns!r}")
    if args.ns[0] < 1 or args.ns[-1] > args.passes:
        parser.error(f"--ns must lie between 1 and --passes ({args.passes}), for which there are estimates")
    if args.model and args.ensemble is not None:
        parser.error("give either --model or --ensemble")
    if args.theorems and args.minif2f:
        parser.error("give either --theorems or --minif2f")
    if args.dojo and not re.fullmatch(r"[\w.]+:\w+", args.dojo):
        parser.error(f"--dojo takes MODULE:CLASS, lean_dojo:Dojo for instance, not {args.dojo}")
    args.block = min(args.block, args.passes)
    args.ns = [args.passes] if args.stop_at_first else args.ns
    args.time_limit = args.time_limit or 5000 * args.passes / 4096
    return args


def main(argv=None):
    args = parse_arguments(argv)

    import common

    # Whatever can be refused is refused here: theorems, environment, checkpoints, and what --out holds already.
    models = choose_models(args)
    if all(map(common.is_example, models)):
        args = parse_arguments(argv, EXAMPLE_SETTINGS)
    theorems = choose_theorems(args)
    check_environment(args, theorems)
    runs = [(model, 1) for model in models] + ([(args.baseline, len(models))] if args.baseline else [])
    args.engine = common.choose_engine(args.engine)
    tokenizers = {checkpoint: common.load_tokenizer(checkpoint) for checkpoint, _ in runs}
    name = (
        f"{args.theorems.absolute().parent.name}-{args.theorems.stem}" if args.theorems else f"minif2f-{args.minif2f}"
    )
    args.out = args.out or Path(f"runs/prove-{name}{'-untraced' * args.only_untraced}")
    paths = start_out(args, theorems, runs)
    accelerator = common.make_accelerator()
    if accelerator.num_processes > 1:
        common.refuse("prove.py is one process, whose engines take all GPUs: start it with python, not accelerate")
    print(
        f"{len(theorems):,} theorems, {args.passes:,} passes each of {args.max_steps} steps at most, by {args.merge}\n"
        f"  models  {', '.join(models)}{f'; {args.baseline} {len(models)} x the passes' * bool(args.baseline)}\n"
        f"  time    {args.time_limit:,.6g} s a theorem and {args.passes:,} passes, {args.tactic_timeout:g} s a tactic\n"
        f"  Lean    {args.dojo}, sampling by {args.engine}, blocks of {args.block}, seed {args.seed}\n"
        f"  out     {args.out}",
        flush=True,
    )
    for checkpoint, times in runs:
        path, results = paths[checkpoint, times], results_in(paths[checkpoint, times])
        again = {result["id"] for result in results if result["status"] == "not started"}  # after all others
        tried = {result["id"] for result in results}
        left = [theorem for theorem in theorems if theorem["id"] not in tried]
        left += [theorem for theorem in theorems if theorem["id"] in again]
        if left:
            prove_all(args, accelerator, checkpoint, tokenizers[checkpoint], times, left, path, bool(tried - again))
    report(args, [(*run, results_in(paths[run])) for run in runs], theorems)


# ---- What is proved, by whom, where ----------------------------------------------------------------------------------


def results_in(path: Path) -> list[dict]:
    """A file's results, after all but the last one of each theorem have been removed from it."""
    import common

    lines = common.read_whole_lines(path)
    results = [*{result["id"]: result for result in lines}.values()]
    if len(results) < len(lines):
        common.write_whole(path, "".join(json.dumps(result) + "\n" for result in results))
    return results


def choose_theorems(args) -> list[dict]:
    import common

    embedded = common.EXAMPLES / "propositional/test.json"
    if not args.theorems and not args.minif2f:
        default = Path("leandojo_benchmark_4/random/test.json")
        args.theorems = default if default.exists() else Path(common.relative(embedded))
        print(f"{'' if default.exists() else f'no {default} here: '}taking --theorems {args.theorems}", flush=True)
    theorems = minif2f_theorems(args.minif2f) if args.minif2f else common.load_theorems(args.theorems)
    own = args.theorems and args.theorems.resolve().is_relative_to(embedded.parent)
    args.dojo = args.dojo or ("examples.propositional.environment:Dojo" if own else "lean_dojo:Dojo")
    theorems = [theorem | {"id": i} for i, theorem in enumerate(theorems)]
    theorems = [theorem for theorem in theorems if not (args.only_untraced and theorem.get("traced_tactics"))]
    if not theorems:
        common.refuse(f"{args.theorems}: there is no theorem{' without a trace' * args.only_untraced} in it")
    return theorems[: args.max_theorems]


def minif2f_theorems(split: str) -> list[dict]:
    """MiniF2F's, by their names in its files, which are in LeanDojo's cache once the repository is traced."""
    import common

    (url, commit), theorems = MINIF2F, []
    cache = Path(os.environ.get("CACHE_DIR", Path.home() / ".cache/lean_dojo"))
    found = sorted(cache.glob(f"*-{Path(url).name}-{commit}*/{Path(url).name}"))
    if not found:
        common.refuse(
            f"MiniF2F is not in LeanDojo's cache {cache}: with git, Lean (lake on PATH), network and a "
            "GITHUB_ACCESS_TOKEN, once (some hours)\n"
            f"    python -c \"from lean_dojo import *; trace(LeanGitRepo('{url}', '{commit}'))\""
        )
    for name in {"test": ["Test"], "valid": ["Valid"], "both": ["Test", "Valid"]}[split]:
        file = Path("MiniF2F") / f"{name}.lean"
        names = re.findall(r"^\s*theorem\s+([^\s:({\[]+)", (found[0] / file).read_text(), re.MULTILINE)
        place = {"url": url, "commit": found[0].parent.name.rpartition("-")[2], "file_path": str(file)}
        place["unproved"] = names  # the file proves them by sorry: to cite one is no proof
        theorems += [place | {"full_name": full_name, "source": str(found[0] / file)} for full_name in names]
    return theorems


def check_environment(args, theorems):
    """Say what is missing before anything is started. LeanDojo itself would wait, for GitHub up to 45 minutes."""
    import common

    module, token = args.dojo.partition(":")[0], os.environ.get("GITHUB_ACCESS_TOKEN")
    sys.path.append(os.getcwd())
    try:
        found = find_spec(module)
    except (ImportError, ValueError):  # what should hold it is missing, or no package
        found = None
    if found is None:
        how = "pip install lean-dojo==4.20.0 (Python 3.11 or 3.12)" if module == "lean_dojo" else "is it here?"
        common.refuse(f"--dojo {args.dojo}: {module} cannot be imported: {how}")
    if module != "lean_dojo":
        return
    if not shutil.which("git") or not shutil.which("lake"):
        common.refuse("no git or no lake on PATH: install git, and Lean by elan, https://lean-lang.org/install")
    if any("github.com" in theorem["url"] for theorem in theorems):
        if not token:
            common.refuse(
                "GITHUB_ACCESS_TOKEN is not set, and GitHub soon makes LeanDojo wait for 45 minutes without: make a "
                "token, which needs no rights, at https://github.com/settings/tokens, and export it"
            )
        import requests

        try:
            headers = {"Authorization": f"Bearer {token}"}
            requests.get("https://api.github.com/user", headers=headers, timeout=20).raise_for_status()
        except requests.RequestException as error:
            common.refuse(f"GitHub, which LeanDojo asks about repositories, refuses or is away: {error}"[:300])


def choose_models(args) -> list[str]:
    import common

    models = args.model or args.ensemble or []
    if not models:
        runs = {path.parent: 0 for path in Path("runs").glob("lean-neff*/epoch-*") if path.parent.name[9:].isdigit()}
        for run in sorted(runs, key=lambda run: int(run.name[9:])):
            epochs = [int(path.name[6:]) for path in run.glob("epoch-*") if path.name[6:].isdigit()]
            models += [str(run / f"epoch-{max(epochs)}")] if epochs else []
        if not models:
            common.refuse(
                "there are no models runs/lean-neff*/epoch-*; make them first:\n"
                "    for n in 1 4 8 16 32; do python train_lean_step.py --n-eff $n; done"
            )
        if args.ensemble is None and len(models) > 1:
            common.refuse(
                f"there are several models ({', '.join(models)}): choose by --model, or use all by --ensemble"
            )
    for checkpoint in [*models, *([args.baseline] if args.baseline else [])]:
        if not common.check_model(checkpoint):
            common.refuse(f"{checkpoint} holds no weights: give a checkpoint that train_lean_step.py wrote")
        if common.read_record(checkpoint).get("template", "lean") != "lean":
            common.refuse(f"{checkpoint} was not trained on proof states, but on another template")
    if len({os.path.normpath(model) for model in models}) < len(models):
        common.refuse("a model is given twice: an ensemble wants different ones")
    return models


def start_out(args, theorems, runs) -> dict:
    """Refuse to add to results under other settings. -> the file of results of each (checkpoint, times)."""
    import common

    names = ("passes", "max_steps", "time_limit", "tactic_timeout", "start_timeout", "block", "merge", "stop_at_first")
    settings = {name: getattr(args, name) for name in (*names, "seed", "max_new_tokens", "dojo")}
    asked = [(theorem["id"], theorem["full_name"], theorem["file_path"], theorem["commit"]) for theorem in theorems]
    settings["theorems"] = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    paths = {}
    for checkpoint, times in runs:
        label = re.sub(r"[^\w.-]", "-", "-".join(Path(checkpoint).parts[-2:])) + (f"-x{times}" if times > 1 else "")
        settings[f"weights of {label}"] = common.fingerprint(checkpoint)
        paths[checkpoint, times] = args.out / f"{label}.jsonl"
    if len(set(paths.values())) < len(runs):
        common.refuse("two checkpoints have the same last two folders: their results cannot be told apart")
    common.make_folder(args.out)
    try:  # a lock that is held until this process ends
        fcntl.lockf(os.open(args.out / "lock", os.O_CREAT | os.O_WRONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        common.refuse(f"--out {args.out}: another prove.py is writing there")
    file = args.out / "settings.json"
    try:
        there = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        common.refuse(f"{file} is broken ({error}): remove it if the results beside it are of these settings")
    for name, value in json.loads(json.dumps(settings)).items():
        if there and there.get(name, value if name.startswith("weights of") else None) != value:
            old = "another" if name == "theorems" or name.startswith("weights of") else there.get(name)
            common.refuse(f"--out {args.out} holds results of other settings ({name}: {old}): give another --out")
    common.write_whole(file, json.dumps(there | settings, indent=2) + "\n")
    return paths


# ---- The search of one theorem ---------------------------------------------------------------------------------------


class Place:
    """A path from a theorem's initial state that at least one pass has taken: a place in the search tree."""

    def __init__(self, parent, tactic, number, block):
        self.parent, self.tactic, self.number, self.block = parent, tactic, number, block
        self.path = (*parent.path, tactic) if parent else ()
        self.state_path = (*parent.source.state_path, tactic) if parent else ()  # another one under --merge text only
        self.kind, self.text, self.seconds = "new", None, 0.0  # then open, proved, error, timeout, crash, …
        # Under --merge text: whose call gave this outcome, whose state is used. Under --merge path it is this place.
        self.asked, self.source = self, self
        self.children, self.passes, self.shared = {}, 0, False  # shared: passes of several blocks needed the call


def prove_theorem(theorem: dict, passes: int, args, lean, sample) -> dict:
    """All passes of one theorem by one model. -> its line of JSON.

    lean.do(method, theorem, items) -> [(kind, text, seconds)]: "first_state" of [()], "apply" of [(path, tactic)], or
    "replay" of [(path,)], which gives the states in place of a text. lean.events: a Counter of what went wrong.
    sample(theorem, block, {place: n}) -> for each place, (its n tactics or a Counter of them, seconds); None is one
    that did not end.
    """
    limit, spent, counts = args.time_limit * passes / args.passes, Counter(), Counter()
    leave_at = max(2 * limit, limit + 20 * args.tactic_timeout)  # a block is to end, but not at any cost
    root = Place(None, None, 0, 0)
    places, known, blocks = [root], {}, []  # known, under --merge text: text, or (text, tactic) -> the first such place
    proofs, proved, in_time = {}, {}, Counter()  # place -> {block: passes}; place -> states; place -> passes in time
    lean.events.clear()
    ((kind, root.text, start_seconds),) = lean.do("first_state", theorem, [()])
    known[root.text] = root
    status = None if kind == "open" else "not started"

    def replay(found):
        """-> {place: the states along its path, or None where that path is no proof}."""
        answers = lean.do("replay", theorem, [(place.path,) for place in found]) if found else []
        counts["replay_seconds"] += sum(seconds for _, _, seconds in answers)  # not on the clock
        return {p: states if kind == "proved" else None for p, (kind, states, _) in zip(found, answers, strict=True)}

    # The decision to go on is made before a block and never revoked: to drop a block for being slow would be to leave
    # out what takes long, such as long proofs.
    while status is None:
        done = sum(block["passes"] for block in blocks)
        if done == passes or spent.total() >= limit:
            status = "done" if done == passes else "timed out"
            break
        number = len(blocks)
        blocks.append({"passes": min(args.block, passes - done), "sampling": 0.0, "clock": None})
        walkers = {root: blocks[-1]["passes"]}
        root.passes += blocks[-1]["passes"]
        while walkers:
            moved, new = Counter(), []
            for place, (tactics, seconds) in zip(walkers, sample(theorem, number, walkers), strict=True):
                spent["sampling"] += seconds
                blocks[-1]["sampling"] += seconds
                for tactic, n in Counter(tactics).items():
                    child = place.children.get(tactic)
                    if child is None:
                        child = place.children[tactic] = Place(place, tactic, len(places), number)
                        places.append(child)
                        if tactic is None or is_refused(tactic, theorem.get("unproved", ())):
                            child.kind = "refused" if tactic else "no end"
                        elif args.merge == "text":
                            child.asked = known.setdefault((place.source.text, tactic), child)
                        new += [child] if child.kind == "new" and child.asked is child else []
                    child.asked.shared |= child.asked.block != number
                    counts["steps"] += n * (child.kind not in ("no end", "refused"))
                    moved[child] += n
            while new and spent.total() < leave_at:
                now, new = new[:64], new[64:]
                calls = [(place.parent.source.state_path, place.tactic) for place in now]
                for place, (kind, text, seconds) in zip(now, lean.do("apply", theorem, calls), strict=True):
                    place.kind, place.text, place.seconds = kind, text if kind == "open" else None, seconds
                    spent["lean"] += seconds
                counts["tactic_calls"] += len(now)
            if new:
                status = "block left unfinished"
                break

            walkers = {}
            for place, n in moved.items():
                place.kind, place.text = place.asked.kind, place.asked.text
                if place.kind == "open" and args.merge == "text":
                    place.source = known.setdefault(place.text, place)
                place.passes += n
                if place.kind == "open" and len(place.path) < args.max_steps:
                    walkers[place] = n
                    continue
                counts["ended"] += n
                counts["in_time"] += n * (spent.total() < limit)
                if place.kind == "proved":
                    proofs.setdefault(place, Counter())[number] += n
                    in_time[place] += n * (spent.total() < limit)
            if args.stop_at_first and len(proofs) > len(proved):
                proved |= replay([place for place in proofs if place not in proved])
                status = "stopped at a proof" if any(proved.values()) else None
            elif walkers and spent.total() >= leave_at:
                status = "block left unfinished"
            if status:
                break
        else:
            blocks[-1]["clock"] = spent.total()

    proved |= replay([place for place in proofs if place not in proved])
    proofs = {place: found for place, found in proofs.items() if proved[place]}
    for i, block in enumerate(blocks):
        block["successes"] = sum(found[i] for found in proofs.values())
        block["own"] = block.pop("sampling") + sum(p.seconds for p in places if p.block == i and not p.shared)
    best = min(proofs, key=lambda place: (len(place.path), -place.passes), default=None)
    wide = [place for place in places if place.children and place.passes >= BRANCHING_PASSES]
    valid = [child for place in wide for child in place.children.values() if child.kind in ("open", "proved")]
    return {
        "id": theorem["id"],
        "full_name": theorem["full_name"],
        "file_path": theorem["file_path"],
        "passes": counts["ended"],
        "successes": sum(found.total() for found in proofs.values()),
        "proof": list(best.path) if best else None,
        "states": proved[best] if best else None,
        "steps": counts["steps"],  # tactics that the passes tried: what walks taken one by one would apply
        "tactic_calls": counts["tactic_calls"],
        "start_seconds": start_seconds,
        "lean_seconds": spent["lean"],
        "sampling_seconds": spent["sampling"],
        "replay_seconds": counts["replay_seconds"],
        "timeouts": lean.events["timeout"],
        "crashes": lean.events["crash"],
        "status": status,
        "message": root.text if status == "not started" else "",
        "asked": passes,
        "limit": limit,
        "in_time": sum(in_time[place] for place in proofs),
        "unfinished": passes - counts["in_time"],
        "blocks": [block for block in blocks if block["clock"] is not None],
        "proofs": len(proofs),
        "unreplayable": len(proved) - len(proofs),
        "wide_states": len(wide),
        "valid_tactics": len(valid),
        "kinds": dict(Counter(place.kind for place in places[1:])),
    }


def is_refused(tactic: str, unproved=()) -> bool:
    """Whether a tactic is not even tried: one that would be no proof, or that a terminal's line cannot carry.
    unproved: theorems above this one whose proof is sorry."""
    request = json.dumps({"sid": 10**6, "cmd": tactic}, ensure_ascii=False)
    cites = not {*unproved}.isdisjoint(re.findall(r"[\w.']+", tactic)) or (unproved and "?" in tactic)
    return bool(UNTRUSTED.search(tactic) or cites) or len(request.encode(errors="replace")) > LONGEST_REQUEST


# ---- Lean, in Ray workers --------------------------------------------------------------------------------------------
KINDS = {"TacticState": "open", "ProofFinished": "proved", "LeanError": "error", "ProofGivenUp": "given up"}


class LeanWorker:
    """What runs in a Ray actor: the environment of one theorem at a time. It is told paths, never states: whatever it
    has lost, it replays. An environment that has raised anything is thrown away."""

    def __init__(self, dojo: str, tactic_timeout: float, start_timeout: float, workers_here: int):
        import psutil

        self.tactic_timeout, self.start_timeout = tactic_timeout, start_timeout
        self.manager, self.theorem, self.live, self.repositories = None, None, {}, {}
        self.mark = f"{os.getpid()}-{time.time_ns()}"
        watch = [sys.executable, "-c", f"import prove; prove.kill_when_left({self.mark!r})"]
        self.watch = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
        os.environ["DCO_LEAN_WORKER"] = self.mark  # which every process that is started in here inherits
        os.environ["TACTIC_MEMORY_LIMIT"] = f"{max(1, psutil.virtual_memory().total // workers_here >> 30)}g"
        module, _, name = dojo.partition(":")
        self.module = import_module(module)
        self.kind = getattr(self.module, name)

    def not_cached(self, repositories: list) -> list[str]:
        """The repositories that LeanDojo would have to trace anew on this node, which takes hours."""
        if self.module.__name__ != "lean_dojo":
            return []
        from lean_dojo.constants import CACHE_DIR

        if not shutil.which("lake"):
            return [f"no lake on PATH of {os.uname().nodename}: install Lean there"]
        names = [(url, commit, f"*-{Path(url).name}-{commit}/{Path(url).name}") for url, commit in repositories]
        lost = [(url, commit) for url, commit, name in names if not any(CACHE_DIR.glob(name))]
        return [f"{url} at {commit} is not in {CACHE_DIR} of {os.uname().nodename}" for url, commit in lost]

    def enter(self):
        """A fresh environment of the theorem."""
        self.leave()
        entry, place = self.theorem, (self.theorem["url"], self.theorem["commit"])
        if hasattr(self.module, "Theorem"):  # without, the class gets the record, and may be a client of whatever
            if place not in self.repositories:
                self.repositories[place] = self.module.LeanGitRepo(*place)
            entry = self.module.Theorem(self.repositories[place], Path(entry["file_path"]), entry["full_name"])
        self.manager = self.kind(entry, timeout=self.start_timeout)
        self.dojo, state = self.manager.__enter__()
        for owner in (self.dojo, getattr(self.dojo, "proc", None)):  # LeanDojo has one limit for the start and tactics
            if hasattr(owner, "timeout"):
                owner.timeout = self.tactic_timeout
            if hasattr(owner, "delaybeforesend"):  # pexpect's 50 ms before each tactic, for terminals that echo
                owner.delaybeforesend = None
        self.live = {(): state}

    def leave(self):
        if self.manager is not None:
            with contextlib.suppress(Exception):  # of one that has failed before; its processes go in any case
                self.manager.__exit__(None, None, None)
            kill_marked(self.mark)
        self.manager, self.live = None, {}

    def apply(self, path: tuple, tactic: str) -> tuple[str, str]:
        """-> (kind, text) of a tactic in the state that `path` leads to."""
        if self.manager is None:
            self.enter()
        start = max(i for i in range(len(path) + 1) if path[:i] in self.live)
        for i in range(start, len(path)):  # after a restart
            self.live[path[: i + 1]] = state = self.dojo.run_tac(self.live[path[:i]], path[i])
            if KINDS[type(state).__name__] != "open":
                raise RuntimeError(f"{path[i]} does not do after a restart what it has done before")
        result = self.dojo.run_tac(self.live[path], tactic)
        kind = KINDS[type(result).__name__]
        if kind == "open":
            self.live[(*path, tactic)] = result
        return kind, result.pp if kind == "open" else str(getattr(result, "error", ""))

    def first_state(self) -> tuple[str, str]:
        self.enter()
        return "open", self.live[()].pp

    def replay(self, path: tuple) -> tuple[str, list[str]]:
        """-> ("proved", the states along the path) if the path is a proof from the start of this environment, in which
        nothing but other paths has been replayed."""
        for i in range(len(path)):
            kind = "open" if path[: i + 1] in self.live else self.apply(path[:i], path[i])[0]
            if kind != "open":
                break
        return kind if i == len(path) - 1 else "error", [self.live[path[:k]].pp for k in range(i + 1)]

    def do(self, method: str, theorem: dict, items: list[tuple]) -> list[tuple]:
        """-> (kind, text or states, seconds) of what the method makes of the first items, at least of one: up to what
        goes wrong or takes long. Replays begin in an environment that is new."""
        if theorem != self.theorem or method == "replay":
            self.leave()
        self.theorem, outcomes, end = theorem, [], time.monotonic() + 2 * self.tactic_timeout
        for item in items:
            began = time.perf_counter()
            try:
                kind, text = getattr(self, method)(*item)
                for state in [text] if isinstance(text, str) else text:
                    state.encode()  # raises where it is no text, or half a character, which no tokenizer takes
            except Exception as error:  # whatever it is: it is told and counted, and this environment is over
                self.leave()
                text = f"{type(error).__name__}: {error}"[:300]
                kind = "timeout" if "timeout" in text.lower() else "crash"
            outcomes.append((kind, text, time.perf_counter() - began))
            if kind in BROKEN or time.monotonic() > end:
                break
        if method == "replay":
            self.leave()
        return outcomes


def kill_marked(mark: str):
    """Kill what a worker has started, wherever it has got to: a Lean process may be in a session of its own."""
    import psutil

    for _ in range(50):  # what it starts in the meantime as well; but one that hangs in the kernel does not go
        found = False
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # gone, or another user's
                if process.environ().get("DCO_LEAN_WORKER") == mark and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    found = True
        if not found:
            break
        time.sleep(0.1)


def kill_when_left(mark: str):
    """Runs beside a worker and outlives it, however it ends: leaves no Lean process behind."""
    if os.fork() == 0:  # no child of the worker, whose children Ray kills
        sys.stdin.read()
        kill_marked(mark)


class Lean:
    """The other end of a worker: replaces one that has died or hangs, and tries once more what has gone wrong."""

    def __init__(self, actor, settings: tuple, patience: float):
        self.actor, self.settings, self.patience, self.events = actor, settings, patience, Counter()
        self.worker = actor.remote(*settings)

    def ask(self, *inputs) -> tuple[list[tuple], bool]:
        """-> what `LeanWorker.do` answers, or one failed attempt if it does not; whether it did."""
        import ray

        began = time.perf_counter()
        try:
            return ray.get(self.worker.do.remote(*inputs), timeout=self.patience), True
        except ray.exceptions.GetTimeoutError:
            kind, why = "timeout", f"no answer of the environment in {self.patience:g} s"
        except ray.exceptions.RayError as error:
            kind, why = "crash", f"the environment's worker died: {str(error).strip().splitlines()[-1]}"[:300]
        ray.kill(self.worker)
        self.worker = self.actor.remote(*self.settings)
        return [(kind, why, time.perf_counter() - began)], False

    def do(self, method: str, theorem: dict, items: list[tuple]) -> list[tuple]:
        """-> (kind, text or states, seconds) of each item. One that goes wrong is tried once more, alone."""
        outcomes, alone, lost, together = [], False, 0.0, len(items)
        while len(outcomes) < len(items):
            answer, answered = self.ask(method, theorem, items[len(outcomes) :][: 1 if alone else together])
            together = together if answered else 1  # any of them may have done it
            kind, text, seconds = answer[-1]
            self.events[kind] += kind in BROKEN
            if kind in BROKEN and not alone:
                outcomes, alone, lost = outcomes + answer[:-1], True, seconds
            else:
                outcomes, alone, lost = outcomes + answer[:-1] + [(kind, text, seconds + lost)], False, 0.0
        return outcomes


def prove_all(args, accelerator, checkpoint, tokenizer, times, theorems, path, started):
    """Every theorem's passes by one model; each line of `path` is written as soon as it is known.
    started: whether the environment has been seen to start with any theorem, now or in a run before."""
    import ray
    import torch
    from tqdm import tqdm

    import common

    record, template = common.read_record(checkpoint), common.TEMPLATES["lean"]
    max_new_tokens = args.max_new_tokens or record.get("max_new_tokens", 256)
    longest = min(record.get("max_length", 4096) + max_new_tokens, common.longest_context(checkpoint))
    if longest <= max_new_tokens:
        common.refuse(
            f"{checkpoint} has {longest} positions: --max-new-tokens {max_new_tokens} leaves none for a state"
        )
    seed = common.seed_of(args.seed, common.fingerprint(checkpoint))  # the models of an ensemble draw independently
    common.start_ray()
    atexit.register(ray.shutdown)
    cores, nodes = int(ray.cluster_resources()["CPU"]), sum(node["Alive"] for node in ray.nodes())
    count = min(args.workers or cores, len(theorems))
    settings = (args.dojo, args.tactic_timeout, args.start_timeout, math.ceil(count / nodes))
    theorems = [{name: theorem[name] for name in theorem if name != "traced_tactics"} for theorem in theorems]
    # Half a share each: whole ones need not fit into the nodes, and those of a node that is lost go to the others.
    actor = ray.remote(LeanWorker).options(num_cpus=min(1, cores / count) / 2, scheduling_strategy="SPREAD")
    patience = 30 + 2 * args.start_timeout + 8 * args.tactic_timeout  # after it, the environment is taken for hung
    crew = [Lean(actor, settings, patience) for _ in range(count)]
    repositories = sorted({(theorem["url"], theorem["commit"]) for theorem in theorems})
    try:
        answers = ray.get([lean.worker.not_cached.remote(repositories) for lean in crew], timeout=900)
    except ray.exceptions.GetTimeoutError:
        common.refuse(f"Ray has not started {count} workers within 15 minutes; --workers takes fewer")
    except ray.exceptions.RayError as error:
        common.refuse(f"--dojo {args.dojo}: a worker cannot import it: {str(error).strip().splitlines()[-1]}"[:300])
    lost = sorted({line for answer in answers for line in answer})
    if lost:
        how = "trace it there (python -c 'from lean_dojo import *; trace(LeanGitRepo(URL, COMMIT))') or copy the folder"
        common.refuse("\n".join(["Lean or a repository is missing:", *lost, how]))
    if args.engine == "vllm":
        how = {"memory": args.gpu_memory, "gpus": args.gpus_per_engine}
        sampler = common.VLLMEngines(accelerator, checkpoint, tokenizer, longest, args.out, **how)
    else:
        dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
        model, _ = common.load_model(checkpoint, tokenizer, dtype)
        sampler = common.LiveModel(accelerator, model.eval().to(accelerator.device), tokenizer)

    # A thread a worker goes through theorems; what they want sampled comes together in `inbox`, and goes to the engines
    # in one call for all theorems in flight.
    inbox, waiting, lock = SimpleQueue(), iter(theorems), threading.Lock()
    progress = tqdm(total=len(theorems), unit="theorem", desc=label_of(checkpoint, times), mininterval=1)

    def sample(theorem, block, walkers):
        answer = Future()
        inbox.put((theorem, block, list(walkers.items()), answer))
        return answer.result()

    def work(lean):
        try:
            for theorem in waiting:  # all threads take from the one iterator
                result = prove_theorem(theorem, args.passes * times, args, lean, sample)
                with lock:
                    common.append_json(path, result)
                inbox.put(result)
            inbox.put(None)
        except BaseException as error:
            inbox.put(error)

    def answer_together(batch):
        """Answer the requests of several theorems. A state that leaves no room for a tactic gets none."""
        began, asked = time.perf_counter(), []  # (prompt, n, seed) of each place
        for theorem, block, wanted, _ in batch:
            for place, n in wanted:
                prompt = tokenizer(template.prompt.format(problem=place.text)).input_ids
                asked.append((prompt, n, common.seed_of(seed, theorem["id"], block, place.number)))
        fits = [one for one in asked if len(one[0]) + max_new_tokens <= longest]
        prompts, counts, seeds = zip(*fits, strict=True) if fits else ((), (), ())
        drawn = iter(sampler.generate(list(prompts), list(counts), max_new_tokens, list(seeds)) if fits else [])
        found, tokens = [], []
        for prompt, n, _ in asked:
            fits = len(prompt) + max_new_tokens <= longest
            completions = next(drawn) if fits else []
            tokens.append(len(prompt) + sum(len(one.token_ids) for one in completions))
            found.append(common.count_answers(completions, tokenizer, "lean") if fits else Counter({None: n}))
        each = (time.perf_counter() - began) / sum(tokens)
        shares = iter([(tactics, each * count) for tactics, count in zip(found, tokens, strict=True)])
        for _, _, wanted, answer in batch:
            answer.set_result(list(islice(shares, len(wanted))))

    try:
        for lean in crew:
            threading.Thread(target=work, args=[lean], daemon=True).start()
        ended, failed = 0, 0  # threads; theorems that did not start, before one did
        while ended < count:
            items = [inbox.get() for _ in range(max(1, inbox.qsize()))]
            for item in items:
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, dict):
                    progress.update()  # here alone: a thread that ends in it would keep its lock
                    started |= item["status"] != "not started"
                    failed += not started
                    if failed == max(20, 2 * count):
                        raise RuntimeError(f"the first {failed} theorems did not start: {item['message']}")
            ended += items.count(None)
            if batch := [item for item in items if isinstance(item, tuple)]:
                answer_together(batch)
        with contextlib.suppress(ray.exceptions.RayError):  # what does not leave is killed below
            ray.get([lean.worker.leave.remote() for lean in crew], timeout=60)
    finally:
        sampler.shut_down()
        ray.shutdown()
        progress.close()


# ---- Estimates -------------------------------------------------------------------------------------------------------


def paper_pass_at_n(result: dict, n: int) -> tuple[float, bool]:
    """The paper's: passes that had not ended within the time limit have failed."""
    import common

    return float(common.pass_at_n(result["asked"], result["in_time"], n)), False


def unbiased_pass_at_n(result: dict, n: int) -> tuple[float, bool]:
    """-> (estimate, whether it is only a lower bound: that of pass@n from fewer than n passes).

    How many blocks a time limit admits depends on how long they take, and so perhaps on what they prove: their plain
    average is biased. But the search stopped at the first block with which the time, that of all blocks together and
    with what several share counted once, was over the limit. It would have done so after the same blocks in any order
    whose last one is of those without which the time was not over. All these orders are as likely, so the average over
    them of the estimate from the blocks before the last one is unbiased: of pass@1 exactly, of pass@n as far as the
    blocks are independent of each other (in simulations, no bias is seen), and for n above one block given that so
    many blocks were admitted. A block that was left unfinished can only have been the last one, whatever the order."""
    import common

    passes, right = (sum(block[name] for block in result["blocks"]) for name in ("passes", "successes"))
    if result["status"] == "not started":
        return 0.0, False
    if passes < n:
        return float(right > 0), True
    end = result["blocks"][-1]["clock"]
    last = [block for block in result["blocks"] if end >= result["limit"] > end - block["own"]]
    if last and all(passes - block["passes"] >= n for block in last):
        without = [(passes - block["passes"], right - block["successes"]) for block in last]
        return sum(float(common.pass_at_n(size, c, n)) for size, c in without) / len(last), False
    return float(common.pass_at_n(passes, right, n)), False


def report(args, runs, theorems):
    """Tables on standard output, prove.json, success.png, and the proofs."""
    import numpy as np

    import common

    curve = sorted({*args.ns, *(2**i for i in range(args.passes.bit_length()))}) if not args.stop_at_first else args.ns
    order, rows = [theorem["id"] for theorem in theorems], {"paper": {}, "unbiased": {}}
    for kind, estimate in (("unbiased", unbiased_pass_at_n), ("paper", paper_pass_at_n)):
        missed = {n: np.ones(len(order)) for n in curve}  # Π_m (1 - pass_m@n) of each theorem
        bounds, rivals = {n: False for n in curve}, {}
        for checkpoint, times, results in runs:
            by_id = {result["id"]: result for result in results}
            row = rows[kind][label_of(checkpoint, times)] = {}
            for n in curve:
                if args.stop_at_first:
                    found = [(float(by_id[i]["in_time"] > 0), False) for i in order]
                else:
                    found = [estimate(by_id[i], n * times) for i in order]
                values = np.array([value for value, _ in found])
                row[n] = common.mean_and_interval(values) | {"lower_bound": any(bound for _, bound in found)}
                rivals[n] = values  # of the last run, which is the baseline if there is one
                if times == 1:
                    missed[n] *= 1 - values
                    bounds[n] |= row[n]["lower_bound"]
        members = sum(times == 1 for _, times, _ in runs)
        if args.ensemble is not None:
            rows[kind][f"ensemble of {members}"] = {
                n: common.mean_and_interval(1 - missed[n]) | {"lower_bound": bounds[n]} for n in curve
            }
    print("\nsuccess rate in percent, 95 % intervals over theorems\n\n" + markdown_table(rows["paper"], args.ns))
    if rows["paper"] != rows["unbiased"] and not args.stop_at_first:
        print("\nand without the bias of the time limit (>=: from fewer passes than N)\n")
        print(markdown_table(rows["unbiased"], args.ns))
    if args.baseline and args.ensemble is not None:
        gains = {n: common.mean_and_interval(1 - missed[n] - rivals[n]) for n in args.ns}
        shown = [
            f"{n}: {100 * g['pass']:+.1f} [{100 * g['low']:+.1f}, {100 * g['high']:+.1f}]" for n, g in gains.items()
        ]
        print(f"\nensemble less baseline, on the same theorems, at N = {', '.join(shown)}")
        rows["gains"] = gains
    lines = []
    for checkpoint, times, results in runs:
        total = Counter()
        for result in results:
            total.update({name: value for name, value in result.items() if isinstance(value, int) and name != "id"})
            total.update(solved=result["successes"] > 0)
        share = 100 * total["tactic_calls"] / max(1, total["steps"])
        wide = f"{total['valid_tactics'] / total['wide_states']:.1f}" if total["wide_states"] else "-"
        late = 0.0 if args.stop_at_first else 100 * total["unfinished"] / total["asked"]
        counted = [total["timeouts"], total["crashes"], total["unreplayable"]]
        cells = [label_of(checkpoint, times), total["solved"], wide, f"{share:.1f} %", f"{late:.1f} %", *counted]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        for result in results:
            if result["status"] == "not started":
                print(f"{result['full_name']} ({result['file_path']}) did not start: {result['message']}")
    header = f"| model | proved | valid tactics a state (of {BRANCHING_PASSES} passes or more) | calls of one-by-one "
    header += "walks | passes unfinished | timeouts | crashes | replays failed |"
    print("\n" + "\n".join([header, "|---" * 8 + "|", *lines]))
    names = "N (passes a theorem and model)", "theorems proved (%)"
    figures = (
        []
        if args.stop_at_first
        else common.draw_panels([common.coverage_panel(rows["paper"], *names)], args.out / "success.png")
    )
    file = args.out / "prove.json"
    arguments = {name: str(value) for name, value in vars(args).items()}
    common.write_whole(file, json.dumps({"theorems": len(order), "arguments": arguments, **rows}) + "\n")
    if args.save_proofs:
        figures += [save_proofs(args.save_proofs, runs, theorems)]
    print("\nwrote", ", ".join(map(str, [file, *figures])))


def label_of(checkpoint: str, times: int) -> str:
    return checkpoint + (f" ({times} x the passes)" if times > 1 else "")


def markdown_table(rows: dict, ns: list[int]) -> str:
    """Models down, N across, as in Tables 2 and 6."""
    lines = ["| model | " + " | ".join(f"pass@{n}" for n in ns) + " |", "|---" * (len(ns) + 1) + "|"]
    for label, row in rows.items():
        shown = [[100 * row[n][name] for name in ("pass", "low", "high")] for n in ns]
        bounds = [">= " * row[n]["lower_bound"] for n in ns]
        cells = [
            f"{bound}{rate:.1f} [{low:.1f}, {high:.1f}]" for bound, (rate, low, high) in zip(bounds, shown, strict=True)
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save_proofs(path: Path, runs, theorems) -> Path:
    """A proof a theorem and model, in the format of LeanDojo's benchmark, for train_lean_step.py --extra."""
    import common

    known, lines = {theorem["id"]: theorem for theorem in theorems}, {}
    for _, _, results in runs:
        for result in sorted(results, key=lambda result: result["id"]):  # they ended in an order of their own
            if result["proof"]:
                after = [*result["states"][1:], "no goals"]
                steps = [
                    {"tactic": tactic, "annotated_tactic": [tactic, []], "state_before": before, "state_after": state}
                    for tactic, before, state in zip(result["proof"], result["states"], after, strict=True)
                ]
                theorem = known[result["id"]] | {"traced_tactics": steps}
                lines[result["id"], *result["proof"]] = json.dumps(theorem)
    common.make_folder(path.parent)
    common.write_whole(path, "".join(line + "\n" for line in lines.values()))
    return path


if __name__ == "__main__":
    main()
