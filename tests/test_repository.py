"""The files around the code: workflows, ignore lists, the promise that set-up happens once."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_workflows_fit_githubs_schema():
    files = sorted(map(str, (ROOT / ".github/workflows").glob("*.yml")))
    assert [Path(name).name for name in files] == ["ci.yml", "deploy.yml"]
    done = subprocess.run([Path(sys.executable).parent / "check-jsonschema", "--builtin-schema",
                           "vendor.github-workflows", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_deployment_is_private_and_stores_no_key():
    deploy = (ROOT / ".github/workflows/deploy.yml").read_text()
    assert "automl-cv deploy" in deploy and "--public" not in deploy and "allow-unauthenticated" not in deploy
    assert "allUsers" not in "".join(path.read_text() for path in (ROOT / "deploy").glob("*.yaml"))
    assert "secrets." not in deploy and "workload_identity_provider" in deploy


def test_bundle_is_fetched_into_the_folder_that_is_deployed():
    """`gcloud storage cp --recursive URI FOLDER` fails without the folder, and makes another one inside it otherwise."""
    deploy = (ROOT / ".github/workflows/deploy.yml").read_text()
    assert ('mkdir -p outputs/runs/deploy/model && gcloud storage rsync "${{ vars.MODEL_URI }}" outputs/runs/deploy/model'
            in deploy)
    assert "gcloud storage cp" not in deploy and "automl-cv deploy outputs/runs/deploy/model " in deploy


def test_ci_calls_the_readmes_command():
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / ".github/workflows/ci.yml").read_text()
    assert re.search(r"^make demo .*\nmake test ", (ROOT / "README.md").read_text(), re.M)


def test_image_of_a_bundle_that_the_build_cannot_see_is_refused(bundle):
    words = ["make", "--no-print-directory", "image", f"BUNDLE={bundle}"]  # it is `make test` that runs this
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.startswith("The build sees no bundle outside of outputs/runs/")


def test_image_gets_the_extras_that_are_asked_for():
    plan = ["make", "-n", "image"]
    for more, extras in (([], "serve"), (["EXTRAS=serve,gcs"], "serve,gcs")):
        assert f"--build-arg EXTRAS={extras} " in subprocess.run(plan + more, cwd=ROOT, capture_output=True, text=True).stdout


def test_second_call_sets_nothing_up(tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    plan = ["make", "-n", "demo"]
    assert "pip install" in subprocess.run(plan, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.ready").touch()
    assert "pip install" not in subprocess.run(plan, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
