"""Spans of a real service, sent to a real OTLP endpoint on loopback."""
import json
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE, SPAN = "ab" * 16, "cd" * 8


class Collector(BaseHTTPRequestHandler):
    """Keep what arrives, or never answer."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, self.headers.get("x-team"), ExportTraceServiceRequest.FromString(body)))
        if self.server.mute:
            time.sleep(30)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words):
        """Say nothing."""


@pytest.fixture
def collector():
    """Run a collector."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.daemon_threads, server.block_on_close = True, False
    server.got, server.mute = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def wanted(collector, **more):
    """Return the environment that asks for spans."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}", "NO_PROXY": "*"} | more


def test_request_is_a_span_with_its_stages(start, bundle, plain, collector):
    with start(bundle, **wanted(collector, OTEL_EXPORTER_OTLP_HEADERS="x-team=vision", OTEL_SERVICE_NAME="shop")) as server:
        answer = httpx.post(f"{server.url}/predict", content=plain("red"), trust_env=False,
                            headers={"traceparent": f"00-{TRACE}-{SPAN}-01", "content-type": "image/png"})
        httpx.post(f"{server.url}/predict", content=b"no picture", trust_env=False,
                   headers={"traceparent": f"00-{TRACE}-{SPAN}-00", "content-type": "image/png"})
    assert answer.status_code == 200
    assert {(path, team) for path, team, _ in collector.got} == {("/v1/traces", "vision")}
    sent = [part for _, _, request in collector.got for part in request.resource_spans]
    spans = [span for part in sent for scope in part.scope_spans for span in scope.spans]
    facts = defaultdict(dict)
    for span in spans:
        facts[span.name] |= {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
    (asked,) = [span for span in spans if span.name == "POST /predict"]  # the caller of the other one records nothing
    assert (asked.trace_id.hex(), asked.parent_span_id.hex()) == (TRACE, SPAN)
    assert facts["POST /predict"] == {
        "http.request.method": "POST", "url.path": "/predict", "http.response.status_code": 200,
        "http.route": "/predict", "url.scheme": "http",  # what traces are grouped by
        "request_id": answer.headers["x-request-id"]}
    stages = [span for span in spans if span.parent_span_id == asked.span_id]
    assert [span.name for span in stages] == ["read", "queue", "decode", "infer"]
    assert all(asked.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
               <= asked.end_time_unix_nano for span in stages)
    assert {a.key: a.value.string_value for a in sent[0].resource.attributes}["service.name"] == "shop"
    lines = [json.loads(line) for line in server.log.with_name("journal.txt").read_text().splitlines()]
    (line,) = [line for line in lines if line["request_id"] == answer.headers["x-request-id"]]
    assert line["logging.googleapis.com/spanId"] == asked.span_id.hex()  # the log and the trace agree


def test_mute_collector_delays_no_answer_and_no_goodbye(start, bundle, plain, collector):
    collector.mute = True
    with start(bundle, **wanted(collector, OTEL_BSP_SCHEDULE_DELAY="50")) as server:
        for _ in range(3):
            assert httpx.post(f"{server.url}/predict", files={"file": plain("red")}, trust_env=False).status_code == 200
            time.sleep(0.1)
        server.process.terminate()
        assert server.process.wait(8) == 0
    assert collector.got


def test_other_protocol_is_said_and_serves(start, bundle, plain, collector):
    with start(bundle, **wanted(collector, OTEL_EXPORTER_OTLP_PROTOCOL="grpc")) as server:
        assert httpx.post(f"{server.url}/predict", files={"file": plain("red")}, trust_env=False).status_code == 200
    assert "No spans are sent: the protocol is http/protobuf here, not grpc." in server.log.read_text()
    assert collector.got == []
