"""What `scripts/trial.sh` tries, in the folder and environment that it made."""

import copy
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from PIL import Image, features

import dynaslim
from dynaslim.runtime.package import PackageError, manifest_digest, open_package

WORK = Path.cwd()
DYNASLIM = WORK / "venv/bin/dynaslim"
DRAWINGS = sorted((Path(dynaslim.__file__).parent / "shipped/pictures").glob("*.png"))
CPU_S = 1.5
"""Of a mistake; with torch imported it is more."""


class FailedError(Exception):
    """What a point found instead."""


class SkippedError(Exception):
    """Why a point cannot be tried here."""


def expect(holds, message):
    if not holds:
        raise FailedError(str(message).strip()[-600:])


# -- what is needed -------------------------------------------------------------------------------


def run(*argv, code=0, seconds=150, **env):
    """What a command prints, on both streams; it leaves with `code` and no traceback."""
    done = subprocess.run(
        [DYNASLIM, *map(str, argv)], capture_output=True, text=True, timeout=seconds,
        stdin=subprocess.DEVNULL, env={**os.environ, **env},
    )  # fmt: skip
    name = " ".join(map(str, argv[:2]))
    expect("Traceback" not in done.stderr, f"{name}: traceback: {done.stderr}")
    expect(done.returncode == code, f"{name}: left with {done.returncode}: {done.stderr}")
    return done.stdout, done.stderr


def refused(*argv, code=1, **env):
    """The one line of a command that fails."""
    message = run(*argv, code=code, **env)[1]
    expect(len(message.splitlines()) == 1, f"{argv[0]}: more than a line: {message}")
    return message


def drawn(folder, each, classes=10, seed=0):
    """The drawings turned, shaded and speckled, in class folders."""
    chance = random.Random(seed)
    for number, file in enumerate(DRAWINGS[:classes] * each):
        picture = Image.open(file).convert("RGB").rotate(chance.uniform(-25, 25))
        picture = Image.blend(picture, speckled(chance, picture.size), chance.uniform(0, 0.5))
        target = folder / file.stem / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
    return folder


def speckled(chance, size):
    """A picture of coarse noise."""
    coarse = Image.frombytes("RGB", (8, 8), chance.randbytes(192))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def damage(folder, count):
    """So many files of a folder that are no pictures, beside those that are."""
    for n in range(count):
        (next(p for p in sorted(folder.iterdir()) if p.is_dir()) / f"broken{n}.png").write_bytes(
            DRAWINGS[0].read_bytes()[:200]
        )


def once(make, made={}):  # noqa: B006
    """What is made for several points, made once."""
    if make not in made:
        made[make] = make()
    return made[make]


def package():
    run("export", "cifar10", WORK / "package")
    return WORK / "package"


def pictures():
    return drawn(WORK / "pictures", 13)


@contextmanager
def disk(name, full=False):
    """A folder of a small disk that is read-only or full; skipped where none can be mounted."""
    folder = WORK / "disks" / name
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        raise SkippedError("no small disk can be mounted here")
    try:
        if full:
            (folder / "full").write_bytes(bytes((2 << 20) - 8192))
        else:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def served(model, *flags, **env):
    """A server's process and port."""
    command = [DYNASLIM, "serve", str(model), "--port", "0", *flags]
    with open(WORK / "served.err", "w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **env}
        )
        killer = threading.Timer(120, process.kill)
        killer.start()
        try:
            found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
            errors.seek(0)
            expect(found, f"serve did not start: {errors.read()}")
            yield process, int(found[1])
            errors.seek(0)
            expect("Traceback" not in (printed := errors.read()), f"serve: traceback: {printed}")
        finally:
            killer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()


def body_of(content):
    head = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    return head + content + b"\r\n--b--\r\n"


