"""The Python client against the real service, against its death, and against connections that break."""
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from automl_cv.client import Client, wait_ready
from automl_cv.core import AutomlError

HEAVY = ("numpy", "PIL", "fastapi", "torch", "onnxruntime", "rich")


def test_needs_nothing_but_the_standard_library():
    code = f"import sys, automl_cv.client; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture
def files(tmp_path, plain):
    """Make 60 pictures with two bad ones among them."""
    for index in range(60):
        (tmp_path / f"{index:02}.png").write_bytes(plain(("red", "lime", "blue")[index % 3]))
    (tmp_path / "10.png").write_text("no picture")
    (tmp_path / "20.png").write_bytes(b"")
    return sorted(tmp_path.iterdir())


def check(files, answers):
    """Check that answers are complete, in order, and right."""
    assert [path for path, _ in answers] == files
    for index, (_, answer) in enumerate(answers):
        if index in (10, 20):
            assert answer.code == {10: "not_an_image", 20: "empty_file"}[index]
        else:
            assert answer["label"] == ("red", "green", "blue")[index % 3]


def test_real_service(server, files):
    client = Client(server.url + "/")
    assert client.predict(files[0])["label"] == "red"
    assert "red" in str(client.predict(files[0], top_k=3)) and "blue" in str(client.predict(files[0], top_k=3))
    with pytest.raises(AutomlError) as refused:
        client.predict(files[10])
    assert refused.value.code == "not_an_image"
    check(files, list(client.predict_many(files, workers=4)))


def serve(bundle, port):
    """Start a service on a port."""
    env = os.environ | {"AUTOML_CV_MODEL": str(bundle), "HOST": "127.0.0.1", "PORT": str(port)}
    return subprocess.Popen([sys.executable, "-m", "automl_cv.serve"], env=env, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def test_service_is_killed_and_replaced(bundle, files, free):
    url, process = f"http://127.0.0.1:{free}", serve(bundle, free)
    try:
        wait_ready(url, 60)
        answers = []
        for pair in Client(url, tries=12).predict_many(files, workers=4):
            answers.append(pair)
            if len(answers) == 15:
                process.send_signal(signal.SIGKILL)
                process.wait()
                process = serve(bundle, free)
        check(files, answers)
    finally:
        process.kill()
        process.wait()


def test_no_service_is_an_error_after_all_tries(files, free):
    with pytest.raises(AutomlError, match="Nothing answers") as refused:
        Client(f"http://127.0.0.1:{free}", tries=3).predict(files[0])
    assert refused.value.code == "not_ready"


def test_an_answer_that_is_cut_is_told_from_none(files):
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        def cut():
            with listener.accept()[0] as guest:
                guest.recv(2**20)
                guest.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        pool.submit(cut)
        with pytest.raises(AutomlError, match="hung up before its answer was whole") as refused:
            Client(f"http://127.0.0.1:{listener.getsockname()[1]}", tries=1).predict(files[0])
    assert refused.value.code == "not_ready"


def test_waiting_outlives_what_does_not_speak_http():
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        def greet():
            with listener.accept()[0] as guest:
                guest.recv(2**20)
                guest.sendall(b"220 mail.example\r\n")
            listener.close()
        pool.submit(greet)
        with pytest.raises(AutomlError, match="did not become ready") as refused:
            wait_ready(f"http://127.0.0.1:{listener.getsockname()[1]}", 1)
    assert refused.value.code == "not_ready"


def test_what_cannot_be_sent_is_told_at_once_and_without_the_key(files, server):
    for url, headers in ((server.url, {"X-API-Key": "secret\n"}), (server.url, {"X-API-Key": "“secret”"}),
                         (f"{server.url}/a b", {}), ("http://127.0.0.1:port", {})):
        with pytest.raises(AutomlError, match="cannot be sent over HTTP") as refused:
            Client(url, headers).predict(files[0])
        assert refused.value.code == "wrong_parameter_type" and "secret" not in str(refused.value)


def test_a_service_that_is_slow_is_told_from_one_that_is_absent(files):
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes the connection and says nothing
        with pytest.raises(AutomlError, match=r"did not answer within 0.2 s\. Give it more time"):
            Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.2).predict(files[0])


