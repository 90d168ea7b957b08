"""Buckets behind a network that breaks: real emulators of both stores, and a proxy between that does the damage."""
import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from automl_cv import remote
from automl_cv.core import AutomlError
from automl_cv.sources import open_source
from conftest import free_port

NAMES = [f"{label}/{i} é+#%.jpg" for label in ("cat", "dog") for i in range(6)]
EMULATORS = {"gs": ("-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--in-memory", "-q", "--port"),
             "s3": ("-m", "moto.server", "-H", "127.0.0.1", "-p")}
ENDPOINTS = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
               "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",  # as older objects are, with nothing but an ETag
               "NO_GCE_CHECK": "true", "NO_PROXY": "*"}


def content(name: str) -> bytes:
    """Make the bytes of an object, different for each name."""
    return hashlib.sha256(name.encode()).digest() * 100


@dataclass
class Proxy:
    """A server on loopback that hands every request on, or does what `fault` says to it."""
    port: int  # of the emulator
    fault: Callable[[str, str], str] = lambda path, span: ""  # of path and Range: cut, flip, tag, a status, or ""
    spans: list[tuple[str, str]] = field(default_factory=list)  # path and Range of each request for content
    seen: set[str] = field(default_factory=set)
    server: ThreadingHTTPServer | None = None

    def once(self, fault: str) -> Callable[[str, str], str]:
        """Do it to the first request for each object."""
        return lambda path, span: "" if not span or path in self.seen else (self.seen.add(path) or fault)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server.server_port}"