def post(port, content):
    """The status of a prediction, and how long it took."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n%s\r\n--b--\r\n'
    )
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/predict", body % content,
        {"Content-Type": "multipart/form-data; boundary=b"},
    )  # fmt: skip
    began = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
        error.close()
    return status, time.monotonic() - began


def memory(process):
    """Bytes of a process and its children, shared ones counted once."""
    pids, total = [str(process.pid)], 0
    for tasks in Path(f"/proc/{process.pid}/task").glob("*/children"):
        pids += tasks.read_text().split()
    for pid in pids:
        try:
            found = re.search(r"Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
        except OSError:  # it has ended
            continue
        total += int(found[1]) * 1024 if found else 0
    return total


# -- the points -----------------------------------------------------------------------------------


def cache():
    """A read-only or full cache: a warning, and it goes on."""
    file = DRAWINGS[0]
    in_the_way = WORK / "in_the_way"
    in_the_way.write_text("")

    def goes_on(folder, why, *flags):
        out, err = run("predict", file, "--json", *flags, DYNASLIM_CACHE=str(folder))
        warned = [line for line in err.splitlines() if "compiled programs are not kept" in line]
        expect(json.loads(out)["predicted"] == 1, "nothing was predicted")
        expect(len(warned) == 1 and why in warned[0], f"warned of {why!r}: {err}")

    goes_on(in_the_way / "cache", "is a file, not a folder", "--backend", "onnxruntime")
    err = run("predict", file, "--no-cache", DYNASLIM_CACHE=str(in_the_way / "cache"))[1]
    expect("warning" not in err, err)
    with disk("ro") as folder:
        for backend in ("auto", "onnxruntime", "openvino"):
            goes_on(folder / "cache", "Read-only file system", "--backend", backend)
        printed = run("doctor", "--quick", DYNASLIM_CACHE=str(folder))[0]
        expect("Read-only file system" in printed, f"doctor: {printed}")
        with served("cifar10", DYNASLIM_CACHE=str(folder)) as (_, port):
            expect(post(port, file.read_bytes())[0] == 200, "the server does not answer")
    with disk("full", full=True) as folder:
        for backend in ("onnxruntime", "openvino"):
            goes_on(folder / "cache", "the disk is full", "--backend", backend)
        expect([p.name for p in folder.iterdir()] == ["full"], "something half is left")


def budget():
    """Budgets: what other pictures cost is reported, --hold holds, the reachable range is named."""
    folder = WORK / "unlike"
    folder.mkdir()
    chance = random.Random(1)
    for n in range(96):
        speckled(chance, (96, 96)).save(folder / f"{n}.jpg", quality=60)

    def cost(*flags):
        out, err = run("predict", folder, "--json", *flags)
        found = json.loads(out)
        return sum(image["madds"] for image in found["images"]) / len(found["images"]), found, err

    curve = json.loads(run("info", "cifar10", "--json")[0])["checkpoint"]["budget"]
    widest = curve["widest_madds"] * (1 + 1e-6)
    mean, found, _ = cost("--budget", "0.5")
    expect(found["unlike_curve"] is True, f"not reported: {found['cost_ratio']}")
    expect(abs(found["cost_ratio"] - mean / found["expected_madds"]) < 1e-6, found["cost_ratio"])
    for share in ("0.3", "1"):
        held = cost("--budget", share, "--hold")[0]
        expect(held <= float(share) * widest, f"--hold: {held} of {widest}")
    expect("reaches from" in cost("--budget", "0.05")[2], "no range is named")


def few_images():
    """Budget curves: too few images are refused, few are reported, intervals are kept."""
    out = WORK / "curve.safetensors"
    few = drawn(WORK / "fifteen", 2)
    calibrate = ("calibrate-budget", "cifar10", "--out", out, "--data")
    message = refused(*calibrate, few, "--split", "whole")
    expect("too few" in message and not out.exists(), message)
    printed, _ = run(*calibrate, once(pictures), "--split", "whole")
    expect("few images" in printed and "±" in printed, printed)
    points = json.loads(run("info", out, "--json")[0])["checkpoint"]["budget"]["points"]
    expect(all(len(point["top1_interval"]) == 2 for point in points), "no intervals")


def large_pictures():
    """Four clients with small files of large pictures starve nobody."""
    buffers = []
    for kind in ("PNG", "WEBP"):
        if kind == "PNG" or features.check("webp"):
            Image.new("L", (16_383, 3000)).convert("RGB").save(made := io.BytesIO(), kind)
            buffers.append(made.getvalue())
    small, stopped, codes, highest = DRAWINGS[0].read_bytes(), threading.Event(), Counter(), [0]
    with served("cifar10") as (process, port):

        def ordinary(seconds):
            answers, end = [], time.monotonic() + seconds
            while time.monotonic() < end:
                answers.append(post(port, small))
                time.sleep(0.02)
            times = sorted(taken for _, taken in answers)
            return Counter(status for status, _ in answers), times[int(0.99 * (len(times) - 1))]

        def hostile(content):
            end = time.monotonic() + 30
            while not stopped.is_set() and time.monotonic() < end:
                codes[post(port, content)[0]] += 1

        def watch():
            end = time.monotonic() + 30
            while not stopped.wait(0.05) and time.monotonic() < end:
                highest[0] = max(highest[0], memory(process))

        ordinary(1)
        _, quiet = ordinary(4)
        with ThreadPoolExecutor(5) as pool:
            tasks = [pool.submit(hostile, (buffers * 4)[n]) for n in range(4)]
            tasks.append(pool.submit(watch))
            try:
                statuses, beside = ordinary(8)
            finally:
                stopped.set()
            for task in tasks:
                task.result()
        latencies = f"p99 {1000 * quiet:.0f} ms, beside them {1000 * beside:.0f} ms"
        expect(set(statuses) == {200}, f"ordinary requests: {dict(statuses)}")
        expect(set(codes) <= {200, 413, 429, 504}, f"large pictures: {dict(codes)}")
        # the clients share the cores: below a quarter of a second it is their noise
        expect(beside < max(4 * quiet, 0.25), latencies)
        expect(highest[0] < 900e6, f"{highest[0] / 1e6:.0f} MB of memory")
        return f"{latencies}; at most {highest[0] / 1e6:.0f} MB"


def links():
    """A package behind symbolic links runs."""
    snapshot = WORK / "hub/snapshots/0"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(once(package).iterdir())):
        blob = WORK / f"hub/blobs/{number:064x}"
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")

    def answers(model, backend):
        results = json.loads(run("predict", model, DRAWINGS[0], "--json", "--backend", backend)[0])
        return [(image["class_name"], image["route"]) for image in results["images"]]

    for backend in ("onnxruntime", "openvino"):
        expect(answers(snapshot, backend) == answers(once(package), backend), backend)


def damaged():
    """Damaged pictures are named, counted and limited, alike in all verbs."""
    folder = drawn(WORK / "damaged", 13)
    damage(folder, 1)
    for verb in (("evaluate", "cifar10"), ("calibrate", "cifar10", WORK / "out.safetensors")):
        out, err = run(*verb, "--data", folder, "--split", "whole")
        expect("1 skipped" in out and "broken0.png" in out + err, f"{verb[0]}: {out} {err}")
    out, err = run("predict", folder, "--json", code=1)
    expect(json.loads(out)["predicted"] == 130 and "broken0.png" in err, f"predict: {err}")
    damage(folder, 5)
    expect("broken" in refused("evaluate", "cifar10", "--data", folder), "no file is named")
    run("evaluate", "cifar10", "--data", folder, "--corrupt-limit", "0.1")


def own_data():
    """Own pictures: skipped files, the new classifier and images trained on are reported."""
    folder = drawn(WORK / "own", 40, classes=2)
    damage(folder, 1)
    out, err = run(
        "train", "supernet", "--init", "cifar10", "--model", "ds_resnet8_cifar", "--data.path",
        folder, "--data.image-size-px", "32", "--epochs", "1", "--batch-size", "16", "--out",
        WORK / "run",
    )  # fmt: skip
    expect("1 skipped" in out + err and "broken0.png" in out + err, f"train: {out} {err}")
    expect("started anew" in out + err, f"train: {out} {err}")
    printed, _ = run("evaluate", WORK / "run", "--data", folder)
    expect("which training held out" in printed, printed)
    printed, _ = run("evaluate", WORK / "run", "--data", folder, "--split", "whole")
    expect("was trained on" in printed, printed)


def mistakes():
    """Mistakes come at once, and one picture takes a few seconds of one core."""

    def taken(*argv, **given):
        began = getrusage(RUSAGE_CHILDREN)
        run(*argv, **given)
        ended = getrusage(RUSAGE_CHILDREN)
        return ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime

    for argv in (
        ("evaluate", "nosuch", "--data", "nosuch"),
        ("evaluate", "cifar10", "--data", "./nosuch"),
        ("predict", "nosuch.png"),
        ("predict", DRAWINGS[0], "--budget", "lots"),
        ("export", "nosuch", WORK / "out"),
        ("calibrate-budget", "cifar10", "--data", "no/such/folder"),
        ("serve", "nosuch"),
        ("report", "nosuch", "-o", "report.html"),
        ("train", "supernet", "--data.path", "/nosuch", "--out", WORK / "nothing"),
        ("doctor", "--nosuch"),
    ):
        began = getrusage(RUSAGE_CHILDREN).ru_utime
        done = subprocess.run(
            [DYNASLIM, *map(str, argv)], capture_output=True, text=True, timeout=60
        )
        seconds = getrusage(RUSAGE_CHILDREN).ru_utime - began
        expect(done.returncode in (1, 2), f"{argv}: left with {done.returncode}")
        expect(len(done.stderr.splitlines()) == 1, f"{argv}: {done.stderr}")
        expect(seconds < CPU_S, f"{argv[0]} {argv[1]}: {seconds:.1f} s of a core")
    taken("predict", DRAWINGS[0])  # which compiles
    seconds = taken("predict", DRAWINGS[0])
    expect(seconds < 3.5, f"predict: {seconds:.1f} s of a core")
    return f"predict {seconds:.1f} s of a core"


def stop():
    """SIGTERM under load resets no new connection."""
    body = body_of(DRAWINGS[0].read_bytes())
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
    head += b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    outcomes, end = Counter(), time.monotonic() + 60
    with served("cifar10") as (process, port):

        def client():
            while time.monotonic() < end:
                try:
                    with socket.create_connection(("127.0.0.1", port), 20) as connection:
                        connection.sendall(head + body)
                        outcomes[connection.recv(12)[9:].decode()] += 1
                except ConnectionRefusedError:
                    return
                except OSError as error:
                    outcomes[type(error).__name__] += 1

        threads = [threading.Thread(target=client, daemon=True) for _ in range(16)]
        for thread in threads:
            thread.start()
        while outcomes["200"] < 300 and time.monotonic() < end:
            time.sleep(0.01)
        process.terminate()
        code = process.wait(40)
        for thread in threads:
            thread.join(30)
    expect(set(outcomes) <= {"200", "503", "429"} and outcomes["503"], dict(outcomes))
    expect(code == 0, f"left with {code}")
    return ", ".join(f"{count} of {kind}" for kind, count in sorted(outcomes.items()))


def manifest():
    """Altered and hostile manifests are refused in a line."""
    folder = shutil.copytree(once(package), WORK / "altered")
    file = folder / "manifest.json"
    text = file.read_text()
    good = json.loads(text)
    accepted, tried = [], 0

    def refuse(content, what):
        nonlocal tried
        tried += 1
        file.write_text(content)
        try:
            open_package(folder)
        except PackageError as error:
            expect(len(str(error).splitlines()) == 1 and str(error).isprintable(), error)
        else:
            accepted.append(what)

    def places(value, path=()):
        for key, held in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key), held
            if isinstance(held, dict | list) and len(path) < 3:
                yield from places(held, (*path, key))

    def altered(path, value):
        made = holder = copy.deepcopy(good)
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        return made

    def signed(made):
        return json.dumps({**made, "sha256": manifest_digest(made)})

    for path, held in places(good):
        for other in (None, "x", -1, 2**63, [], {"x": 1}):
            if other != held:
                refuse(json.dumps(altered(path, other)), (path, other))
    pre = ("preprocessing", "mean")
    names = good["class_names"]
    hostile = [
        signed(altered(pre, [2**63] * 3)),
        signed(altered(("class_names",), list(range(len(names))))),
        signed(altered(("class_names",), ["\x1b[2J" + names[0], *names[1:]])),
        signed({**good, "unknown": 1}),
        text.replace('"version"', '"version": 2, "version"', 1),
        text.replace('"metrics": {', '"metrics": {"x": ' + "[" * 100_000 + "]" * 100_000 + ",", 1),
        text.replace('"metrics": {', '"metrics": {"x": ' + "9" * 5000 + ",", 1),
        text[: len(text) // 2],
        "",
    ]
    for number, content in enumerate(hostile):
        refuse(content, f"hostile {number}")
        message = refused("predict", folder, DRAWINGS[0])
        expect(message.startswith(f"dynaslim: {folder}"), message)
    file.write_text(text)
    open_package(folder)
    expect(not accepted, f"{len(accepted)} of {tried} accepted, such as {accepted[:3]}")
    return f"{tried} tried"


POINTS = {
    1: cache, 2: budget, 3: few_images, 4: large_pictures, 5: links, 6: damaged, 7: own_data,
    8: mistakes, 9: stop, 11: manifest,
}  # fmt: skip


def main():
    os.environ["DYNASLIM_CACHE"] = str(WORK / "cache")
    expect(str(WORK) in dynaslim.__file__, f"{dynaslim.__file__} is not the package built")
    chosen = [int(number) for number in sys.argv[1:]] or POINTS
    failed = False
    for number in chosen:
        point = POINTS[number]
        began, message, state = time.monotonic(), None, "ok"
        try:
            message = point()
        except SkippedError as why:
            state, message = "ok", f"in part: {why}"
        except Exception as error:
            state, failed = "FAILED", True
            message = str(error) if isinstance(error, FailedError) else repr(error)
        seconds = f"{time.monotonic() - began:.0f} s"
        why = " ".join(str(message).split()) if message else ""
        print(
            f"{state} {number} {point.__doc__[:-1]} ({seconds})" + (f": {why}" if why else ""),
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
