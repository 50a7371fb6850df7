"""Prove theorems by N independent passes each, with one model or several (§5.3, C.5, Tables 2, 6).

    python prove.py --model runs/lean-neff8/epoch-28
    python prove.py --ensemble --baseline runs/lean-neff1/epoch-28  # all N_eff, last epochs

A pass samples a tactic given the proof state, applies it, and goes on until a tactic fails, no goal
is left or --max-steps are done. pass@N is the probability that one of N independent passes proves a
theorem; with N passes for each of M models 1 - Π_m (1 - pass_m@N), beside --baseline with M x N.

Passes that took the same path share its work: their next tactics are sampled in one request, and
each distinct tactic is applied once, by a Lean process in a Ray worker. States that print alike
need not be equal, so only paths are merged. A pass counts if its path, replayed from the start in a
fresh environment, proves the theorem without sorry, admit or native_decide.

The time of a theorem is that of its tactics and its share of sampling, not waiting, and is checked
between blocks of passes. Prints tables, and writes to --out a JSON line per theorem and model as
each ends (the same command continues there), prove.json, success.png, proofs.json.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue

import matplotlib.pyplot as plt
import numpy as np
import psutil
import torch
from tqdm import tqdm

import common

PRESETS = {
    "paper": {
        "theorems": "leandojo_benchmark_4/random/test.json",
        "dojo": "lean_dojo:Dojo",
        "engine": "auto",
        "block": 256,
    },
    "laptop": {  # a larger block costs hardly more where tactics take no time
        "theorems": "examples/propositional/test.json",
        "dojo": "examples.propositional.environment:Dojo",
        "engine": "transformers",
        "block": 4096,
    },
}
UNTRUSTED = re.compile(
    r"\b(sorry\w*|admit|native_decide|bv_decide|ofReduce\w+|trustCompiler)\b"
    r"|\+\s*native|\bnative\s*:=|\x7f"
)
BROKEN = ("timeout", "crash")  # outcomes that say nothing about the tactic yet
KINDS = {"TacticState": "open", "ProofFinished": "proved"}  # all else is an error
MAY_CHANGE = {"model", "ensemble", "baseline", "workers", "engine", "gpu_memory", "gpus_per_engine",
              "preset", "out"}  # fmt: skip


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: paper with a GPU, laptop without")
    # models and theorems
    add("--model", nargs="+", help="checkpoints (default: the last epoch of each runs/lean-neff*)")
    add("--ensemble", action="store_true", help="of the models, too")
    add("--baseline", metavar="CKPT", help="M x the passes for M models (paper: 20k for 5 x 4k)")
    add("--theorems", type=Path, help="as in LeanDojo's benchmark (paper: random test, MiniF2F)")
    add("--only-untraced", action="store_true", help="theorems without a proof (expert iteration)")
    # search
    add("--passes", type=int, default=4096, help="per theorem and model (paper: 4096; C.5: 1024)")
    add("--max-steps", type=int, default=50, help="of a pass (paper: 50)")
    add("--time-limit", type=float, help="seconds per theorem (paper: 5000 at 4k passes)")
    add("--tactic-timeout", type=float, default=30, help="seconds")
    add("--start-timeout", type=float, default=300, help="seconds until a theorem's first state")
    add("--block", type=int, help="passes between two checks of the time limit")
    add("--seed", type=int, default=0)
    # environment
    add("--dojo", metavar="MODULE:CLASS", help="an environment with LeanDojo's interface")
    add("--workers", type=int, help="theorems at a time, a Lean process each (default: CPU cores)")
    # sampling, at temperature 1 as in the paper
    add("--engine", choices=["auto", "vllm", "transformers"], help="auto: vLLM if installed")
    add("--gpu-memory", type=float, default=0.85, help="vLLM's share of each GPU")
    add("--gpus-per-engine", type=int, default=1)
    # output
    add("--out", type=Path, help="default: runs/prove-<folder>-<file> of the theorems")
    args = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("start it without accelerate launch: it uses all GPUs by itself")
    for name, value in vars(args).items():
        if name != "seed" and type(value) in (int, float) and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if not args.model:
        found = sorted(Path("runs").glob("lean-neff*/epoch-*[0-9]"), key=lambda p: int(p.name[6:]))
        last = {path.parent: str(path) for path in found}
        args.model = list(last.values()) or parser.error("there is no runs/lean-neff*/epoch-*")
    args.preset = args.preset or ("paper" if torch.cuda.is_available() else "laptop")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.theorems, args.block = Path(args.theorems), min(args.block, args.passes)
    args.time_limit = args.time_limit or 5000 * args.passes / 4096
    args.ns = [n for n in (16, 64, 256, 1024, 4096) if n < args.passes] + [args.passes]
    args.out = args.out or Path(f"runs/prove-{args.theorems.parent.name}-{args.theorems.stem}")
    return args


def main(argv=None):
    args = parse_args(argv)
    theorems = load_theorems(args)
    check_environment(args, theorems)
    models = sorted(args.model, key=lambda checkpoint: read_record(checkpoint)["n_prime"])
    runs = {checkpoint: (checkpoint, 1) for checkpoint in models}
    if args.baseline:
        runs[f"{args.baseline} ({len(models)} x the passes)"] = args.baseline, len(models)
    files = start_out(args, runs)
    print(f"{len(theorems):,} theorems, {json.dumps(vars(args), default=str)}", flush=True)
    for label, (checkpoint, times) in runs.items():
        status = {result["id"]: result["status"] for result in read_results(files[label])}
        left = [one for one in theorems if "not started" in status.get(one["id"], "not started")]
        if left:
            prove_all(args, checkpoint, times, left, files[label])
    report(args, {label: read_results(path) for label, path in files.items()}, theorems)


# ---- Models, theorems, environment, output -------------------------------------------------------
def load_theorems(args):
    """Read theorems in the format of LeanDojo's benchmark, a JSON list of objects. Adds "id"."""
    try:
        theorems = json.loads(args.theorems.read_text(encoding="utf-8"))
        [(one["url"], one["commit"], one["file_path"], one["full_name"]) for one in theorems]
    except (OSError, ValueError, TypeError, KeyError) as error:
        common.fail(f"{args.theorems}: not a list of theorems as in LeanDojo's data: {error!r}")
    theorems = [theorem | {"id": i} for i, theorem in enumerate(theorems)]
    theorems = [one for one in theorems if not (args.only_untraced and one.get("traced_tactics"))]
    if not theorems:
        common.fail(f"{args.theorems}: there is no theorem to prove")
    return [theorem | {"traced_tactics": []} for theorem in theorems]  # workers need none


