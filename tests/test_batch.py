"""`automl-cv predict --csv` as a process that is killed, stopped, and started twice."""
import csv
import fcntl
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PICTURES = 2000
NAMES = {"red": "red", "lime": "green", "blue": "blue"}  # colours as Pillow and as the bundle call them


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, plain):
    """Make a folder of pictures in three colours with some bad ones among them."""
    folder = tmp_path_factory.mktemp("pictures")
    good = [plain(colour) for colour in NAMES]
    for index in range(PICTURES):
        (folder / f"{index:05}.png").write_bytes(b"bad" if index % 100 == 50 else good[index % 3])
    return folder


def test_command_line_is_light():
    """The image has no training packages, and its job calls `automl-cv predict`."""
    heavy = ("torch", "pandas", "matplotlib", "scipy", "sklearn", "optuna", "mlflow", "pyarrow", "safetensors")
    code = f"import sys, automl_cv.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def start(*words):
    """Run the command line as a user does."""
    command = [sys.executable, "-c", "from automl_cv.cli import main; main()", "predict", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def break_off(process, folder, number):
    """Signal a process once its draft holds a block of rows; return the draft's rows."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        draft = next(folder.glob(".answers.csv.*.part"), None)
        if draft and draft.read_bytes().count(b"\n") > 300:
            process.send_signal(number)
            process.wait(30)
            return draft.read_bytes().count(b"\n") - 1
        time.sleep(0.005)
    raise AssertionError(f"there was nothing to break: {process.poll()}")


def read(table):
    """Read a table by the names of its columns."""
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check(table, pictures):
    """Check that a table is complete, in order, and right."""
    rows = read(table)
    assert [row["file"] for row in rows] == sorted(map(str, pictures.iterdir()))
    assert list(rows[0]) == ["file", "label", "confidence", "red", "green", "blue", "error"]
    for index, row in enumerate(rows):
        bad = index % 100 == 50
        assert row["error"] == ("not_an_image" if bad else "")
        assert row["label"] == ("" if bad else list(NAMES.values())[index % 3])
        assert bad or float(row[row["label"]]) == float(row["confidence"]) > 0.9


def test_killed_twice_and_complete(bundle, pictures, tmp_path, plain):
    table, kept = tmp_path / "answers.csv", 0
    for _ in range(2):
        rows = break_off(start(bundle, pictures, "--csv", table), tmp_path, signal.SIGKILL)
        assert rows >= kept and not table.exists()
        kept = rows
    first = pictures / "00000.png"
    first.write_bytes(plain("blue"))  # whoever computed it again would say blue now
    try:
        process = start(bundle, pictures, "--csv", table)
        said = process.communicate(timeout=120)[1]
    finally:
        first.write_bytes(plain("red"))
    assert process.returncode == 0 and f"{PICTURES - PICTURES // 100} of {PICTURES} pictures classified" in said
    assert "pictures a second; " in said and int(said.split("; ")[1].split()[0]) >= kept - 1
    check(table, pictures)
    assert not list(tmp_path.glob(".*"))


def test_stopped_and_resumed(bundle, pictures, tmp_path):
    table = tmp_path / "answers.csv"
    process = start(bundle, pictures, "--csv", table)
    assert break_off(process, tmp_path, signal.SIGTERM) >= 300
    assert process.returncode == 4 and "[interrupted]" in process.stderr.read()
    process = start(bundle, pictures, "--csv", table)
    assert "kept from before the break" in process.communicate(timeout=120)[1]
    check(table, pictures)


def test_second_call_is_refused(bundle, pictures, tmp_path):
    process = start(bundle, pictures, "--csv", tmp_path / "answers.csv")
    rows = break_off(process, tmp_path, signal.SIGKILL)
    draft = next(tmp_path.glob(".*.part"))
    with draft.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = start(bundle, pictures, "--csv", tmp_path / "answers.csv")
        assert "[run_exists]" in second.communicate(timeout=60)[1]
    assert second.returncode == 2 and draft.read_bytes().count(b"\n") - 1 == rows


def test_tasks_share_a_folder(bundle, pictures, tmp_path):
    for task in range(3):
        words = ("--csv", tmp_path / "a.csv", "--tasks", 3, "--task", task)
        assert start(bundle, *sorted(pictures.iterdir())[:10], *words).wait(60) == 0
    found = [[Path(row["file"]).name for row in read(tmp_path / f"a-{n}-of-3.csv")] for n in (1, 2, 3)]
    assert found[0] == ["00000.png", "00003.png", "00006.png", "00009.png"]
    assert sorted(sum(found, [])) == [f"{index:05}.png" for index in range(10)]


def test_tables_of_other_tasks_are_no_pictures(bundle, pictures, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(pictures.iterdir())[:4]:
        (folder / path.name).write_bytes(path.read_bytes())
    for task in (0, 1, 0):
        words = ("--csv", folder / "a.csv", "--tasks", 2, "--task", task)
        assert start(bundle, folder, *words).wait(60) == 0
    found = [[Path(row["file"]).name for row in read(folder / f"a-{n}-of-2.csv")] for n in (1, 2)]
    assert found == [["00000.png", "00002.png"], ["00001.png", "00003.png"]]


def test_links_have_rows(bundle, pictures, tmp_path):
    """A link to a picture is one, and a link that leads nowhere is an error of its own."""
    (folder := tmp_path / "links").mkdir()
    (folder / "a.png").symlink_to(pictures / "00000.png")
    (folder / "b.png").symlink_to("nowhere.png")
    (folder / "c.png").symlink_to("c.png")
    process = start(bundle, folder, "--csv", tmp_path / "a.csv")
    assert "1 of 3 pictures classified" in process.communicate(timeout=60)[1]
    assert process.returncode == 0
    found = [(Path(row["file"]).name, row["label"], row["error"]) for row in read(tmp_path / "a.csv")]
    assert found == [("a.png", "red", ""), ("b.png", "", "source_not_found"), ("c.png", "", "source_not_found")]


def test_reader_that_leaves_is_no_error(bundle, pictures):
    """`automl-cv predict ... | head` ends like other programs whose pipe is closed."""
    code = "from automl_cv.cli import main; main()"
    command = [sys.executable, "-c", code, "predict", str(bundle), *[str(pictures)] * 3]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "file,label,confidence,red,green,blue,error\n"
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ("", 141)


def test_table_behind_a_link_and_no_file(bundle, pictures, tmp_path):
    (tmp_path / "link.csv").symlink_to("real.csv")
    picture = pictures / "00000.png"
    assert start(bundle, picture, "--csv", tmp_path / "link.csv").wait(60) == 0
    assert (tmp_path / "link.csv").is_symlink() and len(read(tmp_path / "real.csv")) == 1
    refused = start(bundle, picture, "--csv", "/dev/stdout")
    assert "/dev/stdout is not a file. Without one, rows are printed. [wrong_parameter_type]" in refused.stderr.read()
    assert refused.wait(60) == 2


def test_removed_draft_ends_the_call(bundle, pictures, tmp_path):
    """Else it would take for its own what a second call has written so far, and call that complete."""
    table = tmp_path / "answers.csv"
    with start(bundle, *[pictures] * 20, "--csv", table) as process:
        end = time.monotonic() + 60
        while time.monotonic() < end and not (drafts := list(tmp_path.glob(".answers.csv.*.part"))):
            time.sleep(0.005)
        drafts[0].unlink()
        said = process.communicate(timeout=120)[1]
    assert (process.returncode, "was removed. Start again. [disk_trouble]" in said) == (5, True), said
    assert not list(tmp_path.iterdir())
