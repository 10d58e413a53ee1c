from __future__ import annotations

import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dataset_build.download import DownloadSettings
from dataset_build.download.connection import Detour
from dataset_build.download.transport import Transport
from tests.dataset_build.download.conftest import FILES


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = FILES["/ok.jpg"]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Where `a.example` is served with a certificate that no authority knows: `cert.pem`."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", "key.pem", "-out", "cert.pem"]
    name = ["-subj", "/CN=a.example", "-addext", "subjectAltName=DNS:a.example"]
    command = ["openssl", "req", "-x509", *key, *files, *name]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    web = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    web.socket = context.wrap_socket(web.socket, server_side=True)
    thread = threading.Thread(target=web.serve_forever, args=(0.05,))
    thread.start()
    yield f".example=127.0.0.1:{web.server_port}"
    web.shutdown()
    thread.join()
    web.server_close()


@pytest.mark.parametrize(
    ("trusts_it", "host", "reason"),
    [(True, "a.example", "ok"), (False, "a.example", "tls"), (True, "b.example", "tls")],
)
def test_certificates_are_judged_by_the_authorities_of_the_environment(
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trusts_it: bool,
    host: str,
    reason: str,
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    if trusts_it:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    settings = DownloadSettings(timeout_s=5.0, retries=0, allow_networks=("127.0.0.0/8",))
    transport = Transport(settings, Detour.parse(server), lambda: False)
    assert transport.fetch(f"https://{host}/ok.jpg").reason == reason
    transport.close()