def check_environment(args, theorems):
    """Fail if something that LeanDojo needs is missing, where it would wait for hours."""
    if not args.dojo.startswith("lean_dojo:"):
        return
    for name in ("git", "lake"):
        if not shutil.which(name):
            common.fail(f"{name} is not on PATH (lake comes with https://lean-lang.org/install)")
    traced = Path(os.environ.get("CACHE_DIR", Path.home() / ".cache/lean_dojo"))
    for url, commit in sorted({(theorem["url"], theorem["commit"]) for theorem in theorems}):
        if "github.com" in url and not os.environ.get("GITHUB_ACCESS_TOKEN"):
            common.fail("GITHUB_ACCESS_TOKEN is not set: https://github.com/settings/tokens")
        if not any(traced.glob(f"*-{Path(url).name}-{commit}")):
            common.fail(f"{url} at {commit} is not traced in {traced}: see the README")


def read_record(checkpoint):
    """Read what training wrote about a checkpoint."""
    path = Path(checkpoint) / "dco.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    if record.get("template") != "lean":
        common.fail(f"{checkpoint} is not a checkpoint of train_lean_step.py")
    return record


def start_out(args, runs):
    """Return {label: file of results}. Refuse an --out with results of other settings."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in MAY_CHANGE}
    files = {}
    for label, (checkpoint, _) in runs.items():
        files[label] = args.out / f"{re.sub(r'[^a-zA-Z0-9_.-]+', '__', label).strip('_')}.jsonl"
        weights = sorted(Path(checkpoint).glob("*.safetensors"))
        settings[f"{checkpoint} (date)"] = [path.stat().st_mtime_ns for path in weights]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    for name in settings.keys() & before.keys():
        if settings[name] != before[name]:
            common.fail(f"{args.out} holds results of another {name}: {before[name]}")
    path.write_text(json.dumps(before | settings, indent=1))
    return files


def read_results(path):
    """Read the last line of each theorem."""
    results = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):  # a kill may have cut it off
            result = json.loads(line)
            results[result["id"]] = result
    return [results[i] for i in sorted(results)]


# ---- The search of one theorem -------------------------------------------------------------------
class Place:
    """A place in the search tree: a path of tactics that at least one pass has taken."""

    def __init__(self, parent=None, tactic=None, number=0, block=0):
        self.parent, self.tactic, self.number, self.block = parent, tactic, number, block
        self.path = (*parent.path, tactic) if parent else ()
        self.kind, self.text, self.seconds = "new", None, 0.0  # then as LeanWorker.apply says
        self.children = {}
        self.shared = False  # whether passes of several blocks needed this tactic's call


class Search:
    """The passes of one theorem by one model.

    lean: see `Lean`. sample([(text of a state, n, key)]) -> for each, (Counter of n tactics,
    seconds); the tactic None did not end.
    """

    def __init__(self, theorem, passes, args, lean, sample):
        self.theorem, self.passes, self.args = theorem, passes, args
        self.lean, self.sample = lean, sample
        self.limit = args.time_limit * passes / args.passes
        self.give_up_at = max(2 * self.limit, self.limit + 20 * args.tactic_timeout)
        self.root = Place()
        self.places, self.blocks = [self.root], []
        self.seconds, self.counts = Counter(), Counter()
        self.proofs = {}  # proved place: {block: passes}
        self.in_time = Counter()  # proved place: passes that ended in time

    def run(self):
        """Return the theorem's line of results."""
        self.lean.events.clear()
        ((kind, self.root.text, _),) = self.lean.do("enter", self.theorem, [()])
        if kind != "open":
            return self.result(f"not started: {self.root.text}")
        for first in range(0, self.passes, self.args.block):
            # A block that was begun is not dropped: that would leave out what takes long, such as
            # long proofs. Only far beyond the limit is it given up.
            if self.seconds.total() >= self.limit:
                return self.result("timed out")
            if not self.run_block(min(self.args.block, self.passes - first)):
                return self.result("block given up")
        return self.result("done")

    def run_block(self, size):
        """Run `size` passes to their ends. Returns whether there was time for it."""
        number, walkers = len(self.blocks), {self.root: size}  # place: passes that are there
        self.blocks.append({"passes": size, "sampling": 0.0, "clock": None})
        while walkers:
            moved = self.sample_tactics(number, walkers)
            self.apply_tactics([place for place in moved if place.kind == "new"])
            if self.seconds.total() >= self.give_up_at:
                return False
            in_time, walkers = self.seconds.total() < self.limit, {}
            for place, n in moved.items():
                if place.kind == "open" and len(place.path) < self.args.max_steps:
                    walkers[place] = n
                    continue
                self.counts["in_time"] += n * in_time
                if place.kind == "proved":
                    self.proofs.setdefault(place, Counter())[number] += n
                    self.in_time[place] += n * in_time
        self.blocks[number]["clock"] = self.seconds.total()
        return True

    def sample_tactics(self, block, walkers):
        """Sample the next tactic of each pass. Returns {place it leads to: passes}."""
        moved, unproved = Counter(), self.theorem.get("unproved", ())
        requests = [(p.text, n, (self.theorem["id"], block, p.number)) for p, n in walkers.items()]
        for place, (tactics, seconds) in zip(walkers, self.sample(requests), strict=True):
            self.seconds["sampling"] += seconds
            self.blocks[block]["sampling"] += seconds
            for tactic, n in tactics.items():
                child = place.children.get(tactic)
                if child is None:
                    child = Place(place, tactic, len(self.places), block)
                    if tactic is None or is_refused(tactic, unproved):
                        child.kind = "refused"
                    self.places.append(child)
                    place.children[tactic] = child
                child.shared |= child.block != block
                self.counts["steps"] += n * (child.kind != "refused")
                moved[child] += n
        return moved

    def apply_tactics(self, places):
        """Apply the tactics of new places, while there is time."""
        for first in range(0, len(places), 64):
            if self.seconds.total() >= self.give_up_at:
                break
            part = places[first : first + 64]
            calls = [(place.parent.path, place.tactic) for place in part]
            outcomes = self.lean.do("apply", self.theorem, calls)
            for place, (place.kind, place.text, place.seconds) in zip(part, outcomes, strict=True):
                self.seconds["lean"] += place.seconds
            self.counts["calls"] += len(part)

    def result(self, status):
        """Replay the proofs, and return the theorem's line of results."""
        paths = [(place.path,) for place in self.proofs]
        outcomes = self.lean.do("replay", self.theorem, paths) if paths else []
        outcomes = zip(self.proofs, outcomes, strict=True)
        proofs = {place: states for place, (kind, states, _) in outcomes if kind == "proved"}
        for i, block in enumerate(self.blocks):
            own = [p.seconds for p in self.places if p.block == i and not p.shared]
            block["own"] = block.pop("sampling") + sum(own)
            block["successes"] = sum(self.proofs[place][i] for place in proofs)
        best, proof = min(proofs, key=lambda place: len(place.path), default=self.root), []
        states = [*proofs.get(best, []), "no goals"]
        for tactic, before, after in zip(best.path, states, states[1:], strict=False):
            proof.append({"tactic": tactic, "state_before": before, "state_after": after})
        return {
            "id": self.theorem["id"],
            "full_name": self.theorem["full_name"],
            "status": status,
            "asked": self.passes,
            "unfinished": self.passes - self.counts["in_time"],
            "successes": sum(self.proofs[place].total() for place in proofs),
            "in_time": sum(self.in_time[place] for place in proofs),
            "limit": self.limit,
            "blocks": [block for block in self.blocks if block["clock"] is not None],
            "proof": proof,
            "unreplayable": len(self.proofs) - len(proofs),
            "steps": self.counts["steps"],  # tactics that passes taken one by one would apply
            "tactic_calls": self.counts["calls"],
            "seconds": dict(self.seconds),
            "timeouts": self.lean.events["timeout"],
            "crashes": self.lean.events["crash"],
        }