class Pass(BaseHTTPRequestHandler):
    """Hand one request on."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer as the emulator does, or worse."""
        proxy, span = self.server.proxy, self.headers.get("Range", "")
        if span:
            proxy.spans.append((self.path, span))
        fault = proxy.fault(self.path, span)
        status, headers, body = self.ask(proxy.port)
        if fault.isdecimal():
            status, headers, body = int(fault), {}, b""
        if fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "tag":
            fake = "0" * 32
            md5 = hashlib.md5(content(NAMES[0])).hexdigest()
            headers = {name: value.replace(md5, fake) for name, value in headers.items()}
            body = body.replace(md5.encode(), fake.encode())
        self.send_response(status)
        for name, value in (headers | {"Content-Length": headers.get("Content-Length", str(len(body)))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if fault == "cut" else body)
        self.close_connection = True

    do_HEAD = do_GET

    def ask(self, port: int) -> tuple[int, dict[str, str], bytes]:
        """Get the emulator's answer."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        drop = ("transfer-encoding", "connection", "server", "date")
        return answer.status, {k: v for k, v in answer.getheaders() if k.lower() not in drop}, answer.read()


@dataclass
class Bucket:
    """A bucket of an emulator, seen through a proxy."""
    url: str  # like gs://pets-3
    proxy: Proxy
    store: fsspec.AbstractFileSystem  # the way around the proxy

    def put(self, name: str, data: bytes) -> None:
        """Store an object."""
        self.store.pipe_file(f"{self.url.split('://')[1]}/{name}", data)


@pytest.fixture(scope="module")
def emulators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """Run both emulators, each in a process of its own with its data in memory."""
    ports, processes = {name: free_port() for name in EMULATORS}, []
    log = (tmp_path_factory.mktemp("emulators") / "log.txt").open("wb")
    for name, command in EMULATORS.items():
        processes.append(subprocess.Popen([sys.executable, *command, str(ports[name])], stdout=log, stderr=log))
    try:
        for port in ports.values():
            wait(lambda port=port: http.client.HTTPConnection("127.0.0.1", port, timeout=5).request("GET", "/"))
        yield ports
    finally:
        for process in processes:
            process.kill()
            process.wait(15)


def wait(attempt: Callable[[], object]) -> None:
    """Try until it works, for a minute."""
    for _ in range(600):
        try:
            attempt()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("an emulator did not start")


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest, emulators: dict[str, int], tmp_path: Path,
           monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Return a fresh bucket of each store with twelve objects below data/, and a folder marker."""
    protocol, port = request.param, emulators[request.param]
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    remote.connect(f"{protocol}://any")  # before gcsfs is imported: it decides then what kind of store it is
    around = {"gs": {"token": "anon", "project": "test"}, "s3": {}}[protocol]
    store = fsspec.filesystem(protocol, endpoint_url=f"http://127.0.0.1:{port}", **around)
    proxy = Proxy(port)
    proxy.server = ThreadingHTTPServer(("127.0.0.1", 0), Pass)
    proxy.server.proxy, proxy.server.daemon_threads = proxy, True
    threading.Thread(target=proxy.server.serve_forever, daemon=True).start()
    monkeypatch.setenv(ENDPOINTS[protocol], proxy.url)
    bucket = Bucket(f"{protocol}://pets-{proxy.server.server_port}", proxy, store)
    store.mkdir(bucket.url.split("://")[1])
    for name in NAMES:
        bucket.put(f"data/{name}", content(name))
    bucket.put("data/cat/", b"")
    yield bucket
    proxy.server.shutdown()
    proxy.server.server_close()


def read_all(url: str) -> dict[str, bytes]:
    """Open a source and read it as a scan does."""
    source = open_source(url)
    with ThreadPoolExecutor(source.readers) as pool:
        return dict(zip([item.name for item in source.items], pool.map(lambda item: item.read(), source.items)))


EXPECTED = {name: content(name) for name in NAMES}


def test_a_bucket_is_read_once(bucket: Bucket) -> None:
    """Names, labels and bytes are right, the marker is no file, and a second look asks for no content."""
    assert read_all(f"{bucket.url}/data") == EXPECTED
    assert {item.label for item in open_source(f"{bucket.url}/data/").items} == {"cat", "dog"}
    assert len(bucket.proxy.spans) == 12
    assert read_all(f"{bucket.url}/data") == EXPECTED
    assert len(bucket.proxy.spans) == 12


def test_a_replaced_object_is_fetched_again(bucket: Bucket) -> None:
    """Only what changed is fetched, and its stamp differs."""
    read_all(f"{bucket.url}/data")
    before = open_source(f"{bucket.url}/data").by_name()
    bucket.put(f"data/{NAMES[3]}", b"another cat")
    after = open_source(f"{bucket.url}/data").by_name()
    assert [name for name in NAMES if before[name].stamp != after[name].stamp] == [NAMES[3]]
    assert read_all(f"{bucket.url}/data") == EXPECTED | {NAMES[3]: b"another cat"}
    assert len(bucket.proxy.spans) == 13


@pytest.mark.parametrize("fault", ["cut", "flip", "503"])
def test_one_fault_per_object_is_survived(bucket: Bucket, fault: str) -> None:
    """A cut connection, a flipped bit and an overloaded store cost one more request each."""
    bucket.proxy.fault = bucket.proxy.once(fault)
    assert read_all(f"{bucket.url}/data") == EXPECTED
    assert len(bucket.proxy.spans) == 24


def test_lasting_damage_is_an_error(bucket: Bucket) -> None:
    """An object that never arrives whole is refused, and nothing of it is kept."""
    bucket.proxy.fault = lambda path, span: "flip" if span and "dog" in path else ""
    items = open_source(f"{bucket.url}/data").by_name()
    with pytest.raises(OSError, match="arrived damaged or changed on the way, 4 times"):
        items[NAMES[6]].read()
    assert items[NAMES[0]].read() == content(NAMES[0])


@pytest.mark.parametrize("status", ["403", "404"])
def test_what_is_refused_is_not_asked_for_again(bucket: Bucket, status: str) -> None:
    """An object that may not be read, or is gone, costs one request."""
    items = open_source(f"{bucket.url}/data").by_name()
    bucket.proxy.fault = lambda path, span: status if span else ""
    with pytest.raises({"403": PermissionError, "404": FileNotFoundError}[status], match=r"data/cat/0 é\+#%.jpg"):
        items[NAMES[0]].read()
    assert len(bucket.proxy.spans) == 1


def write_table(path: Path, rows: list[str]) -> str:
    """Write a table of names, one line each, with the name of its folder as the label."""
    lines = [f"{name},{name.split('/')[-2]}" for name in rows]
    path.write_text("\n".join(["file,label", *lines]) + "\n")
    return str(path)


@pytest.mark.parametrize("many", [1, 100])
def test_a_table_names_objects(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    """Addresses in a table on the disk are read like a bucket, listed or asked for; what is not there is a bad row."""
    monkeypatch.setattr(remote, "MANY", many)
    addresses = {f"{bucket.url}/data/{name}": content(name) for name in NAMES}
    table = write_table(tmp_path / "table.csv", [*addresses, f"{bucket.url}/data/cat/none.jpg", f"{bucket.url}/no/cat/1.jpg"])
    source = open_source(table)
    assert [(item.name, item.label) for item in source.items] == [(url, url.split("/")[-2]) for url in addresses]
    assert (source.bad_rows, source.readers) == ({"missing_file": [14, 15]}, 16)
    assert read_all(table) == addresses == read_all(table)
    assert len(bucket.proxy.spans) == 12
    assert read_all(f"{bucket.url}/data") == EXPECTED
    assert len(bucket.proxy.spans) == 12


def test_a_table_that_may_not_be_followed(bucket: Bucket, tmp_path: Path) -> None:
    """An address that may not be read refuses the table, and tells how to sign in."""
    bucket.proxy.fault = lambda path, span: "403"
    error = refusal(write_table(tmp_path / "table.csv", [f"{bucket.url}/data/{NAMES[0]}"]))
    assert (error.code, error.detail) == ("source_not_found", f"{bucket.url}/data/{NAMES[0]} may not be read.")


@pytest.mark.parametrize("form", ["csv", "jsonl", "manifest"])
def test_a_table_in_the_bucket_as_clouds_write_it(bucket: Bucket, form: str) -> None:
    """Vertex AI's CSV and JSON lines and SageMaker's manifest name objects of equal names by their addresses."""
    split = "aiplatform.googleapis.com/ml_use"
    about = {"class-name": "dog", "type": "groundtruth/image-classification"}
    cat, dog, gone = (f"{bucket.url}/data/{name}" for name in (NAMES[0], NAMES[6], "no.jpg"))
    text = {"csv": f"TEST,{cat},cat\n{dog},dog\n{gone},dog\n",
            "jsonl": "\n".join(map(json.dumps, [
                {"imageGcsUri": cat, "classificationAnnotation": {"displayName": "cat"},
                 "dataItemResourceLabels": {split: "test"}},
                {"imageGcsUri": dog, "classificationAnnotation": {"displayName": "dog"}},
                {"imageGcsUri": gone, "classificationAnnotation": {"displayName": "dog"}}])),
            "manifest": "\n".join(map(json.dumps, [
                {"source-ref": cat, "pets": 0, "pets-metadata": about | {"class-name": "cat"}},
                {"source-ref": dog, "pets": 1, "pets-metadata": about},
                {"source-ref": gone, "pets": 1, "pets-metadata": about}]))}[form]
    bucket.put(f"lists/import.{form}", text.encode())
    source = open_source(f"{bucket.url}/lists/import.{form}")
    assert [(item.name, item.label) for item in source.items] == [(cat, "cat"), (dog, "dog")]
    assert [item.split for item in source.items] == ["" if form == "manifest" else "test", ""]
    assert source.bad_rows == {"missing_file": [3]}
    assert source.items[1].read() == content(NAMES[6])
    assert refusal(f"{bucket.url}/lists/no.{form}").code == "source_not_found"


def test_a_table_names_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of a web server in a table are read, beside files on the disk."""
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path / "home"))
    for name in ("cat/1.jpg", "dog/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content(name))
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        site = f"http://127.0.0.1:{server.server_port}"
        table = write_table(tmp_path / "table.csv", ["cat/1.jpg", f"{site}/dog/2.jpg", f"{site}/dog/3.jpg"])
        assert read_all(table) == {"cat/1.jpg": content("cat/1.jpg"), f"{site}/dog/2.jpg": content("dog/2.jpg")}
        assert open_source(table).bad_rows == {"missing_file": [4]}
    finally:
        server.shutdown()
        server.server_close()


def test_the_cache_is_bounded(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve objects of 3,200 bytes come one an hour into 20,000 bytes: the last five stay, and all can be read."""
    monkeypatch.setenv("AUTOML_CV_CACHE_GB", "0.00002")
    items, folder = open_source(f"{bucket.url}/data").items, tmp_path / "cache/objects"
    for item in items:
        assert item.read() == content(item.name)
        for path in folder.glob("*/*"):
            os.utime(path, (0, path.stat().st_mtime - 3600))
        assert sum(path.stat().st_size for path in folder.glob("*/*")) <= 20_000
    kept = sorted(path.name[41:] for path in folder.glob("*/*"))
    assert kept == [f"{i}-.jpg" for i in range(1, 6)]
    assert [item.read() for item in items[7:]] == [content(name) for name in NAMES[7:]]
    assert len(bucket.proxy.spans) == 12
    assert items[0].read() == content(NAMES[0])
    assert len(bucket.proxy.spans) == 13


def start_child(url: str, code: str, output: int | None = None) -> subprocess.Popen[bytes]:
    """Fetch in a process of its own."""
    code = f"from automl_cv import remote\nurl = {url!r}\n{code}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output)


def kill_at(bucket: Bucket, number: int, url: str, code: str) -> None:
    """Run code until it asks for content the given time; then kill it, with that answer still on its way."""
    reached, release = threading.Event(), threading.Event()

    def hold(path: str, span: str) -> str:
        if span and len(bucket.proxy.spans) >= number:
            reached.set()
            release.wait(60)
        return ""

    bucket.proxy.fault = hold
    child = start_child(url, code)
    try:
        assert reached.wait(60)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(15)
        release.set()
    bucket.proxy.fault = lambda path, span: ""
    bucket.proxy.spans.clear()


def test_a_kill_costs_no_finished_object(bucket: Bucket) -> None:
    """The same call after a kill fetches what is missing, and nothing else."""
    kill_at(bucket, 6, f"{bucket.url}/data", "for item in remote.open_remote(url): item.read()")
    assert read_all(f"{bucket.url}/data") == EXPECTED
    assert len(bucket.proxy.spans) == 12 - 5


def test_a_large_object_goes_on_where_it_broke(bucket: Bucket) -> None:
    """Of three parts, the one that arrived before the kill is kept."""
    whole = os.urandom(2 * remote.PART + 1000)
    bucket.put("large.zip", whole)
    kill_at(bucket, 2, f"{bucket.url}/large.zip", "remote.fetch_file(url)")
    assert remote.fetch_file(f"{bucket.url}/large.zip").read_bytes() == whole
    assert [span for _, span in bucket.proxy.spans] == ["bytes=8388608-16777215", "bytes=16777216-16778215"]


def test_a_large_object_that_changed_starts_anew(bucket: Bucket) -> None:
    """A part of an older version is of no use."""
    bucket.put("large.zip", os.urandom(remote.PART + 1000))
    kill_at(bucket, 2, f"{bucket.url}/large.zip", "remote.fetch_file(url)")
    newer = os.urandom(remote.PART + 1000)
    bucket.put("large.zip", newer)
    assert remote.fetch_file(f"{bucket.url}/large.zip").read_bytes() == newer
    assert [span for _, span in bucket.proxy.spans] == ["bytes=0-8388607", "bytes=8388608-8389607"]


def refusal(url: str) -> AutomlError:
    """Open a source that cannot be opened."""
    with pytest.raises(AutomlError) as caught:
        open_source(url)
    return caught.value


def test_nothing_there(bucket: Bucket) -> None:
    """A missing bucket and a missing prefix are told by their address."""
    for url in ("{}://no-such-bucket-here/data".format(bucket.url.split("://")[0]), f"{bucket.url}/dat"):
        error = refusal(url)
        assert (error.code, error.detail) == ("source_not_found", f"There is nothing at {url}.")


def test_not_allowed(bucket: Bucket) -> None:
    """Whoever may not list is told how to sign in."""
    bucket.proxy.fault = lambda path, span: "403"
    error = refusal(f"{bucket.url}/data")
    assert (error.code, error.detail) == ("source_not_found", f"{bucket.url}/data may not be read.")
    assert {"gs": "gcloud auth", "s3": "AWS_PROFILE"}[bucket.url[:2]] in error.hint


@pytest.mark.parametrize("status", ["denied", "404"])
def test_only_our_sentence_is_said(bucket: Bucket, status: str) -> None:
    """Of a failure the terminal sees no traceback and no log of a package."""
    code = {"gs": "401", "s3": "403"}[bucket.url[:2]] if status == "denied" else status
    bucket.proxy.fault = lambda path, span: code if span else ""
    script = "try: remote.open_remote(url)[0].read()\nexcept OSError as error: print(error)"
    said, logged = start_child(f"{bucket.url}/data", script, subprocess.PIPE).communicate(timeout=120)
    sentence = {"denied": "may not be read", "404": "is no longer there"}[status]
    assert f"{NAMES[0]} {sentence}" in said.decode()
    assert logged == b""


def test_a_forked_process_reads_too(bucket: Bucket) -> None:
    """Connections do not outlive a fork, items do."""
    items = open_source(f"{bucket.url}/data").by_name()
    assert items[NAMES[0]].read() == EXPECTED[NAMES[0]]
    child = os.fork()
    if not child:
        os._exit(int(items[NAMES[1]].read() != EXPECTED[NAMES[1]]))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_no_credentials(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any key the answer is the same, and a key that is set afterwards counts."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    assert refusal(f"{bucket.url}/data").detail.endswith("may not be read.")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert len(open_source(f"{bucket.url}/data").items) == 12


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_no_network(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that cannot be reached ends as a ConnectionError, which a scan can tell from a bad file."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    items = open_source(f"{bucket.url}/data").by_name()
    bucket.proxy.fault = lambda path, span: "cut" if span else ""
    with pytest.raises(ConnectionError, match="cannot be fetched"):
        items[NAMES[0]].read()


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_an_etag_that_is_no_md5(bucket: Bucket) -> None:
    """Where the customer's own key encrypts, an ETag only looks like an MD5, and the size is what counts."""
    bucket.proxy.fault = lambda path, span: "" if span else "tag"
    with pytest.raises(OSError, match="arrived damaged"):
        open_source(f"{bucket.url}/data").by_name()[NAMES[0]].read()
    bucket.store.pipe_file(f"{bucket.url}/data/{NAMES[0]}", content(NAMES[0]), ServerSideEncryption="aws:kms")
    assert open_source(f"{bucket.url}/data").by_name()[NAMES[0]].read() == content(NAMES[0])


@pytest.mark.parametrize("protocol, package, extra", [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_missing_extra_is_named(protocol: str, package: str, extra: str) -> None:
    """An interpreter without the package says what to install."""
    code = (f"import sys; sys.modules[{package!r}] = None\nfrom automl_cv.sources import open_source\n"
            f"from automl_cv.core import AutomlError\ntry: open_source('{protocol}://bucket')\n"
            "except AutomlError as error: print(error.code, error.hint)")
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert answer.stdout == f"missing_extra pip install automl_cv[{extra}]\n"
