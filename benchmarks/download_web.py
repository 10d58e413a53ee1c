"""Real photographs on many hosts of loopback, over http and https, for `benchmarks.download`.

nginx serves them as a web server does: connections kept, TLS 1.3 with tickets. It is a process of
its own, so what serving takes is charged to neither side. What both sides must trust is the
machine's own authorities and one more, made here.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import MissingInput

DOMAIN = "photos.example"

_CONFIG = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
worker_rlimit_nofile 8192;
events {{ worker_connections 4096; }}
http {{
  access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000; keepalive_timeout 75s;
  default_type image/jpeg; open_file_cache max=1000;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  ssl_certificate {folder}/site.pem; ssl_certificate_key {folder}/site.key;
  ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache shared:tls:10m;
  server {{
    listen 127.0.0.1:{http} backlog=2048; listen 127.0.0.1:{https} ssl backlog=2048;
    location ~ "^/(\\d+)/\\d+\\.jpg$" {{ alias {folder}/photos/$1.jpg; }}
  }}
}}
"""


class Web:
    """The two ports, and the file with every authority to trust."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.photos = _photos(folder / "photos")
        self.authorities = folder / "authorities.pem"
        self.ports = {"http": _free_port(), "https": _free_port()}

    def urls(self, scheme: str, count: int, hosts: int) -> list[str]:
        """`count` different addresses, each of a photograph, on so many hosts."""
        return [
            f"{scheme}://h{number % hosts:03d}.{DOMAIN}/{number % self.photos}/{number}.jpg"
            for number in range(count)
        ]


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """nginx on loopback until the block ends. Raises `MissingInput` for what is not there."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        raise MissingInput("the benchmark needs nginx (Debian: apt-get install nginx-light)")
    web = Web(folder)
    _certify(folder, web.authorities)
    config = folder / "nginx.conf"
    config.write_text(_CONFIG.format(folder=folder, **web.ports))
    process = subprocess.Popen([nginx, "-c", config, "-p", folder])
    try:
        for port in web.ports.values():
            _await(port, process)
        yield web
    finally:
        process.terminate()
        process.wait()


def _photos(folder: Path) -> int:
    """Unpack the photographs as `0.jpg`, `1.jpg`, …; how many there are."""
    source = Path(os.environ.get("OPENWIT_DATA", "")) / "photos" / "photos-200.tar"
    if not source.is_file():
        raise MissingInput("the benchmark needs photos/photos-200.tar in $OPENWIT_DATA")
    folder.mkdir()
    number = 0
    with tarfile.open(source) as tar:
        for member in tar:
            if (stream := tar.extractfile(member)) is not None:
                (folder / f"{number}.jpg").write_bytes(stream.read())
                number += 1
    return number


def _certify(folder: Path, authorities: Path) -> None:
    """`site.pem` for every host of the domain, by an authority that joins the machine's own."""
    names = folder / "names"
    names.write_text(f"subjectAltName=DNS:*.{DOMAIN}\n")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"]
    _openssl(folder, "req", "-x509", *new, "-subj", "/CN=benchmark", *_keys("own", "-out"))
    _openssl(folder, "req", *new, "-subj", f"/CN={DOMAIN}", *_keys("site", "-out", ".csr"))
    signed = ["-req", "-in", "site.csr", "-CA", "own.pem", "-CAkey", "own.key", "-CAcreateserial"]
    _openssl(folder, "x509", *signed, "-days", "30", "-extfile", "names", "-out", "site.pem")
    known = ssl.get_default_verify_paths().cafile
    roots = Path(known).read_text() if known else ""
    authorities.write_text(roots + (folder / "own.pem").read_text())


def _keys(name: str, out: str, suffix: str = ".pem") -> list[str]:
    return ["-keyout", f"{name}.key", out, f"{name}{suffix}"]


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _await(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(100):
        assert process.poll() is None, "nginx did not start"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError("nginx does not answer")