def is_refused(tactic, unproved=()):
    """Whether a tactic is not even tried: it would prove nothing, cite a theorem whose proof is
    sorry (one of `unproved`), or not fit into a line of a terminal (4,095 bytes), as LeanDojo's."""
    request = json.dumps({"sid": 10**6, "cmd": tactic}, ensure_ascii=False)
    words = re.findall(r"[\w.']+|\?", tactic)  # exact? may find one
    cited = unproved and not {*unproved, "?"}.isdisjoint(words)
    return bool(UNTRUSTED.search(tactic) or cited or len(request.encode(errors="replace")) > 4000)


# ---- Lean, in Ray workers ------------------------------------------------------------------------
class LeanWorker:
    """A Ray actor with the environment of one theorem at a time. It is told paths, never states:
    what it has lost, it replays. An environment that raised any exception is thrown away."""

    def __init__(self, dojo, tactic_timeout, start_timeout, workers_here):
        # Lean's terminal hangs up however this process ends; under nohup that would be ignored.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        gigabytes = max(1, psutil.virtual_memory().total // workers_here >> 30)
        os.environ["TACTIC_MEMORY_LIMIT"] = f"{gigabytes}g"
        self.tactic_timeout, self.start_timeout = tactic_timeout, start_timeout
        self.theorem, self.manager, self.states = None, None, {}
        module, _, name = dojo.partition(":")
        self.module = import_module(module)
        self.environment = getattr(self.module, name)
        self.repository = cache(getattr(self.module, "LeanGitRepo", tuple))  # it may ask GitHub

    def enter(self):
        """Start a fresh environment of the theorem. Returns ("open", text of the first state)."""
        self.leave()
        entry = self.theorem
        if hasattr(self.module, "Theorem"):  # LeanDojo; other environments get the record
            repository, path = self.repository(entry["url"], entry["commit"]), entry["file_path"]
            entry = self.module.Theorem(repository, Path(path), entry["full_name"])
        self.manager = self.environment(entry, timeout=self.start_timeout)
        self.dojo, state = self.manager.__enter__()
        if hasattr(self.dojo, "proc"):  # LeanDojo has one time limit for the start and for tactics
            self.dojo.proc.timeout = self.tactic_timeout
            self.dojo.proc.delaybeforesend = None  # 50 ms before each tactic
        self.states = {(): state}
        return "open", state.pp

    def leave(self):
        with suppress(Exception):  # there may be none, or it has failed before
            self.manager.__exit__(None, None, None)
            self.manager.proc.close()  # hangs up, for processes that have lost their parent
        self.manager, self.states = None, {}

    def apply(self, path, tactic):
        """Return (kind, text of the state) of a tactic in the state at the end of `path`."""
        if self.manager is None:  # after a restart, which takes the path anew
            self.enter()
        if path not in self.states and self.apply(path[:-1], path[-1])[0] != "open":
            raise RuntimeError(f"{path[-1]} gives another result after a restart")
        result = self.dojo.run_tac(self.states[path], tactic)
        kind = KINDS.get(type(result).__name__, "error")
        if kind == "open":
            self.states[(*path, tactic)] = result
        return kind, getattr(result, "pp", "")

    def replay(self, path):
        """Return ("proved", the states along the path) if it is a proof in this environment, in
        which only other proofs have been replayed."""
        for i, tactic in enumerate(path):
            if path[:i] not in self.states and i > 0:
                return "error", []
            kind = "open" if path[: i + 1] in self.states else self.apply(path[:i], tactic)[0]
        return kind, [self.states[path[:i]].pp for i in range(len(path))]

    def do(self, method, theorem, items):
        """Return (kind, text or states, seconds) of the method for the first items, at least one:
        until something breaks or time is up. Replays begin in a fresh environment."""
        if theorem != self.theorem or method == "replay":
            self.leave()
        self.theorem, outcomes = theorem, []
        end = time.monotonic() + 2 * self.tactic_timeout
        for item in items:
            started = time.perf_counter()
            try:
                kind, text = getattr(self, method)(*item)
                "".join(text).encode()  # fails on half a character, which no tokenizer takes
            except Exception as error:  # whatever it is, it is counted, and this environment over
                self.leave()
                text = f"{type(error).__name__}: {error}"[:300]
                kind = "timeout" if "timeout" in text.lower() else "crash"
            outcomes.append((kind, text, time.perf_counter() - started))
            if kind in BROKEN or time.monotonic() > end:
                break
        return outcomes