REFUSED = (b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
TOO_MANY = REFUSED.replace(b"503 Service Unavailable", b"429 Too Many Requests")
NOBODY = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 5\r\nConnection: close\r\n\r\nnginx"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\nConnection: close\r\n\r\n" + b'{"label": "x"}'


def read_request(line):
    """Read one request to its end."""
    file, head = line.makefile("rb"), b""
    while not head.endswith(b"\r\n\r\n"):
        head += file.readline()
    file.read(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))
    return head


def scripted(listener, script, heard):
    """Meet each connection with the next entry of a script: bytes to answer, or None to reset it."""
    for reply in script:
        line, _ = listener.accept()
        with line:
            heard.append(read_request(line))
            if reply is None:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                line.sendall(reply)


@pytest.mark.parametrize("script", [[None, None, ANSWER], [REFUSED, ANSWER], [TOO_MANY, TOO_MANY, ANSWER],
                                    [ANSWER[:-5], None, REFUSED, ANSWER], [NOBODY, NOBODY, ANSWER]],
                         ids=["reset", "busy", "too many", "half an answer", "restarted behind a proxy"])
def test_transient_trouble_is_outlived(files, script):
    heard, began = [], time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=scripted, args=(listener, script, heard), daemon=True)
        thread.start()
        client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}", {"Authorization": "Bearer abc"})
        assert client.predict(files[0]) == {"label": "x"}
        thread.join(10)
    assert len(heard) == len(script) and all(b"Authorization: Bearer abc" in request for request in heard)
    assert time.monotonic() - began >= script.count(REFUSED) + script.count(TOO_MANY)  # seconds, as Retry-After asks


def test_an_answer_that_is_no_json_is_not_ours(files):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        page = ANSWER.replace(b'{"label": "x"}', b"<h1>Sign in</>")
        threading.Thread(target=scripted, args=(listener, [page], []), daemon=True).start()
        with pytest.raises(AutomlError, match="answers, but not with JSON"):
            Client(f"http://127.0.0.1:{listener.getsockname()[1]}").predict(files[0])


def test_what_a_proxy_does_not_let_through_is_too_large(files):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        page = NOBODY.replace(b"502 Bad Gateway", b"413 Request Entity Too Large")
        threading.Thread(target=scripted, args=(listener, [page], []), daemon=True).start()
        with pytest.raises(AutomlError) as refused:
            Client(f"http://127.0.0.1:{listener.getsockname()[1]}").predict(files[0])
    assert (refused.value.code, refused.value.exit_code) == ("file_too_large", 3)
    assert str(refused.value) == "Something before the service takes no file so large."


def test_no_try_and_no_worker_are_refused(server, files):
    with pytest.raises(AutomlError, match="tries is 0. Give a number from 1 on.") as refused:
        Client(server.url, tries=0).predict(files[0])
    assert refused.value.code == "wrong_parameter_type"
    with pytest.raises(AutomlError, match="workers is 0. Give a number from 1 on.") as refused:
        next(Client(server.url).predict_many(files, workers=0))
    assert refused.value.code == "wrong_parameter_type"


def test_a_refusal_is_heard_before_all_is_sent(bundle, start):
    with start(bundle, AUTOML_CV_API_KEYS="0" * 64) as server:
        for _ in range(5):
            with pytest.raises(AutomlError) as refused:
                Client(server.url, {"X-API-Key": "wrong"}, tries=1).predict(bytes(9 * 2**20))
            assert refused.value.code == "no_key"


def test_a_key_goes_nowhere_else(files):
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as other:
        there = f"http://127.0.0.1:{other.getsockname()[1]}/predict"
        moved = (f"HTTP/1.1 302 Found\r\nLocation: {there}?next=1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        threading.Thread(target=scripted, args=(listener, [moved.encode()], []), daemon=True).start()
        with pytest.raises(AutomlError) as refused:
            Client(f"http://127.0.0.1:{listener.getsockname()[1]}", {"X-API-Key": "secret"}, timeout=2).predict(files[0])
        assert (refused.value.code, str(refused.value)) == ("not_ready", f"The address points to {there}. Ask there.")
        other.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody came
            other.accept()
