"""The decode-once cache as processes see it: kill -9, Ctrl-C, two at once, damaged bytes, a full bound."""
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from automl_cv import store
from automl_cv.cache import decode_rows
from automl_cv.core import AutomlError, hash_bytes, hash_file
from automl_cv.pixels import DATASET, Policy, stored
from automl_cv.store import open_block, store_folder

COUNT, POLICY = 200, Policy(size=64, store=72)
CHILD = """
import json, sys
import pandas as pd
from automl_cv import cache, processes, store
from automl_cv.core import AutomlError, hash_bytes, stop_on_signals
from automl_cv.pixels import Policy
store.BLOCK_SECONDS = 0.01  # commit often, so that there is much to keep
processes.MANY = int(sys.argv[3])  # 0: processes decode, although there are few pictures
seen, stored = [], store.stored
store.stored = lambda *words: (seen.append(1), stored(*words))[1]
rows = pd.read_csv(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
with stop_on_signals():
    try:
        found = hash_bytes(cache.decode_rows(sys.argv[1], rows, Policy(size=64, store=72))[:].tobytes())
    except AutomlError as error:
        found = error.code
print(json.dumps({"decoded": len(seen), "found": found}))
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Draw pictures that take some time to decode: their folder, their rows, and the hash of what they become."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(COUNT):
        Image.effect_noise((640, 480), 90).convert("RGB").save(folder / f"{number:03d}.jpg", quality=90)
    names = [f"{number:03d}.jpg" for number in range(COUNT)]
    rows = pd.DataFrame({"path": names, "sha256": [hash_file(folder / name) for name in names]})
    rows.to_csv(folder.parent / "rows.csv", index=False)
    squares = [stored((folder / name).read_bytes(), POLICY, DATASET) for name in names]
    return folder, rows, hash_bytes(np.stack(squares).tobytes())


@pytest.fixture
def start(photographs, tmp_path, monkeypatch):
    """Return a function that starts a process which will decode all pictures into this test's own cache."""
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    monkeypatch.delenv("AUTOML_CV_CACHE_GB", raising=False)

    def start(many=10**9):
        given = photographs[0], photographs[0].parent / "rows.csv", many
        command = [sys.executable, "-c", CHILD, *map(str, given)]
        process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == "ready\n"
        return process

    return start


def go(*processes):
    """Let processes that are ready begin."""
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


def finish(process):
    """Wait for a process: the lines that it said, and its last one as JSON."""
    *said, last = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 0
    return said, json.loads(last)


def blocks(policy=POLICY):
    """Return the blocks of a store, the oldest use first."""
    return sorted(store_folder(policy).glob("*.block"), key=lambda path: path.stat().st_mtime)


def committed():
    """Return how many pictures the store holds for good."""
    return sum(len(open_block(path, POLICY.store).records) for path in blocks())


def wait_for_blocks(count):
    """Wait until the store has so many blocks."""
    while len(blocks()) < count:
        time.sleep(0.002)


def test_kills_lose_only_what_was_not_committed(start, photographs):
    chance = random.Random(0)
    for _ in range(3):
        before, process = committed(), start()
        go(process)
        wait_for_blocks(len(blocks()) + chance.randint(1, 3))
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.communicate()
        assert before < committed()
    kept, process = committed(), start()
    assert kept < COUNT
    go(process)
    _, last = finish(process)
    assert last == {"decoded": COUNT - kept, "found": photographs[2]}
    assert not list(store_folder(POLICY).glob(".*"))


def test_processes_that_decode_end_with_a_killed_parent(start, photographs):
    process = start(many=0)
    go(process)
    wait_for_blocks(2)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    assert len(workers) == (store.CORES if store.CORES > 1 else 0)
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    kept = committed()
    assert 0 < kept < COUNT
    process = start(many=0)
    go(process)
    _, last = finish(process)
    assert last == {"decoded": 0 if workers else COUNT - kept, "found": photographs[2]}  # by the parent itself
    assert committed() == COUNT and not list(store_folder(POLICY).glob(".*"))