class Lean:
    """The driver's end of a LeanWorker: replaces one that died or did not answer for `patience`
    seconds, and tries what broke once more, alone."""

    def __init__(self, ray, actor, settings, patience):
        self.ray, self.actor, self.settings, self.patience = ray, actor, settings, patience
        self.worker, self.events = actor.remote(*settings), Counter()

    def ask(self, *inputs):
        """Return (what LeanWorker.do answers or one failed attempt, whether it answered)."""
        started, answered = time.perf_counter(), True
        try:
            answer = self.ray.get(self.worker.do.remote(*inputs), timeout=self.patience)
        except self.ray.exceptions.RayError as error:
            self.ray.kill(self.worker)
            self.worker, answered = self.actor.remote(*self.settings), False
            kind = "timeout" if isinstance(error, TimeoutError) else "crash"
            answer = [(kind, f"no answer: {error}"[:300], time.perf_counter() - started)]
        self.events[answer[-1][0]] += 1
        return answer, answered

    def do(self, method, theorem, items):
        """Return (kind, text or states, seconds) of each item. method: of LeanWorker."""
        outcomes, at_once = [], len(items)
        while len(outcomes) < len(items):
            rest = items[len(outcomes) :]
            answer, answered = self.ask(method, theorem, rest[:at_once])
            at_once = at_once if answered else 1  # any of them may have ended the worker
            if answer[-1][0] in BROKEN:
                *answer, (_, _, lost_seconds) = answer
                ((kind, text, seconds),), _ = self.ask(method, theorem, rest[len(answer) :][:1])
                answer.append((kind, text, lost_seconds + seconds))
            outcomes += answer
        return outcomes


