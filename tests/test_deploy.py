"""`automl-cv deploy` with a gcloud on PATH that writes down how it is called, and a revision that really answers."""
import json
import os
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("--project", "my-project", "--region", "europe-west1")
RECORDER = """#!{python}
import json, sys
from pathlib import Path
room, words = Path({room!r}), sys.argv[1:]
with (room / "calls").open("a") as file:
    file.write(json.dumps(words) + "\\n")
if any(part in words for part in (room / "broken").read_text().split()):
    sys.exit(1)
name = next((n for n in ("list", "get-iam-policy", "describe", "print-identity-token") if n in words), "")
print((room / name).read_text() if name else "")
"""


class Revision(BaseHTTPRequestHandler):
    """A revision that is ready after some requests, and only for who shows a token."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        known = self.headers.get("Authorization") == "Bearer t0ken"
        ready = len(self.server.asked) > 2 and self.server.healthy
        self.send_response(403 if not known else 200 if ready else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words):
        """Say nothing."""


@pytest.fixture
def revision():
    """Run the candidate."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Revision)
    server.asked, server.healthy = [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def room(tmp_path, revision):
    """Put a gcloud that records on the PATH; it knows a service with one revision."""
    url = f"http://127.0.0.1:{revision.server_port}"
    serving = {"revisionName": "automl-cv-old", "percent": 100}
    answers = {"list": [{"status": {"traffic": [serving]}}], "get-iam-policy": {},
               "describe": {"status": {"url": "https://automl-cv.example.invalid",
                                       "traffic": [serving, {"tag": "candidate", "url": url}]}}}
    for name, answer in answers.items():
        (tmp_path / name).write_text(json.dumps(answer))
    (tmp_path / "print-identity-token").write_text("t0ken")
    (tmp_path / "broken").write_text("")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gcloud").write_text(RECORDER.format(python=sys.executable, room=str(tmp_path)))
    (tmp_path / "bin/gcloud").chmod(0o755)
    return tmp_path


def deploy(room, bundle, *words, **more):
    """Run the command in a checkout. `more` is environment."""
    env = os.environ | {"AUTOML_CV_HOME": str(room / "home"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1",
                        "PATH": f"{room / 'bin'}:{os.environ['PATH']}"} | more
    command = [sys.executable, "-c", "from automl_cv.cli import main; main()", "deploy", str(bundle), *WORDS, *words]
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=200)


def calls(room):
    """Return the calls of gcloud."""
    return [json.loads(line) for line in (room / "calls").read_text().splitlines()] if (room / "calls").exists() else []


def verbs(room):
    """Return what each call was for."""
    known = ("list", "get-iam-policy", "submit", "replace", "describe", "print-identity-token", "update-traffic",
             "add-iam-policy-binding")
    return [next(name for name in known if name in words) for words in calls(room)]


FIRST = ["list", "get-iam-policy", "submit", "replace", "describe", "print-identity-token"]


def test_traffic_moves_after_the_health_check(room, bundle, revision):
    done = deploy(room, bundle)
    assert done.returncode == 0, done.stderr
    assert verbs(room) == [*FIRST, "update-traffic"]
    assert revision.asked == [("/health/ready", "Bearer t0ken")] * 3
    manifest = yaml.safe_load((room / "home/deploy/automl-cv/service.yaml").read_text())
    name = manifest["spec"]["template"]["metadata"]["name"]
    assert manifest["spec"]["traffic"] == [{"revisionName": "automl-cv-old", "percent": 100},
                                           {"latestRevision": True, "tag": "candidate"}]
    assert f"{name}=100" in calls(room)[-1]
    assert "allUsers" not in str(calls(room)) and "t0ken" not in done.stdout + done.stderr
    assert all(set(WORDS) <= set(words) for words in calls(room) if words[0] == "run")


def test_commands_are_printed_first_and_can_be_typed(room, bundle):
    done = deploy(room, bundle)
    printed = [line[2:] for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert [shlex.split(line)[1:] for line in printed] == calls(room)


def test_dry_run_runs_nothing(room, bundle):
    done = deploy(room, bundle, "--dry-run", "--public", "--bucket", "photos")
    assert done.returncode == 0 and done.stdout.count("$ gcloud ") == 9
    assert calls(room) == []


def test_files_of_the_commands_are_there_after_a_dry_run(room, bundle):
    done = deploy(room, bundle, "--dry-run", "--bucket", "photos")
    named = [word for line in done.stdout.splitlines() if line.startswith("$ ") for word in shlex.split(line)
             if word.endswith(".yaml")]
    assert [Path(name).name for name in named] == ["cloudbuild.yaml", "service.yaml", "job.yaml"]
    assert all(Path(name).is_file() for name in named)
    traffic = yaml.safe_load((room / "home/deploy/automl-cv/service.yaml").read_text())["spec"]["traffic"]
    assert traffic == [{"revisionName": "REVISION-THAT-SERVES", "percent": 100}, {"latestRevision": True, "tag": "candidate"}]
    assert done.stdout.splitlines()[-1].endswith("into service.yaml, for REVISION-THAT-SERVES.")


def test_candidate_is_asked_through_a_proxy(room, bundle, revision):
    found = json.loads((room / "describe").read_text())
    found["status"]["traffic"][1]["url"] = "http://candidate.example.invalid"
    (room / "describe").write_text(json.dumps(found))
    done = deploy(room, bundle, http_proxy=f"http://127.0.0.1:{revision.server_port}")
    assert done.returncode == 0, done.stderr
    assert revision.asked == [("http://candidate.example.invalid/health/ready", "Bearer t0ken")] * 3


def test_sick_revision_gets_no_requests(room, bundle, revision):
    revision.healthy = False
    code = ("import sys, automl_cv.deploy as d; d.HEALTH_SECONDS = 2.0\n"
            "from automl_cv.cli import cli; cli(sys.argv[1:])")
    env = os.environ | {"AUTOML_CV_HOME": str(room / "home"), "PATH": f"{room / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", code, "deploy", str(bundle), *WORDS], cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 5 and "The new revision gets no requests." in done.stderr
    assert "it said status 503" in done.stderr
    assert verbs(room) == FIRST


@pytest.mark.parametrize("broken", ["submit", "replace", "describe", "print-identity-token"])
def test_failure_ends_it(room, bundle, broken):
    (room / "broken").write_text(broken)
    done = deploy(room, bundle)
    assert done.returncode == 5 and "This failed: gcloud" in done.stderr and "Traceback" not in done.stderr
    assert verbs(room)[-1] == broken


@pytest.mark.parametrize("words,extras", [((), "serve"), (("--gpu",), "gpu")])
def test_image_knows_its_card(room, bundle, words, extras):
    assert deploy(room, bundle, *words).returncode == 0
    (build,) = [call for call in calls(room) if "submit" in call]
    assert f"_EXTRAS={extras}" in build[build.index("--substitutions") + 1].split(",")
    assert "EXTRAS=${_EXTRAS}" in yaml.safe_load((ROOT / "deploy/cloudbuild.yaml").read_text())["steps"][0]["args"]


def test_alias_is_resolved_when_the_image_is_built(room, bundle, monkeypatch):
    monkeypatch.setenv("AUTOML_CV_HOME", str(room / "home"))
    from automl_cv.core import Run
    from automl_cv.tracking import register, tracked_step
    with tracked_step(Run(room / "home/runs/shop"), "train", {}) as record:
        register(record, bundle, "colours")
    done = deploy(room, "models:/colours@champion")
    assert done.returncode == 0, done.stderr
    folder = room / "home/deploy/automl-cv/outputs/runs/deploy/model"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in bundle.iterdir()}
    assert "mlflow" not in (room / "home/deploy/automl-cv/Dockerfile").read_text()


def test_first_deployment(room, bundle):
    (room / "list").write_text("[]")
    assert deploy(room, bundle).returncode == 0
    assert verbs(room) == [name for name in [*FIRST, "update-traffic"] if name != "get-iam-policy"]
    manifest = yaml.safe_load((room / "home/deploy/automl-cv/service.yaml").read_text())
    assert manifest["spec"]["traffic"] == [{"latestRevision": True, "tag": "candidate", "percent": 100}]


def test_open_service_is_refused_without_the_word(room, bundle):
    (room / "get-iam-policy").write_text(json.dumps({"bindings": [{"role": "roles/run.invoker", "members": ["allUsers"]}]}))
    done = deploy(room, bundle)
    assert done.returncode == 2 and "Everybody may call automl-cv" in done.stderr
    assert verbs(room) == ["list", "get-iam-policy"]


def test_public_is_the_last_thing(room, bundle):
    done = deploy(room, bundle, "--public", "--bucket", "photos")
    assert done.returncode == 0, done.stderr
    assert verbs(room)[-3:] == ["update-traffic", "add-iam-policy-binding", "replace"]
    assert "job.yaml" in calls(room)[-1][3]


def test_account_asks_with_an_audience(room, bundle):
    assert deploy(room, bundle, "--account", "sa@example.invalid").returncode == 0
    words = next(words for words in calls(room) if "print-identity-token" in words)
    assert words[-4:] == ["--impersonate-service-account", "sa@example.invalid", "--audiences",
                          "https://automl-cv.example.invalid"]


def test_no_gcloud_is_one_line(room, bundle):
    done = deploy(room, bundle, PATH="/nowhere")
    assert done.returncode == 5 and done.stderr.startswith("error: gcloud is not installed.")


def test_only_what_the_build_needs_leaves(room, bundle):
    assert deploy(room, bundle, "--gpu").returncode == 0
    folder = room / "home/deploy/automl-cv"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [".dockerignore", "Dockerfile", "README.md", "automl_cv", "cloudbuild.yaml", "constraints.txt", "deploy",
         "job.yaml", "outputs", "pyproject.toml", "service.yaml", "settings.ini", "setup.py"])
    kept = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*")}
    assert {path.name for path in (folder / "outputs/runs/deploy/model").rglob("*")} == kept
    manifest = yaml.safe_load((folder / "service.yaml").read_text())
    assert manifest["spec"]["template"]["spec"]["nodeSelector"] == {"run.googleapis.com/accelerator": "nvidia-l4"}


