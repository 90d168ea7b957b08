"""The Dockerfile, built and run for real: a bundle goes in, a picture gets its answer, SIGTERM ends it."""
import csv
import io
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
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
    command = ["buildah", "run", "--isolation", "chroot", name, "--", "python", "-v", "-c", "import automl_cv.serve"]
    said = subprocess.run(command, text=True, capture_output=True, check=True).stderr
    loaded = [line.split("'")[1] for line in said.splitlines() if line.startswith("# code object from")]
    assert len([path for path in loaded if path.endswith(".pyc")]) > 300
    assert [path for path in loaded if path.endswith(".py")] == []


@contextmanager
def read_only(root, words, **env):
    """Run a program of the image as its user, below a root on which nobody can write but for its volume."""
    script = ('mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && mount -t proc proc "$0/proc" && '
              'mount -t tmpfs tmpfs "$0/tmp" && '
              'exec chroot --userspec=10001:10001 --groups= "$0" "$@"')
    command = ["unshare", "--mount", "bash", "-c", script, str(root), *words]
    known = {"PATH": "/opt/automl_cv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin", "AUTOML_CV_MODEL": "/model",
             "PYTHONPYCACHEPREFIX": "/opt/automl_cv/bytecode", "PYTHONDONTWRITEBYTECODE": "1"} | env
    process = subprocess.Popen(command, env=known, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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
