"""Archives and tables from strangers: the corpus' answers, bombs in processes of their own, random damage."""
import bz2
import csv
import gzip
import io
import json
import lzma
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from automl_cv.archives import MAX_DIRECTORY, MAX_ENTRIES, open_archive
from automl_cv.core import AutomlError
from automl_cv.items import lay_out, open_folder
from automl_cv.pixels import DATASET, decode, sniff
from automl_cv.rows import MAX_LINE, read_table
from automl_cv.tables import find_table, label_items

CORPUS = Path(__file__).parents[1].parent / "shared" / "corpus"
needs_corpus = pytest.mark.skipif(not CORPUS.exists(), reason=f"THE CORPUS OF BAD INPUTS IS ABSENT: {CORPUS}")


def expected(kind, start=""):
    """Read the right answers: case to outcome."""
    if not CORPUS.exists():
        return {}
    with (CORPUS / "expected.csv").open(newline="", encoding="utf-8") as file:
        return {row["case"]: json.loads(row["dataset_outcome"]) for row in csv.DictReader(file)
                if row["kind"] == kind and row["case"].startswith(start)}


@pytest.fixture(scope="session")
def corpus(maker, tmp_path_factory):
    """Write the corpus' archives and its data sets with tables."""
    out = tmp_path_factory.mktemp("corpus")
    for name, make in maker.ARCHIVES.items():
        maker.write_file(out / name, make())
    for name in expected("dataset", "D25"):
        maker.DATASETS[name](maker.Tree(out / name))
    return out


def judge(item):
    """Tell what becomes of a file, as the data step does."""
    if item.status:
        return item.status
    content = b""
    try:
        content = item.read()
        decode(content, 64, DATASET)
    except (AutomlError, OSError):
        meant = PurePosixPath(item.name.lower()).suffix in (".jpg", ".png") or sniff(content)
        return "quarantined" if meant else "ignored"
    return "ignored" if item.label is None else "used"


def outcome(items):
    """Count what becomes of files."""
    judged = [judge(item) for item in items]
    if "used" not in judged:
        return {"outcome": "rejected", "status": 422, "code": "no_usable_image"}
    classes = {item.label for item, status in zip(items, judged) if status == "used"}
    counts = {status: judged.count(status) for status in ("used", "quarantined", "ignored")}
    return {"outcome": "used", "found": len(items), **counts, "classes": len(classes)}


@needs_corpus
@pytest.mark.parametrize("case", expected("archive"))
def test_archive(case, corpus):
    try:
        items, warnings = open_archive(corpus / case)
        found = outcome(lay_out(items))
    except AutomlError as error:
        found = {"outcome": "rejected", "status": error.status, "code": error.code}
    assert found == expected("archive")[case]


@needs_corpus
def test_archive_says_why(corpus):
    reasons = {"02_slip_absolute": "unsafe_name", "03_slip_backslash": "unsafe_name", "05_symlink": "link",
               "06_symlink_folder": "link", "07_fifo": "special_file", "22_nul_in_name": "unsafe_name",
               "23_control_in_name": "unsafe_name", "04_drive_letter": "unsafe_name"}
    for case, reason in reasons.items():
        items, _ = open_archive(corpus / f"{case}.zip")
        assert {item.reason for item in items} == {"", reason}


@needs_corpus
def test_names_are_kept(corpus):
    items, warnings = open_archive(corpus / "11_same_name_twice.zip")
    assert [item.name for item in items][-2:] == ["cat/a.jpg", "cat/a (2).jpg"]
    assert warnings == ["Names that the archive holds twice: 1. All the files were kept."]
    cased, _ = open_archive(corpus / "12_case_collision.zip")
    assert [item.label for item in lay_out(cased)] == ["cat", "cat", "dog", "dog", "Cat", "cat"]
    long, _ = open_archive(corpus / "21_long_name.zip")
    assert long[-1].name == "c" * 300 + "/a.jpg" and len(long[-1].read()) == long[-1].size