@pytest.mark.parametrize("name", ["service", "service-gpu"])
def test_manifest_keeps_its_promises(name):
    spec = yaml.safe_load((ROOT / f"deploy/{name}.yaml").read_text())["spec"]["template"]
    notes, (container,) = spec["metadata"]["annotations"], spec["spec"]["containers"]
    assert spec["spec"]["timeoutSeconds"] == 300
    assert notes["autoscaling.knative.dev/minScale"] == "0" and notes["run.googleapis.com/startup-cpu-boost"] == "true"
    assert container["startupProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    for probe in (container["startupProbe"], container["livenessProbe"]):  # Cloud Run's limits
        assert probe["timeoutSeconds"] <= probe["periodSeconds"] <= 240
        assert probe["periodSeconds"] * probe["failureThreshold"] <= 240
    limits = container["resources"]["limits"]
    assert limits == ({"cpu": "1", "memory": "512Mi"} if name == "service" else
                      {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"})


def test_job_reads_and_writes_a_bucket():
    task = yaml.safe_load((ROOT / "deploy/job.yaml").read_text())["spec"]["template"]["spec"]["template"]["spec"]
    (container,), (volume,) = task["containers"], task["volumes"]
    assert container["args"][0] == "predict" and container["args"][2].startswith(container["volumeMounts"][0]["mountPath"])
    assert volume["csi"]["driver"] == "gcsfuse.run.googleapis.com" and task["maxRetries"] > 0
