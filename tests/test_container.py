"""The Dockerfile, built and run for real: a bundle goes in, a picture gets its answer, SIGTERM ends it."""
import os
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT.parent / "shared/tools/container"
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
    container("build", context, TAG)
    return TAG


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


def test_image_holds_no_torch_and_no_secret(image):
    script = """m=$(buildah mount "$1"); find "$m" -path "*/site-packages/torch*" -maxdepth 7
                find "$m" -name .env -o -name secret.txt"""
    name = subprocess.run(["buildah", "from", image], text=True, capture_output=True, check=True).stdout.strip()
    try:
        found = subprocess.run(["bash", "-c", script, "find", name], text=True, capture_output=True, check=True).stdout
        user = subprocess.run(["buildah", "inspect", "--format", "{{.OCIv1.Config.User}}", name], text=True,
                              capture_output=True, check=True).stdout.strip()
    finally:
        subprocess.run(["buildah", "rm", name], check=True, capture_output=True)
    assert found == ""
    assert user == "10001:10001"