# ---- All theorems by one model -------------------------------------------------------------------
class TacticSampler:
    """Samples tactics from a checkpoint, for the states of several searches at once."""

    def __init__(self, args, checkpoint, times):
        record, self.tokenizer = read_record(checkpoint), common.load_tokenizer(checkpoint)
        self.prompt = record["prompt"] or common.TEMPLATES["lean"].prompt
        self.seed = common.seed_of(args.seed, *Path(checkpoint).parts[-2:], times)
        self.max_new_tokens = record["max_new_tokens"]
        context = common.load_config(checkpoint).max_position_embeddings
        self.room = min(record["max_length"], context - self.max_new_tokens)  # for a state
        length = self.room + self.max_new_tokens
        accelerator = common.make_accelerator()
        self.sampler = common.make_sampler(args, accelerator, checkpoint, self.tokenizer, length)
        self.sampler.tokens = 1 << 20  # of transformers: passes in one place share rows

    def sample(self, requests):
        """requests: (text of a state, n, key for the seed). Returns for each (Counter of n tactics,
        seconds). Long states lose their start: the goal stands at their end."""
        started, prompts = time.perf_counter(), []
        for text, _, _ in requests:
            ids = self.tokenizer(self.prompt.replace("{problem}", text)).input_ids
            ids = ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids
            prompts.append(ids[-self.room :])
        counts = [n for _, n, _ in requests]
        seeds = [common.seed_of(self.seed, key) for _, _, key in requests]
        found = self.sampler.generate(prompts, counts, self.max_new_tokens, seeds)
        tactics = [common.count_answers(one, self.tokenizer, "lean") for one in found]
        seconds = (time.perf_counter() - started) / sum(counts)
        return [(one, seconds * n) for one, n in zip(tactics, counts, strict=True)]