@needs_corpus
def test_lies_are_told(corpus):
    for case in ("19_wrong_crc", "24_size_lies", "32_bzip2_bomb_lies"):
        item = open_archive(corpus / f"{case}.zip")[0][-1]
        with pytest.raises(AutomlError, match="does not hold what it declares") as caught:
            item.read()
        assert caught.value.code == "damaged_image"
    with pytest.raises(AutomlError, match="The limit is 50 MB") as caught:
        open_archive(corpus / "08_one_200_mb_entry.zip")[0][-1].read()
    assert caught.value.code == "file_too_large"


@needs_corpus
@pytest.mark.parametrize("case", expected("dataset", "D25"))
def test_table_in_a_folder(case, corpus):
    items = open_folder(corpus / case)
    table = find_table(items)
    assert table.name == "labels.csv"
    labelled = label_items([item for item in items if item is not table], read_table(table.read(), ".csv"))
    wanted = expected("dataset")[case]
    assert labelled.bad_rows == wanted.pop("bad_rows", {})
    assert outcome(labelled.items) == wanted
    assert case != "D25c_csv_latin1" or labelled.items[1].label == "chien bâtard"


@needs_corpus
@pytest.mark.parametrize("wrapper", ["", "data/"])
def test_table_in_an_archive(wrapper, corpus, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for item in open_folder(corpus / "D25a_csv_bad_rows"):
            archive.writestr(wrapper + item.name, item.read())
    items, _ = open_archive(tmp_path / "data.zip")
    table = find_table(items)
    labelled = label_items([item for item in items if item is not table], read_table(table.read(), ".csv"),
                           folder=wrapper.rstrip("/"))
    wanted = expected("dataset")["D25a_csv_bad_rows"]
    assert labelled.bad_rows == wanted.pop("bad_rows")
    assert outcome(labelled.items) == wanted


# ------------------------------------------------------------------------------------------------- bombs


def lying_zip(path, method, packed, size, flags=0):
    """Write a zip of one entry by hand: what it declares need not be true."""
    common = struct.pack("<HHHHHIIIHH", 63, flags, method, 0, 0x21, 0, len(packed), size, 5, 0)
    entry = b"PK\1\2\x3f\3" + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + b"a.jpg"
    body = b"PK\3\4" + common + b"a.jpg" + packed
    path.write_bytes(body + entry + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(body), 0))


ZEROS = bytes(2**28)


def deflate_bomb(path):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    lying_zip(path, 8, packer.compress(ZEROS) + packer.flush(), 2000)


def bzip2_bomb(path):
    lying_zip(path, 12, bz2.compress(ZEROS), 2000)


def lzma_bomb(path, dictionary=b"\0\0\4\0"):
    alone = lzma.compress(ZEROS, lzma.FORMAT_ALONE, preset=0)
    lying_zip(path, 14, b"\x09\x14\x05\x00" + alone[:1] + dictionary + alone[13:], 2000, flags=2)


def lzma_dictionary(path):
    """Ask for a dictionary of 4 GB."""
    lzma_bomb(path, b"\xff\xff\xff\xff")


def xz_dictionary(path):
    """The same in the header of an xz block, whose checksum is set right."""
    data = bytearray(lzma.compress(random.Random(0).randbytes(2000)))
    data[12 + 4] = 40  # size, flags, filter, length, dictionary
    data[12 + 8:12 + 12] = struct.pack("<I", zlib.crc32(data[12:12 + 8]))
    path.write_bytes(data)


def tar_bomb(pack):
    def write(path):
        head = tarfile.TarInfo("a.jpg")
        head.size = len(ZEROS)
        path.write_bytes(pack(head.tobuf() + ZEROS + bytes(1024)))
    return write


def pax_bomb(path):
    """Announce a gigabyte of extended header."""
    head = tarfile.TarInfo("x")
    head.type, head.size = tarfile.XHDTYPE, 2**30
    path.write_bytes(gzip.compress(head.tobuf() + ZEROS))