def test_interrupt_loses_nothing(start, photographs):
    process = start()
    go(process)
    wait_for_blocks(2)
    process.send_signal(signal.SIGINT)
    _, last = finish(process)
    assert last == {"decoded": committed(), "found": "interrupted"}
    process = start()
    go(process)
    assert finish(process)[1] == {"decoded": COUNT - last["decoded"], "found": photographs[2]}


def test_two_processes_decode_each_picture_once(start, photographs):
    pair = [start(), start()]
    go(*pair)
    (said, first), (said_too, second) = map(finish, pair)
    assert first["found"] == second["found"] == photographs[2]
    assert sorted([first["decoded"], second["decoded"]]) == [0, COUNT] and committed() == COUNT
    assert set(said + said_too) <= {"  waiting for another process, which is filling the cache"}


def test_a_killed_process_leaves_no_lock(start, photographs):
    first, second = start(), start()
    go(first)
    wait_for_blocks(2)
    go(second)
    first.kill()
    first.communicate()
    kept = committed()
    _, last = finish(second)
    assert last["found"] == photographs[2] and last["decoded"] == COUNT - kept


@pytest.mark.parametrize("where", [1000, -10], ids=["a pixel", "a checksum"])
def test_a_flipped_byte_is_found_and_its_block_decoded_again(start, photographs, where):
    process = start()
    go(process)
    assert finish(process)[1]["decoded"] == COUNT
    damaged = blocks()[3]
    lost, data = len(open_block(damaged, POLICY.store).records), bytearray(damaged.read_bytes())
    data[where] ^= 1
    damaged.write_bytes(data)
    process = start()
    go(process)
    said, last = finish(process)
    assert last == {"decoded": lost, "found": photographs[2]}
    assert said == ([f"  the cache had a damaged picture; {lost} are thrown away"] if where > 0 else [])


def test_least_recently_used_goes_first(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    monkeypatch.setenv("AUTOML_CV_CACHE_GB", str(3.5 * 40 * (3 * 72**2 + 68) / 1e9))
    folder, rows, few = photographs[0], photographs[1], photographs[1][:40]
    policies = [Policy(64, 72, fit, version) for version in (1, 2) for fit in ("crop", "squash")]
    arrays = [decode_rows(str(folder), few, policy) for policy in policies[:3]]
    before = [blocks(policy) for policy in policies]
    decode_rows("", few, policies[0])  # used again: the second is the oldest now
    decode_rows(str(folder), few, policies[3])
    after = [blocks(policy) for policy in policies]
    assert [len(a) == len(b) for a, b in zip(before[:3], after[:3])] == [True, False, True] and after[3]
    assert np.array_equal(arrays[1][:], decode_rows(str(folder), few, policies[1])[:])  # it lives on
    assert capsys.readouterr().out == ""
    everything = decode_rows(str(folder), rows, policies[0])
    assert len(everything) == COUNT and not any(map(blocks, policies[1:]))
    assert capsys.readouterr().out == ("  the cache grows to 0.00312 GB for these pictures, over its bound of "
                                       "0.00219 GB (AUTOML_CV_CACHE_GB)\n")


def test_a_file_that_changed_is_named_and_the_rest_is_kept(photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path / "home"))
    folder = tmp_path / "data"
    folder.mkdir()
    for name in photographs[1].path[:9]:
        os.link(photographs[0] / name, folder / name)
    rows = photographs[1][:9]
    for name, damage in (("004.jpg", b"no picture"), ("005.jpg", (folder / "005.jpg").read_bytes()[:5000])):
        (folder / name).unlink()
        (folder / name).write_bytes(damage)
        broken = rows.assign(sha256=[hash_file(folder / path) if path == name else sha256
                                     for path, sha256 in zip(rows.path, rows.sha256)])
        for table in (rows, broken):
            with pytest.raises(AutomlError, match=name) as caught:
                decode_rows(str(folder), table[table.path == name], POLICY)
            assert caught.value.code == "source_changed"
    assert len(decode_rows(str(folder), rows[:4], POLICY)) == 4


def test_there_may_be_more_blocks_than_open_files(photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOML_CV_HOME", str(tmp_path))
    monkeypatch.setattr(store, "BLOCK_ROWS", 1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        assert len(decode_rows(str(photographs[0]), photographs[1], POLICY)) == COUNT == len(blocks())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
