#!/usr/bin/env python3
"""Flywheel's device runtime against ONNX Runtime and LiteRT: same models, same pictures, one thread.

    cargo build --release -p flywheel-agent
    python3 tests/compare/compare.py [--json FILE]

It makes a virtual environment of its own (from PyPI, pinned in requirements.txt), starts each
runtime as a process, and lets them take turns over the same pictures in random order, so that
whatever else the machine does falls on all of them alike. Figures are medians over turns of the
median frame of a turn. Pictures and foreign models come from the folder that FLYWHEEL_DATA names
(default ../shared/data beside the repository); a model that is not there is left out, by name.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SEED = 7
PICTURES = 200
RUNTIMES = ("flywheel", "ort", "litert")
NAMES = {"flywheel": "Flywheel (tract)", "ort": "ONNX Runtime", "litert": "LiteRT"}


def main():
    args = arguments()
    venv = args.venv
    if Path(sys.prefix).resolve() != venv.resolve():
        # Once more, inside the environment.
        python = environment(venv)
        os.execv(python, [str(python), str(Path(__file__).resolve()), *sys.argv[1:]])
    if not args.agent.is_file():
        sys.exit(f"{args.agent}: not there; run `cargo build --release -p flywheel-agent` first")
    with tempfile.TemporaryDirectory(prefix="flywheel-compare-") as folder:
        report = {
            "machine": machine(),
            "versions": {name: metadata.version(name) for name in ("onnxruntime", "ai-edge-litert")},
            "sizes_mb": sizes(args.agent, Path(folder)),
            "cases": [],
        }
        for case in cases(args, Path(folder)):
            print(f"{case['name']}: {case['note']}", file=sys.stderr)
            report["cases"].append(measure(args, case))
    print(table(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="See the README beside this script."
    )
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    data = os.environ.get("FLYWHEEL_DATA", ROOT / "../shared/data")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--agent", type=Path, default=target / "release/flywheel-agent")
    parser.add_argument("--data", type=Path, default=Path(data))
    parser.add_argument("--venv", type=Path, default=cache / "flywheel-compare/venv")
    parser.add_argument("--turns", type=int, default=60, help="turns of each runtime")
    parser.add_argument("--block", type=int, default=25, help="pictures in a turn")
    parser.add_argument("--starts", type=int, default=7, help="starts that are timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures here")
    args = parser.parse_args()
    if not 1 <= args.block <= PICTURES:
        parser.error(f"--block must be 1 to {PICTURES}")
    if min(args.turns, args.starts) < 1:
        parser.error("--turns and --starts must be at least 1")
    return args


def environment(venv):
    """The interpreter of the virtual environment, made if what is wanted has changed."""
    wanted = (HERE / "requirements.txt").read_text()
    stamp, python = venv / "requirements.txt", venv / "bin/python"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"making {venv} from PyPI", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        requirements = str(HERE / "requirements.txt")
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "-r", requirements], check=True
        )
        stamp.write_text(wanted)
    return python


def machine():
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "Model"))
    ]
    return {"cpu": names[0] if names else "unknown", "cpus": os.cpu_count()}


def sizes(agent, folder):
    """Megabytes (10^6) on disk: the stripped agent; a runtime's package with what it requires and
    Pillow, without the Python interpreter."""
    stripped = folder / "agent"
    shutil.copy(agent, stripped)
    if shutil.which("strip"):
        subprocess.run(["strip", str(stripped)], check=True)
    return {
        "flywheel": stripped.stat().st_size / 1e6,
        "ort": installed("onnxruntime", "pillow"),
        "litert": installed("ai-edge-litert", "pillow"),
    }


def installed(*names):
    seen, total, waiting = set(), 0, list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            # A requirement of an extra or of another platform.
            continue
        total += sum(
            path.stat().st_size
            for path in (package.locate_file(f) for f in package.files or [])
            if path.is_file() and path.suffix != ".pyc"
        )
        for requirement in package.requires or []:
            if "extra ==" not in requirement:
                head = requirement.split(";")[0]
                waiting.append("".join(c if c.isalnum() or c in "-_." else " " for c in head).split()[0])
    return total / 1e6


def cases(args, folder):
    """Models with the pictures they are run on."""
    digits, cifar = args.data / "mnist_idx", args.data / "cifar10_lossless"
    resnet = "vnncomp_cifar10/benchmarks/cifar10_resnet/onnx/resnet_2b.onnx"
    tiny = "mlperf_tiny/benchmark/training/image_classification/trained_models"
    for name, path, source, make, note in (
        ("mnist_8", "libonnx/mnist_8/model.onnx", digits, digit_pictures, "28×28 PNG, no resizing"),
        ("resnet_2b", resnet, cifar, cifar_pictures, "32×32 PNG, no resizing"),
        ("resnet8_int8", f"{tiny}/pretrainedResnet_quant.tflite", cifar, cifar_pictures,
         "MLPerf Tiny, int8, 32×32 PNG, no resizing"),
    ):
        model, pictures = args.data / "models" / path, folder / source.name
        if not (model.is_file() and source.is_dir()):
            absent(name, model, source)
            continue
        if not pictures.is_dir():
            make(source, pictures)
        yield case(args, folder, name, model, pictures, note)
    built_in = folder / "built-in"
    subprocess.run([args.agent, "bench", "--export", built_in], check=True, capture_output=True)
    waste = args.data / "trashnet_small"
    if waste.is_dir():
        pictures = copied(sorted(waste.rglob("*.jpg")), folder / "waste")
        yield case(args, folder, "built-in", built_in, pictures, "150×150 JPEG, resized to 32×32")
    else:
        absent("built-in", waste)


def absent(name, *paths):
    missing = ", ".join(str(path) for path in paths if not path.exists())
    print(f"{name} is left out: {missing} is not there", file=sys.stderr)


def case(args, folder, name, model, pictures, note):
    import convert
    import quantised

    if model.suffix == ".tflite":
        # Its input is in its own integers, which stand for pixels as they are.
        onnx, tflite, own = folder / f"{name}.onnx", model, {"divisor": 1}
        quantised.convert(tflite, onnx)
        model = onnx
    else:
        onnx = model / "model.onnx" if model.is_dir() else model
        tflite, own = folder / f"{name}.tflite", {}
        convert.convert(onnx, tflite)
    command = [args.agent, "bench", "--engine", "tract", "--stdin", "--model", model]
    command += ["--source", f"dir:{pictures}"]
    spec = spec_of(command)
    worker = [sys.executable, HERE / "worker.py"]
    spec = {key: spec[key] for key in ("input", "mean", "std", "divisor")}
    return {
        "name": name,
        "note": note,
        "bytes": {"onnx": onnx.stat().st_size, "tflite": tflite.stat().st_size},
        "commands": {
            "flywheel": command,
            "ort": [*worker, "ort", onnx, pictures, json.dumps(spec)],
            "litert": [*worker, "litert", tflite, pictures, json.dumps({**spec, **own})],
        },
    }


def spec_of(command):
    process = Process(command)
    process.end()
    return process.ready["model"]


def digit_pictures(folder, to):
    import numpy
    from PIL import Image

    path = next(folder.glob("t10k-images*"))
    opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    with opened as file:
        data = numpy.frombuffer(file.read(), numpy.uint8)[16:].reshape(-1, 28, 28)
    to.mkdir()
    for index in range(PICTURES):
        Image.fromarray(data[index]).save(to / f"{index:04}.png")
    return to


def cifar_pictures(folder, to):
    """A picture of the set holds a thousand images, one a row: 32 × 32 × RGB."""
    import numpy
    from PIL import Image

    sheet = numpy.asarray(Image.open(sorted(folder.glob("*.png"))[0]))
    images = sheet.reshape(sheet.shape[0], -1)[:PICTURES].reshape(PICTURES, 32, 32, 3)
    to.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(to / f"{index:04}.png")
    return to


def copied(paths, to):
    to.mkdir()
    step = max(1, len(paths) // PICTURES)
    for index, path in enumerate(paths[::step][:PICTURES]):
        shutil.copy(path, to / f"{index:04}{path.suffix}")
    return to


class Process:
    """A runtime that is asked line by line."""

    def __init__(self, command):
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
        )
        self.ready = self.answer()
        self.start_ms = 1000 * (time.perf_counter() - start)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            words = " ".join(map(str, self.process.args))
            sys.exit(f"ended early (code {self.process.wait()}): {words}")
        return json.loads(line)

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def measure(args, case):
    rng = random.Random(SEED)
    starts = {runtime: [] for runtime in RUNTIMES}
    for _ in range(args.starts):
        for runtime in rng.sample(RUNTIMES, len(RUNTIMES)):
            process = Process(case["commands"][runtime])
            starts[runtime].append(process.start_ms)
            process.end()
    processes = {runtime: Process(case["commands"][runtime]) for runtime in RUNTIMES}
    laps = {runtime: {} for runtime in RUNTIMES}
    top1 = {runtime: {} for runtime in RUNTIMES}
    for turn in range(args.turns + 1):
        first = rng.randrange(PICTURES - args.block + 1)
        for runtime in rng.sample(RUNTIMES, len(RUNTIMES)):
            answer = processes[runtime].ask(f"run {first} {args.block}")
            decisions = answer.pop("top1")
            top1[runtime].update(zip(range(first, first + args.block), decisions))
            # The first turn warms up.
            for stage, nanos in answer.items() if turn else ():
                laps[runtime].setdefault(stage, []).append(statistics.median(nanos) / 1000)
    result = {"name": case["name"], "note": case["note"], "bytes": case["bytes"], "runtimes": {}}
    for runtime in RUNTIMES:
        mine = laps[runtime]
        frame = [sum(turn) for turn in zip(*(mine[s] for s in mine if s not in ("read", "total")))]
        stages = {stage: statistics.median(turns) for stage, turns in mine.items()}
        result["runtimes"][runtime] = {
            "stages_us": stages,
            "infer_us": stages["infer"],
            "frame_us": statistics.median(frame),
            "total_us": stages["total"],
            "start_ms": statistics.median(starts[runtime]),
            **processes[runtime].ask("memory"),
        }
        # Of each turn by itself: what the machine did meanwhile cancels out.
        reference = laps["flywheel"]
        for stage in ("infer", "total"):
            ratios = [ours / theirs for ours, theirs in zip(reference[stage], mine[stage])]
            result["runtimes"][runtime][f"{stage}_ratio"] = statistics.median(ratios)
        pictures = top1["flywheel"].keys()
        same = sum(top1[runtime][index] == top1["flywheel"][index] for index in pictures)
        result["runtimes"][runtime]["same_decision"] = same / len(pictures)
        processes[runtime].end()
    return result


def table(report):
    cpu = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{cpu['cpu']}, {cpu['cpus']} CPUs; {versions}; one thread each, turns interleaved.",
        "Ratios are Flywheel's time by the other's: below 1 Flywheel is faster.",
        "",
        "| model | runtime | infer µs | ratio | picture → decision µs | ratio | RSS MB | start ms |"
        " same decision |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        for runtime, r in case["runtimes"].items():
            lines.append(
                f"| {case['name']} | {NAMES[runtime]} | {r['infer_us']:.1f} | {r['infer_ratio']:.2f} "
                f"| {r['total_us']:.0f} | {r['total_ratio']:.2f} | {r['rss_kib'] * 1.024 / 1000:.0f} "
                f"| {r['start_ms']:.0f} | {100 * r['same_decision']:.1f} % |"
            )
    lines += ["", "| | MB on disk |", "|---|---|"]
    lines += [f"| {NAMES[runtime]} | {mb:.1f} |" for runtime, mb in report["sizes_mb"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
