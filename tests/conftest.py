"""What several test files share: a bundle, plain pictures, and the real service in a process of its own."""
import importlib.util
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from PIL import Image

MODULE = ("-m", "automl_cv.serve")
CORPUS = Path(__file__).resolve().parents[2] / "shared/corpus"


@dataclass
class Server:
    """A running service."""
    url: str  # like http://127.0.0.1:12345
    process: subprocess.Popen[bytes]
    log: Path  # its stderr


def free_port() -> int:
    """Return a TCP port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_live(server: Server, seconds: float = 30.0) -> None:
    """Wait until a service answers at all, with or without a model."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.process.poll() is None:
        try:
            httpx.get(f"{server.url}/health/live", trust_env=False).raise_for_status()
            return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"the service did not start:\n{server.log.read_text()}")


@contextmanager
def start_server(log: Path, bundle: Path, command: tuple[str, ...] = MODULE, **more: str) -> Iterator[Server]:
    """Run a service on a free port of this machine; `{port}` in the command is replaced. `more` is environment."""
    port = free_port()
    env = os.environ | {"AUTOML_CV_MODEL": str(bundle), "HOST": "127.0.0.1", "PORT": str(port)} | more
    command = (sys.executable, *(part.format(port=port) for part in command))
    with log.open("wb") as stderr, log.with_name("journal.txt").open("wb") as stdout:
        process = subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_live(server)
        yield server
    finally:
        process.terminate()
        process.wait(15)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle that knows red, green and blue. Nobody may change it."""
    from automl_cv.export import colour_bundle

    return colour_bundle(tmp_path_factory.mktemp("bundle") / "model")


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., AbstractContextManager[Server]]:
    """Return a function that runs a service: start(bundle, command, NAME="value of the environment")."""
    return lambda *args, **more: start_server(tmp_path / "stderr.txt", *args, **more)


@pytest.fixture(scope="session")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run one service for all tests that leave it as they found it."""
    with start_server(tmp_path_factory.mktemp("server") / "stderr.txt", bundle) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    """Return an HTTP client of the shared service."""
    with httpx.Client(base_url=server.url, trust_env=False, timeout=30.0) as client:
        yield client


@pytest.fixture(scope="session")
def plain() -> Callable[..., bytes]:
    """Return a function that encodes a picture of one colour: plain("red", "JPEG")."""

    def encode(colour: str, kind: str = "PNG") -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (64, 48), colour).save(file, kind)
        return file.getvalue()

    return encode


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Count a skipped test as a failure where CI asks for it: there, everything that tests need is installed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("AUTOML_CV_NO_SKIP") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = 1


@pytest.fixture
def free() -> int:
    """Return a TCP port that nobody uses."""
    return free_port()


@pytest.fixture(scope="session")
def maker() -> ModuleType:
    """Return the generator of the corpus of bad inputs."""
    spec = importlib.util.spec_from_file_location("make_corpus", CORPUS / "make_corpus.py")
    maker = importlib.util.module_from_spec(spec)
    sys.modules["make_corpus"] = maker  # dataclasses look their module up
    spec.loader.exec_module(maker)
    return maker