def directory_bomb(path):
    """List four million entries, and say four."""
    entries = 4_000_000 * (b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", *[0] * 16))
    path.write_bytes(entries + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 4, 4, len(entries), 0, 0))


BOMBS = {"deflate": deflate_bomb, "bzip2": bzip2_bomb, "lzma": lzma_bomb, "pax": pax_bomb,
         "lzma dictionary": lzma_dictionary, "xz dictionary": xz_dictionary,
         "directory": directory_bomb, "tar.bz2": tar_bomb(bz2.compress),
         "tar.gz": tar_bomb(lambda data: gzip.compress(data, 1)),
         "tar.xz": tar_bomb(lambda data: lzma.compress(data, preset=0))}
PEAK = """
import re, sys
from pathlib import Path
def peak():  # MB; getrusage would count the parent's memory before exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
"""
READ = PEAK + """
from automl_cv.archives import open_archive
from automl_cv.core import AutomlError
before = peak()
try:
    for item in open_archive(Path(sys.argv[1]))[0]:
        item.read()
except AutomlError as error:
    print(error.code, peak() - before)
"""
CODES = {"pax": "bad_archive", "xz dictionary": "bad_archive", "directory": "too_many_files",
         "tar.gz": "file_too_large", "tar.bz2": "archive_too_large", "tar.xz": "archive_too_large"}


@pytest.mark.parametrize("kind", BOMBS)
def test_bomb_needs_little_memory(kind, tmp_path):
    BOMBS[kind](tmp_path / "bomb")
    run = subprocess.run([sys.executable, "-c", READ, tmp_path / "bomb"], capture_output=True, text=True)
    assert run.stderr == ""
    code, grown = run.stdout.split()
    assert code == CODES.get(kind, "damaged_image")
    assert int(grown) < (200 if kind == "directory" else 64)  # MB


# -------------------------------------------------------------------------------------------------- tars


def tar_of(path, *heads, mode="w", **options):
    """Write a tar from headers and contents."""
    with tarfile.open(path, mode, **options) as archive:
        for name, content, facts in heads:
            head = tarfile.TarInfo(name)
            head.size = len(content)
            for key, value in facts.items():
                setattr(head, key, value)
            archive.addfile(head, io.BytesIO(content))
    return path


