"""What nobody would send on purpose, by the hundred: no answer of 5xx but 503, none later than 5 s.

AUTOML_CV_CASES=10000 makes it thousands, with new ones each time.
"""
import io
import os
import zipfile

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.specs.openapi.checks import (content_type_conformance, response_schema_conformance,
                                               status_code_conformance)

CASES = int(os.environ.get("AUTOML_CV_CASES") or 0)
SLOW = 5.0  # seconds
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")


def some(cases):
    """Return settings: the same few hundred cases each time, or as many new ones as asked for."""
    return settings(max_examples=CASES or cases, derandomize=not CASES, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))


def encode(kind, mode="RGB", **options):
    """Write noise, which leaves no format much to compress, as a picture; the same one each time."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    file, picture = io.BytesIO(), Image.fromarray(noise).convert("L" if mode == "I;16" else mode).convert(mode)
    picture.save(file, kind, **options)
    return file.getvalue()


def pack(*pictures):
    """Put pictures into a zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number, picture in enumerate(pictures):
            archive.writestr(zipfile.ZipInfo(f"class/{number}.png"), picture, zipfile.ZIP_DEFLATED)
    return file.getvalue()


GOOD = [*(encode(kind) for kind in KINDS), encode("PNG", "P"), encode("PNG", "I;16"), encode("JPEG", "CMYK"),
        encode("JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
        encode("TIFF", compression="tiff_lzw"), encode("TIFF", compression="jpeg"),
        encode("GIF", "P", save_all=True, append_images=[Image.new("P", (40, 30))])]
NUMBERS = [value.to_bytes(size, order) for size in (1, 2, 4) for order in ("big", "little")
           for value in (0, 1, 2**(8 * size - 1), 2**(8 * size) - 1)]
CHANGES = st.lists(st.tuples(st.integers(0, 100) | st.integers(0, 10**4), st.integers(0, 9) | st.just(10**4),
                             st.sampled_from(NUMBERS) | st.binary(max_size=30)), min_size=1, max_size=6)


def spoil(data, changes):
    """Replace bytes at some places by more or fewer others."""
    for place, cut, put in changes:
        place %= len(data) + 1
        data = data[:place] + put + data[place + cut:]
    return data


PICTURES = st.builds(spoil, st.sampled_from(GOOD), CHANGES)
ARCHIVES = st.builds(spoil, st.builds(pack, st.sampled_from(GOOD), PICTURES), CHANGES)


def check(reply, seconds):
    """Refuse answers that nobody foresaw, and those that came late."""
    assert reply.status_code < 500 or reply.status_code == 503, reply.text
    assert seconds < SLOW


@some(400)
@given(picture=PICTURES, form=st.booleans())
def test_spoiled_pictures(client, picture, form):
    what = {"files": {"file": picture}} if form else {"content": picture}
    reply = client.post("/predict?top_k=2&notes=true", **what)
    check(reply, reply.elapsed.total_seconds())
    assert reply.status_code == 200 or reply.json()["code"] not in ("busy", "not_ready")


@some(150)
@given(files=st.lists(PICTURES | ARCHIVES, min_size=1, max_size=3), kind=st.sampled_from(["json", "csv"]))
def test_spoiled_batches(client, files, kind):
    reply = client.post(f"/predict/batch?format={kind}", files=[("files", ("ä=1", file)) for file in files])
    check(reply, reply.elapsed.total_seconds())
    assert "internal_error" not in reply.text
    if reply.status_code == 200 and kind == "csv":
        assert reply.text.startswith("file,label,confidence,red,green,blue,error\r\n")


FORM = "multipart/form-data; boundary=x"
HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
TYPES = st.just(FORM) | st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20).map(FORM[:-1].__add__)
FORMS = st.builds(spoil, st.just(b"--y\r\n" + HEAD + GOOD[1] + b"\r\n" + HEAD + b"\r\n--x--\r\n"), CHANGES)


@some(150)
@given(form=FORMS, path=st.sampled_from(["/predict", "/predict/batch"]), kind=TYPES)
def test_spoiled_forms(client, form, path, kind):
    reply = client.post(path, content=form, headers={"Content-Type": kind})
    check(reply, reply.elapsed.total_seconds())


@pytest.fixture(scope="session")
def document(server):
    """Return the OpenAPI document, where files are often pictures and a model is often there."""
    schemathesis.openapi.format("binary", st.binary() | st.sampled_from(GOOD) | PICTURES)
    found = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()
    for path, operations in found["paths"].items():
        if "{name}" in path:
            for operation in operations.values():
                operation["parameters"][0]["schema"] = {"type": "string", "enum": ["colours", "other"]}
    return found


def test_everything_that_the_document_allows(server, document):
    schema, url = schemathesis.openapi.from_dict(document), server.url

    @some(300)
    @given(case=schema.as_strategy())
    def ask(case):
        reply = case.call(base_url=url)
        check(reply, reply.elapsed)
        case.validate_response(reply, checks=CHECKS)

    ask()
