"""The Dockerfile, built and run for real: a bundle goes in, a picture gets its answer, SIGTERM ends it."""
import csv
import io
import json
import os
import re
import shutil
import subprocess
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import httpx
import pytest
import yaml
from PIL import Image

from automl_cv.client import wait_ready

ROOT = Path(__file__).resolve().parent.parent
TOOL = Path(os.environ.get("CONTAINER") or ROOT.parent / "shared/tools/container")
TAG = "automl_cv_test"
ABSENT = [name for name in ("buildah", "debootstrap", "jq") if not shutil.which(name)]

pytestmark = pytest.mark.skipif(
    not TOOL.exists() or os.geteuid() != 0 or bool(ABSENT),
    reason=f"NO CONTAINER IS BUILT: needs root, ../shared/tools/container and {', '.join(ABSENT) or 'its programs'}")


def container(*words):
    """Call the tool and return what it printed."""
    done = subprocess.run(["bash", TOOL, *map(str, words)], text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def image(bundle, tmp_path_factory):
    """Build the image from a copy of the checkout that also holds what must stay out."""
    context = tmp_path_factory.mktemp("context") / "automl_cv"
    shutil.copytree(ROOT, context, ignore=shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__"))
    shutil.copytree(bundle, context / "outputs/runs/demo/model")
    (context / "outputs/runs/demo/secret.txt").write_text("private")
    (context / "automl_cv/.env").write_text("KEY=private")
    done = subprocess.run(["make", "image", f"CONTAINER={TOOL}", f"IMAGE={TAG}", "PYTHON=python3"], cwd=context,
                          text=True, capture_output=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return TAG


@pytest.fixture(scope="module")
def held(image):
    """Make a container of the image and mount it; return its name and its root."""
    def buildah(*words):
        return subprocess.run(["buildah", *words], text=True, capture_output=True, check=True).stdout.strip()

    name = buildah("from", "--pull-never", image)
    try:
        yield name, Path(buildah("mount", name))
    finally:
        buildah("rm", name)


def config(name):
    """Return what the image says about itself."""
    done = subprocess.run(["buildah", "inspect", name], text=True, capture_output=True, check=True)
    return json.loads(done.stdout)["Docker"]["config"]


def test_image_answers_and_stops(image, plain, free):
    started = container("run", image, free)
    try:
        url = f"http://127.0.0.1:{free}"
        reply = httpx.post(f"{url}/predict", files={"file": plain("blue", "JPEG")}, trust_env=False, timeout=30)
        assert (reply.status_code, reply.json()["label"]) == (200, "blue")
        assert httpx.get(f"{url}/readyz", trust_env=False).json() == {"status": "ready"}
    finally:
        stopped = container("stop", image)
    assert "pid" in started and "killed" not in stopped


def test_image_holds_what_it_needs(held):
    _, root = held
    names = {path.name for path in (root / "opt/automl_cv").rglob("*")}
    names |= {path.name for folder in ("usr/bin", "usr/local/bin", "root", "src", "tmp", "model")
              for path in (root / folder).rglob("*")}
    assert not names & {"torch", "pandas", ".env", "secret.txt", "gcc", "cc", "make", ".cache"}
    assert not [name for name in names if name.endswith((".whl", ".pt", ".pkl", ".pyi"))]
    assert not (root / "opt/automl_cv/bin/pip").exists() and (root / "model/model.onnx").exists()


def test_image_says_what_it_is(held, bundle):
    name, _ = held
    facts, info = config(name), json.loads((bundle / "model.json").read_text())
    assert facts["User"] == "10001:10001" and list(facts["Volumes"]) == ["/tmp"] and "PORT=8080" in facts["Env"]
    labels = facts["Labels"]
    assert labels["automl_cv.model.name"] == info["name"]
    assert labels["automl_cv.model.sha256"] == info["files"]["model.onnx"]
    assert {"org.opencontainers.image.revision", "org.opencontainers.image.licenses"} <= set(labels)


def test_bill_of_materials_is_complete(held, bundle):
    _, root = held
    bill = json.loads((root / "opt/automl_cv/sbom.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    parts = {part["bom-ref"]: part for part in bill["components"]}
    assert len(parts) == len(bill["components"])
    kinds = [part["purl"].split("/")[0] for part in parts.values() if "purl" in part]
    assert kinds.count("pkg:deb") > 50
    installed = {path.name.split("-")[0].lower().replace("_", "-").replace(".", "-")
                 for path in (root / "opt/automl_cv").rglob("*.dist-info")}
    named = {part["name"] for part in parts.values() if part.get("purl", "").startswith("pkg:pypi/")}
    assert named | {"automl-cv"} == installed and "torch" not in named
    digest = json.loads((bundle / "model.json").read_text())["files"]["model.onnx"]
    model = next(part for part in parts.values() if part["type"] == "machine-learning-model")
    assert model["hashes"] == [{"alg": "SHA-256", "content": digest}]


def test_nothing_is_compiled_at_the_start(held):
    name, _ = held
    code = "import automl_cv.serve, automl_cv.leave, automl_cv.api, jinja2"
    command = ["buildah", "run", "--isolation", "chroot", name, "--", "python", "-v", "-c", code]
    said = subprocess.run(command, text=True, capture_output=True, check=True).stderr
    loaded = [line.split("'")[1] for line in said.splitlines() if line.startswith("# code object from")]
    assert len([path for path in loaded if path.endswith(".pyc")]) > 300
    assert [path for path in loaded if path.endswith(".py")] == []


@contextmanager
def bounded(memory):
    """Make a group of processes that the kernel kills above so many bytes; gives its folder, None where it may not."""
    for base, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(base) / f"automl_cv_test_{os.getpid()}"
        try:
            group.mkdir()
        except OSError:  # this version of cgroups is not here, or not ours
            continue
        try:
            if (group / limit).exists():
                (group / limit).write_text(str(memory))
                yield group
                return
        finally:
            group.rmdir()
    yield None


@contextmanager
def read_only(root, words, out=subprocess.PIPE, join=None, **env):
    """Run a program of the image as its user, below a root on which nobody can write but for its volume.

    What `join` does is done by the process before it begins.
    """
    script = ('mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && mount -t proc proc "$0/proc" && '
              'mount -t tmpfs tmpfs "$0/tmp" && '
              'exec chroot --userspec=10001:10001 --groups= "$0" "$@"')
    command = ["unshare", "--mount", "bash", "-c", script, str(root), *words]
    known = {"PATH": "/opt/automl_cv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin", "AUTOML_CV_MODEL": "/model",
             "PYTHONPYCACHEPREFIX": "/opt/automl_cv/bytecode", "PYTHONDONTWRITEBYTECODE": "1"} | env
    process = subprocess.Popen(command, env=known, text=True, stdout=out, stderr=out, preexec_fn=join)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_read_only_root_is_enough(held, free):
    picture = io.BytesIO()
    Image.effect_noise((1600, 1600), 90).convert("RGB").save(picture, "PNG")
    assert picture.tell() > 3_000_000  # more than a form keeps in memory by itself
    with read_only(held[1], ["touch", "/model/x", "/opt/x", "/x"]) as process:
        assert process.communicate(timeout=30)[1].count("Read-only file system") == 3
    url = f"http://127.0.0.1:{free}"
    with read_only(held[1], ["python", "-m", "automl_cv.serve"], HOST="127.0.0.1", PORT=str(free)) as process:
        wait_ready(url, 60, alive=lambda: process.poll() is None)
        reply = httpx.post(f"{url}/predict", files={"file": picture.getvalue()}, trust_env=False, timeout=30)
        assert reply.status_code == 200, reply.text
        assert (reply.status_code, set(reply.json()) >= {"label", "confidence", "class_index"}) == (200, True)
        started = time.monotonic()
        process.terminate()
        assert process.wait(10) in (0, -15, 143) and time.monotonic() - started < 8


def test_image_runs_a_batch(held, plain):
    _, root = held
    folder = root / "srv/in"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(plain("blue", "JPEG"))
    with read_only(root, ["automl-cv", "predict", "/model", "/srv/in"]) as process:
        out, said = process.communicate(timeout=60)
    (row,) = csv.DictReader(out.splitlines())
    assert (row["file"], row["label"], row["error"]) == ("/srv/in/a.jpg", "blue", ""), said


@pytest.fixture(scope="module")
def resnet(held):
    """Put a bundle of the usual size, 45 MB, into the container; return its place there."""
    from automl_cv.export import export_bundle
    from automl_cv.models import create_model
    from automl_cv.pixels import Policy

    facts = {"name": "large", "backbone": "resnet18", "pretrained": False, "origin": "", "licence": "", "config": {},
             "data": {"images": 0, "fingerprint": "0" * 64}}
    model = create_model("resnet18", 2, pretrained=False).eval()
    export_bundle(model, held[1] / "srv/large", ["a", "b"], Policy(160, 176), facts)
    return "/srv/large"


MIB = 2**20
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.fixture(scope="module")
def photo():
    """Return a function that pads a photo of 12 megapixels to a size in bytes."""
    file = io.BytesIO()
    Image.effect_noise((1000, 750), 60).resize((4000, 3000)).convert("RGB").save(file, "JPEG", quality=85)
    return lambda size=0: file.getvalue().ljust(size, b"\0")


@pytest.fixture(scope="module")
def form(photo):
    """Return a function that writes four photos as a form of so many bytes."""
    def write(size):
        heads = [f'\r\n--x\r\nContent-Disposition: form-data; name="files"; filename="{n}.jpg"\r\n\r\n'.encode()
                 for n in range(4)]
        room = size - len(b"".join(heads)) - len(b"\r\n--x--")
        parts = [head + photo(room // 4 + (n < room % 4)) for n, head in enumerate(heads)]
        return b"".join(parts) + b"\r\n--x--"
    return write


def pack(files):
    """Write files as a zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number, content in enumerate(files):
            archive.writestr(f"{number}.jpg", content)
    return file.getvalue()


def test_cloud_run_gives_enough_memory(held, resnet, photo, form, free, tmp_path):
    """One CPU, 512 MiB with what lies in /tmp, as many requests at once as the manifest allows, the largest bodies."""
    spec = yaml.safe_load((ROOT / "deploy/service.yaml").read_text())["spec"]["template"]["spec"]
    assert (spec["containerConcurrency"], spec["containers"][0]["resources"]["limits"]["memory"]) == (16, "512Mi")
    url, log, barrier = f"http://127.0.0.1:{free}", tmp_path / "log", Barrier(16)

    def ask(path, body, **headers):
        reply = httpx.post(f"{url}{path}", content=body, headers=headers, trust_env=False, timeout=300)
        if reply.headers["content-type"] == "application/problem+json":
            return reply.status_code, reply.json()["code"]
        rows = [json.loads(row) for row in reply.text.splitlines()]
        return reply.status_code, len([row for row in rows if row["label"] in ("a", "b")])

    def at_once(path, body, times, **headers):
        with ThreadPoolExecutor(16) as pool:
            return set(pool.map(lambda _: ask(path, body, **headers), range(times)))

    def parts(body):
        yield body[:-1]
        with suppress(BrokenBarrierError):
            barrier.wait(300)
        yield body[-1:]

    def together(body, headers):
        """Send a body whose last byte waits until all sixteen have come as far, or one has failed."""
        try:
            return ask("/predict/batch", parts(body), **headers)
        except httpx.TransportError:
            barrier.abort()
            raise

    def join():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    with (bounded(512 * MIB) as group, log.open("wb") as out,
          read_only(held[1], ["python", "-m", "automl_cv.serve"], out, join, HOST="127.0.0.1", PORT=str(free),
                    AUTOML_CV_MODEL=resnet) as process):
        wait_ready(url, 300, alive=lambda: process.poll() is None)
        status = Path(f"/proc/{process.pid}/status")
        assert re.search(r"^Uid:(\s+10001){4}$", status.read_text(), re.M)
        assert not group or str(process.pid) in (group / "cgroup.procs").read_text().split()
        assert (200, 1) in at_once("/predict", photo(), 64) <= {(200, 1), (503, "busy")}
        largest = form(32 * MIB - 1)
        assert len(largest) == 32 * MIB - 1
        for body, headers in (largest, FORM), (pack([photo(8 * MIB - 999)] * 4), {"Content-Type": "application/zip"}):
            with ThreadPoolExecutor(16) as pool:
                found = set(pool.map(lambda _: together(body, headers), range(16)))
            assert found == {(200, 4), (503, "busy")}  # /tmp, which is memory, has room for three
        how = {"TIFF": {"compression": "tiff_deflate"}, "JPEG": {"progressive": True, "subsampling": 0},
               "WEBP": {"method": 0}, "AVIF": {"speed": 10}}
        for mode, kind, size in (("RGB", "PNG", 40), ("L", "PNG", 40), ("RGBA", "PNG", 27), ("I;16", "PNG", 27),
                                 ("F", "TIFF", 27), ("CMYK", "TIFF", 27), ("RGB", "JPEG", 40), ("RGBA", "WEBP", 14),
                                 ("RGBA", "AVIF", 19)):
            for more, expected in (0, (200, 1)), (50, (413, "too_many_pixels")):
                body = io.BytesIO()
                Image.new(mode, (8000, 125 * (size + more))).save(body, kind, **how.get(kind, {}))
                assert ask("/predict", body.getvalue()) == expected, (mode, kind)
        for path, body, headers, expected in (
                ("/predict", photo(10 * MIB), {}, (200, 1)),
                ("/predict", photo(32 * MIB - 1), {}, (413, "file_too_large")),
                ("/predict", photo(32 * MIB + 1), {}, (413, "file_too_large")),
                ("/predict/batch", largest, FORM, (200, 4)),
                ("/predict/batch", form(32 * MIB + 1), FORM, (200, 4)),  # Cloud Run itself refuses it over HTTP/1
                ("/predict/batch", bytes(101 * 10**6), FORM, (413, "file_too_large")),
                ("/predict", photo(), {}, (200, 1))):
            assert ask(path, body, **headers) == expected
        for probe in ("/health/live", "/health/ready"):
            assert httpx.get(f"{url}{probe}", trust_env=False).status_code == 200
        peak = int(re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M)[1])
        print(f"The server alone took {peak / 1024:.0f} MiB at most; the limit of {group} held it")
        assert peak < 512 * 1024  # where no group bounds it, and without what lies in /tmp
        process.terminate()
        assert process.wait(60) == 0, log.read_text()[-3000:]