def prove_all(args, checkpoint, times, theorems, path):
    """Search proofs of all theorems with one model; append a line to `path` as each search ends."""
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a thread that is late starts no second Ray
    ray = common.start_ray()
    cores, nodes = int(ray.cluster_resources()["CPU"]), sum(one["Alive"] for one in ray.nodes())
    working = min(args.workers or cores, len(theorems))
    settings = args.dojo, args.tactic_timeout, args.start_timeout, math.ceil(working / nodes)
    actor = ray.remote(LeanWorker).options(num_cpus=0, scheduling_strategy="SPREAD")
    patience = 30 + 2 * args.start_timeout + 8 * args.tactic_timeout
    crew = [Lean(ray, actor, settings, patience) for _ in range(working)]
    ray.get([lean.worker.__ray_ready__.remote() for lean in crew], timeout=900)
    sampler = TacticSampler(args, checkpoint, times)
    inbox = SimpleQueue()  # of the threads' requests, results and errors; None: a thread has ended
    waiting = iter(theorems)  # all threads take from it

    def work(lean):
        def sample(requests):
            answer = Future()
            inbox.put((answer, requests))
            return answer.result()

        try:
            for theorem in waiting:
                inbox.put(Search(theorem, args.passes * times, args, lean, sample).run())
            inbox.put(None)
        except BaseException as error:
            inbox.put(error)

    for lean in crew:
        threading.Thread(target=work, args=[lean], daemon=True).start()
    progress = tqdm(total=len(theorems), unit="theorem", desc=path.stem, mininterval=1)
    while working:
        requests = []
        for item in [inbox.get() for _ in range(max(1, inbox.qsize()))]:
            if isinstance(item, BaseException):
                raise item
            if item is None:
                working -= 1
            elif isinstance(item, tuple):
                requests.append(item)
            else:
                with open(path, "a") as file:
                    file.write("\n" + json.dumps(item))  # a cut line before it stays alone
                progress.update()
        if requests:
            answers = iter(sampler.sample([one for _, part in requests for one in part]))
            for future, part in requests:
                future.set_result([next(answers) for _ in part])
    with suppress(ray.exceptions.RayError):
        ray.get([lean.worker.leave.remote() for lean in crew], timeout=60)
    sampler.sampler.shut_down()


# ---- Estimates and tables ------------------------------------------------------------------------
def paper(result, n):
    """The paper's estimate of pass@n: passes that had not ended in time have failed."""
    return float(common.pass_at_n(result["asked"], result["in_time"], n))


def unbiased(result, n):
    """Estimate pass@n without the bias of the time limit; a lower bound from fewer than n passes.

    How many blocks fit into the limit depends on how long they take, and so perhaps on what they
    prove: their plain average is biased. But the search ended with the first block after which time
    was over, and so it would in any order of the blocks that ends with one without which it was
    not. These are equally likely, so the estimate from the other blocks, averaged over the possible
    last ones, is unbiased.
    """
    blocks = result["blocks"]
    passes, right = (sum(block[name] for block in blocks) for name in ("passes", "successes"))
    if passes < n:
        return float(right > 0)
    end, limit = blocks[-1]["clock"], result["limit"]
    last = [block for block in blocks if end >= limit > end - block["own"]]
    if last and all(passes - block["passes"] >= n for block in last):
        without = [(passes - block["passes"], right - block["successes"]) for block in last]
        return float(np.mean([common.pass_at_n(size, c, n) for size, c in without]))
    return float(common.pass_at_n(passes, right, n))