def test_tar_keeps_out_of_the_file_system(tmp_path):
    heads = [("/etc/passwd", b"1", {}), ("../up.jpg", b"2", {}), ("C:/a.jpg", b"3", {}),
             ("cat/a.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
             ("cat/b.jpg", b"", {"type": tarfile.LNKTYPE, "linkname": "cat/a.jpg"}),
             ("dev/null", b"", {"type": tarfile.CHRTYPE}), ("dev/sda", b"", {"type": tarfile.BLKTYPE}),
             ("cat/pipe", b"", {"type": tarfile.FIFOTYPE}), ("./cat/c.jpg", b"4", {}),
             ("cat/.DS_Store", b"", {}), ("x", b"5", {"pax_headers": {"path": "../../pax.jpg"}})]
    items, warnings = open_archive(tar_of(tmp_path / "a.tar", *heads))
    assert [item.reason for item in items] == 3 * ["unsafe_name"] + 2 * ["link"] + 3 * ["special_file"] + [
        "", "system_file", "unsafe_name"]
    assert (items[8].name, items[8].read(), warnings) == ("cat/c.jpg", b"4", [])
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_tar_of_too_many_files(tmp_path):
    heads = [(f"c/{i}", b"", {}) for i in range(MAX_ENTRIES + 1)]
    for mode in ("w", "w:gz"):
        with pytest.raises(AutomlError, match="50001 files") as caught:
            open_archive(tar_of(tmp_path / "a.tar", *heads, mode=mode))
        assert caught.value.code == "too_many_files"


def test_tar_of_headers_alone(tmp_path):
    head = tarfile.TarInfo("L")
    head.type = tarfile.GNUTYPE_LONGNAME
    (tmp_path / "a.tar").write_bytes(head.tobuf() * (MAX_DIRECTORY // 512 + 1))
    with pytest.raises(AutomlError, match="far too many files"):
        open_archive(tmp_path / "a.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_cut_tar_is_refused(mode, tmp_path):
    noise = random.Random(0).randbytes(5000)
    tar_of(tmp_path / "a.tar", ("cat/a.jpg", noise, {}), ("dog/b.jpg", noise[::-1], {}), mode=mode)
    whole = (tmp_path / "a.tar").read_bytes()
    end = 2 * (512 + 5120) if mode == "w" else len(whole) - 1
    for size in (*range(0, end, 512), end):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(AutomlError) as caught:
            open_archive(tmp_path / "a.tar")
        assert caught.value.code == "bad_archive"


def test_negative_size_ends_at_once(tmp_path):
    """CVE-2025-8194: a header that leads backwards."""
    block = bytearray(tarfile.TarInfo("a").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + b"\xfc\0"  # base 256: -1024
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "a.tar").write_bytes(tarfile.TarInfo("b").tobuf() * 2 + block + bytes(1024))
    with pytest.raises(AutomlError, match="not a readable"):
        open_archive(tmp_path / "a.tar")


def test_sparse_tar_is_refused(tmp_path):
    for facts in ({"type": tarfile.GNUTYPE_SPARSE}, {"pax_headers": {"GNU.sparse.major": "1"}}):
        with pytest.raises(AutomlError, match="sparse"):
            open_archive(tar_of(tmp_path / "a.tar", ("a.jpg", b"1", facts)))


def test_tar_inside_a_tar_is_no_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("inner.jpg", b"1")
    nested = (tmp_path / "in.zip").read_bytes()
    items, _ = open_archive(tar_of(tmp_path / "a.zip", ("cat/a.jpg", b"1", {}), ("cat/in.zip", nested, {})))
    assert [item.name for item in items] == ["cat/a.jpg", "cat/in.zip"]


# ---------------------------------------------------------------------------------------------- any archive


def packed_files(path, kind):
    """Pack 200 files of noise."""
    source = random.Random(1)
    files = {f"c/{i}": source.randbytes(source.randrange(1, 9000)) for i in range(200)}
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        tar_of(path, *((name, content, {}) for name, content in files.items()), mode=kind)
    return files


@pytest.mark.parametrize("kind", ["zip", "w", "w:gz"])
def test_many_threads_read_in_any_order(kind, tmp_path):
    files = packed_files(tmp_path / "a", kind)
    items = open_archive(tmp_path / "a")[0] * 20
    random.Random(2).shuffle(items)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda item: item.read() == files[item.name], items))


def test_method_that_is_not_read(tmp_path):
    lying_zip(tmp_path / "a.zip", 9, b"1", 1)
    with pytest.raises(AutomlError, match="a method that is not read") as caught:
        open_archive(tmp_path / "a.zip")[0][0].read()
    assert caught.value.code == "unsupported_format"


def test_full_disk_is_told(tmp_path):
    packed_files(tmp_path / "a", "w:gz")
    code = """
import resource, sys
from pathlib import Path
from automl_cv.archives import open_archive
from automl_cv.core import AutomlError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    open_archive(Path(sys.argv[1]))
except AutomlError as error:
    print(error.code)
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("disk_trouble\n", "")


@pytest.mark.parametrize("kind", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_stamp_follows_the_content(kind, tmp_path):
    files = packed_files(tmp_path / "a", kind)
    stamps = [item.stamp for item in open_archive(tmp_path / "a")[0]]
    assert len(set(stamps)) == len(files)
    assert [item.stamp for item in open_archive(tmp_path / "a")[0]] == stamps
    (tmp_path / "a").touch()
    assert not set(stamps) & {item.stamp for item in open_archive(tmp_path / "a")[0]}


@pytest.mark.parametrize("kind", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_random_damage_is_answered(kind, tmp_path):
    packed_files(tmp_path / "a", kind)
    whole, source = (tmp_path / "a").read_bytes()[:40_000], random.Random(3)
    tail = (tmp_path / "a").read_bytes()[-20_000:]
    answers = set()
    for _ in range(150):
        data = bytearray(source.choice([whole, tail, whole + tail]))
        for _ in range(source.randrange(1, 30)):
            data[source.randrange(len(data))] = source.randrange(256)
        (tmp_path / "b").write_bytes(data)
        try:
            for item in open_archive(tmp_path / "b")[0]:
                try:
                    item.read()
                except (AutomlError, OSError) as error:
                    answers.add(getattr(error, "code", "unreadable"))
        except AutomlError as error:
            answers.add(error.code)
    assert answers <= {"bad_archive", "empty_archive", "archive_too_large", "password_protected",
                       "overlapping_entries", "damaged_image", "file_too_large", "unsupported_format",
                       "unreadable"}


# --------------------------------------------------------------------------------------------------- tables


def test_huge_line_is_not_held(tmp_path):
    code = PEAK + """
from automl_cv.rows import read_table
data = Path(sys.argv[1]).read_bytes()
before = peak()
table = read_table(data, ".csv")
print(table.bad_rows, table.lines, peak() - before < 20)
"""
    (tmp_path / "a.csv").write_bytes(b"file,label\n" + b"x" * 150_000_000 + b"\n1.jpg,cat\n")
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a.csv"], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("{'line_too_long': [2]} [3] True\n", "")


def test_parquet_that_unpacks_to_gigabytes(tmp_path):
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 50_000), pa.array(["x" * 10**5]))
    for store_schema in (True, False):  # read back as a dictionary, or as plain text
        pq.write_table(pa.table({"file": cells}), tmp_path / "a.parquet", store_schema=store_schema)
        data = (tmp_path / "a.parquet").read_bytes()
        assert len(data) < 100_000
        with pytest.raises(AutomlError, match="over 200 MB") as caught:
            read_table(data, ".parquet")
        assert caught.value.code == "file_too_large"


def test_header_that_is_too_long():
    with pytest.raises(AutomlError, match="no header"):
        read_table(b"file,label" + b"," * 2**20 + b"\n1.jpg,cat\n", ".csv")


def test_odd_cells_come_back():
    pytest.importorskip("hypothesis", reason="THE PACKAGE hypothesis IS ABSENT")
    from hypothesis import given
    from hypothesis import strategies as st

    cell = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)

    @given(st.lists(st.tuples(cell, cell), min_size=1, max_size=20), st.sampled_from(",;\t|"))
    def check(rows, delimiter):
        file = io.StringIO()
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
        writer.writerows([("file", "label"), *rows])
        table = read_table(file.getvalue().encode(), ".csv")
        kept = [row for row in rows if any(row)]
        assert list(zip(table.columns["file"], table.columns["label"])) == kept
        assert table.bad_rows == {}

    check()


def test_any_bytes_are_a_table_or_refused():
    pytest.importorskip("hypothesis", reason="THE PACKAGE hypothesis IS ABSENT")
    from hypothesis import given
    from hypothesis import strategies as st

    @given(st.binary(max_size=300), st.sampled_from([".csv", ".jsonl", ".parquet"]))
    def check(data, suffix):
        try:
            table = read_table(data, suffix)
        except AutomlError as error:
            assert error.code == "bad_table"
        else:
            assert {len(cells) for cells in table.columns.values()} <= {len(table.lines)}

    check()


def test_a_line_may_be_just_short_enough():
    table = read_table(b"file,label\n" + b"x" * (MAX_LINE - 5) + b",cat\n", ".csv")
    assert (table.lines, table.bad_rows) == ([], {"unreadable_row": [2]})  # csv allows 128 KiB a cell