def estimate_all(args, runs, ns, estimate):
    """Return {label: {n: pass@n of each theorem [T]}}. runs: {label: results}."""
    rates, missed = {}, dict.fromkeys(ns, 1.0)  # missed: Π_m (1 - pass_m@n)
    for label, results in runs.items():
        times = results[0]["asked"] // args.passes
        rates[label] = {n: np.array([estimate(one, n * times) for one in results]) for n in ns}
        if label in args.model:
            missed = {n: missed[n] * (1 - rates[label][n]) for n in ns}
    if args.ensemble:
        rates["ensemble"] = {n: 1 - missed[n] for n in ns}
    return rates


def print_table(title, rows):
    """Print means of {label: {n: values [T]}} in percent with 95 % intervals, and return them."""
    ns = list(next(iter(rows.values())))
    print(f"\n{title}\n\n| | {' | '.join(f'pass@{n}' for n in ns)} |\n|---{'|---' * len(ns)}|")
    table = {}
    for label, values in rows.items():
        table[label] = {n: common.mean_and_interval(values[n]) for n in ns}
        scaled = [{name: 100 * x for name, x in row.items()} for row in table[label].values()]
        cells = ["{pass:.1f} [{low:.1f}, {high:.1f}]".format(**row) for row in scaled]
        print(f"| {label} | {' | '.join(cells)} |")
    return table


def report(args, runs, theorems):
    """Print the tables, write prove.json, success.png and proofs.json. runs: {label: results}."""
    rates = estimate_all(args, runs, args.ns, paper)
    saved = {"paper": print_table("Theorems proved (%), 95 % intervals over theorems", rates)}
    first, *others = rates
    pairs = [(label, first) for label in others]
    if args.ensemble and args.baseline:
        pairs.append((others[-1], others[-2]))
    rows = {}
    for one, two in pairs:
        rows[f"{one} less {two}"] = {n: rates[one][n] - rates[two][n] for n in args.ns}
    if rows:
        saved["differences"] = print_table("Paired differences on the same theorems", rows)
    if any(result["status"] != "done" for one_run in runs.values() for result in one_run):
        title = "Without the bias of the time limit (a lower bound where N passes were not made)"
        saved["unbiased"] = print_table(title, estimate_all(args, runs, args.ns, unbiased))
    names = ("tactic_calls", "steps", "unfinished", "timeouts", "crashes", "unreplayable")
    for label, one_run in runs.items():
        ends = Counter(result["status"] for result in one_run)
        proved = sum(result["successes"] > 0 for result in one_run)
        totals = {name: sum(result[name] for result in one_run) for name in names}
        print(f"\n{label}: proved {proved}; {dict(ends)}; {totals}")
    (args.out / "prove.json").write_text(json.dumps(saved, indent=1))
    curve = [2**i for i in range(args.passes.bit_length())]
    draw(estimate_all(args, runs, curve, paper), args.out / "success.png")
    save_proofs(args.out / "proofs.json", runs, theorems)


def draw(rates, path):
    """Figure 2c: theorems proved over the number of passes, with 95 % intervals."""
    _, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, by_n in rates.items():
        rows = [common.mean_and_interval(values) for values in by_n.values()]
        mean, low, high = ([100 * row[name] for row in rows] for name in ("pass", "low", "high"))
        axes.plot(list(by_n), mean, label=label)
        axes.fill_between(list(by_n), low, high, alpha=0.15)
    axes.set(xscale="log", xlabel="N (passes per theorem and model)", ylabel="theorems proved (%)")
    axes.legend(fontsize="small")
    plt.savefig(path, dpi=150)


def save_proofs(path, runs, theorems):
    """Write a proof per theorem and model, in the format of LeanDojo's benchmark."""
    known = {theorem["id"]: theorem for theorem in theorems}
    found = [result for results in runs.values() for result in results if result["proof"]]
    lines = [json.dumps(known[one["id"]] | {"traced_tactics": one["proof"]}) for one in found]
    path.write_text("[" + ",\n".join(dict.fromkeys(lines)) + "]\n")


if __name__ == "__main__":
    main()
