from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataset_build.download import DownloadSettings, guard
from tests.dataset_build.download.vectors import PRIVATE_HOSTS, SCHEMES

ROOT = Path(__file__).parents[3]


def datagram(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.1", port))


def by_name(port: int) -> None:
    with socket.socket() as client:
        client.connect(("localhost", port))


def local_socket(port: int) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("/run/anything")


TRIED: dict[str, Callable[[int], object]] = {
    "a socket": lambda port: socket.create_connection(("127.0.0.1", port)),
    "a name": by_name,
    "a datagram": datagram,
    "a local socket": local_socket,
    "a file by urllib": lambda port: urllib.request.urlopen("file:///etc/hostname"),
    "data by urllib": lambda port: urllib.request.urlopen("data:,x"),
    "ftp by urllib": lambda port: urllib.request.urlopen(f"ftp://127.0.0.1:{port}/x"),
    "loopback by urllib": lambda port: urllib.request.urlopen(f"http://127.0.0.1:{port}/ok.jpg"),
    "a program": lambda port: subprocess.run(["true"], check=True),
    "a shell": lambda port: os.system("true"),
    "a spawn": lambda port: os.posix_spawn("/bin/true", ["true"], {}),
    "a fork": lambda port: os.fork() or os._exit(1),
    "a pickle": lambda port: pickle.loads(b"cposix\nsystem\n."),
    "a file": lambda port: Path("written.txt").write_text("x"),
    "a descriptor": lambda port: os.open("written.txt", os.O_CREAT | os.O_WRONLY),
    "a server": lambda port: socket.create_server(("127.0.0.1", 0)),
    "a removal": lambda port: Path("there.txt").unlink(),
    "a folder's removal": lambda port: Path("there").rmdir(),
    "a folder": lambda port: Path("written.txt").mkdir(),
    "a move away": lambda port: Path("there.txt").rename("run/there.txt"),
    "a move out": lambda port: Path("run/own.txt").rename("written.txt"),
    "a link to outside": lambda port: os.link("there.txt", "run/there.txt"),
    "a link outside": lambda port: os.link("run/own.txt", "written.txt"),
    "a symbolic link": lambda port: Path("written.txt").symlink_to("run"),
    "a cut": lambda port: os.truncate("there.txt", 0),
    "a mode": lambda port: Path("there.txt").chmod(0),
    "an owner": lambda port: os.chown("there.txt", os.getuid(), -1),
}


@pytest.mark.parametrize("what", TRIED)
def test_nothing_of_the_kind_happens_while_pictures_are_fetched(
    what: str, tmp_path: Path, canary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/own.txt").write_text("own")
    (tmp_path / "there").mkdir()
    (tmp_path / "there.txt").write_text("there")
    monkeypatch.chdir(tmp_path)
    with guard.watching(tmp_path / "run") as watch:
        with pytest.raises(Exception) as raised:
            TRIED[what](canary.port)
        cause: BaseException | None = raised.value
        while cause is not None and not isinstance(cause, guard.Forbidden):
            cause = cause.__cause__ or cause.__context__ or getattr(cause, "reason", None)
        assert isinstance(cause, guard.Forbidden)
        assert watch.refused
    assert canary.connections == 0
    assert not (tmp_path / "written.txt").exists()
    assert (tmp_path / "there").exists()
    assert (tmp_path / "there.txt").read_text() == "there"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["own.txt"]


def test_files_are_written_in_the_folder_and_nowhere_else(tmp_path: Path) -> None:
    inside, outside = tmp_path / "run", tmp_path / "run-of-another"
    inside.mkdir()
    outside.mkdir()
    (inside / "door").symlink_to(outside)
    with guard.watching(inside):
        for path in (inside / "door" / "x", inside / ".." / "x", outside / "x"):
            with pytest.raises(guard.Forbidden):
                path.open("w")
        (inside / "x").write_text("x")
        (inside / "new").mkdir()
        (inside / "x").replace(inside / "new" / "y")
        (inside / "new" / "y").unlink()
        with (inside / "x").open("w") as stream:
            stream.truncate(0)
        assert (ROOT / "README.md").read_text()  # reading is free
    assert not list(outside.iterdir())


def test_every_thread_is_watched_and_the_guard_sleeps_afterwards(
    tmp_path: Path, canary: Any
) -> None:
    seen: list[Exception] = []

    def connect() -> None:
        try:
            socket.create_connection(("127.0.0.1", canary.port)).close()
        except guard.Forbidden as error:
            seen.append(error)

    for _ in range(2):
        with guard.watching(tmp_path):
            thread = threading.Thread(target=connect)
            thread.start()
            thread.join()
    assert len(seen) == 2
    assert canary.connections == 0
    connect()
    assert len(seen) == 2
    until = time.monotonic() + 10
    while canary.connections == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert canary.connections == 1


def test_what_was_refused_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with guard.watching(tmp_path):
        for _ in range(23):
            with pytest.raises(guard.Forbidden):
                os.system("true")
    messages = [record.message for record in caplog.records]
    assert messages[0] == "refused: os.system"
    assert messages[-1] == "refused: 3 more"


def test_the_librarys_own_transport_is_held_as_well(
    tmp_path: Path, canary: Any, staging: Any
) -> None:
    """Were ours taken out by an upgrade, the second wall would stand alone."""
    fetch = staging.img2dataset.downloader.download_image
    urls = [f"http://{host}:{canary.port}/ok.jpg" for host in PRIVATE_HOSTS]
    urls += [scheme.format(port=canary.port, decoy="/etc/hostname") for scheme in SCHEMES]
    with guard.watching(tmp_path):
        for url in urls:
            _, stream, error = fetch((0, url), 1, None, None)
            assert stream is None, url
            assert error
    assert canary.connections == 0


def confined(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that is confined as a task's is."""
    before = (
        "from dataset_build.download import DownloadSettings, guard\nfrom pathlib import Path\n"
    )
    return subprocess.run(
        [sys.executable, "-c", before + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_memory_and_files_have_a_limit() -> None:
    done = confined(
        "import resource, tempfile\n"
        "before = resource.getrlimit(resource.RLIMIT_DATA)\n"
        "with guard.limited(256 << 20, 1 << 20):\n"
        "    block = bytearray(200 << 20)\n"
        "    try: bytearray(100 << 20)\n"
        "    except MemoryError: print('memory')\n"
        "    try: tempfile.TemporaryFile(buffering=0).write(bytes(1 << 20)); print('written')\n"
        "    except OSError: print('too early')\n"
        "    try: f = tempfile.TemporaryFile(); f.write(bytes((1 << 20) + 1)); f.flush()\n"
        "    except OSError as error: print(error.strerror)\n"
        "    print(resource.getrlimit(resource.RLIMIT_CORE)[0])\n"
        "print(len(bytearray(300 << 20)) >> 20, resource.getrlimit(resource.RLIMIT_DATA) == before)"
    )
    assert done.stdout.split("\n")[:3] == ["memory", "written", "File too large"], done
    assert done.stdout.split("\n")[3:5] == ["0", "300 True"]


def test_a_picture_without_end_ends_its_process() -> None:
    done = confined("with guard.cpu_limited(1):\n    while True: pass")
    assert done.returncode == -24  # SIGXCPU


def test_limits_leave_room_for_what_a_task_needs() -> None:
    """Threads, files in flight and the costliest picture, all at once."""
    done = confined(
        "import threading, numpy\n"
        "settings = DownloadSettings(threads=64)\n"
        "with guard.confined(settings, Path('.'), 10_000):\n"
        "    release = threading.Event()\n"
        "    threads = [threading.Thread(target=release.wait) for _ in range(64)]\n"
        "    [thread.start() for thread in threads]\n"
        "    held = [numpy.empty(settings.max_bytes, 'u1') for _ in range(4 * 64)]\n"
        "    picture = numpy.empty(1 << 30, 'u1')\n"
        "    release.set()\n"
        "    try: numpy.empty(4 << 30, 'u1')\n"
        "    except MemoryError: print('held')"
    )
    assert done.stdout == "held\n", done


def test_connections_have_room_for_their_files() -> None:
    limit = "resource.getrlimit(resource.RLIMIT_NOFILE)"
    confine = "guard.confined(DownloadSettings(threads={}), Path('.'), 10_000)"
    before = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (200, 1500))\n"
    done = confined(f"{before}with {confine.format(512)}: print({limit})\nprint({limit})")
    assert done.stdout == f"({2 * 512 + 256 + 128}, 1500)\n(200, 1500)\n", done
    done = confined(f"{before}with {confine.format(600)}: print({limit})")
    assert done.returncode == 1
    assert "download.threads needs up to 1584 open files, and a process here may have 1500" in (
        done.stderr
    )


def test_secrets_are_gone_from_the_environment_and_from_proc() -> None:
    secrets = {name: f"s3cr3t-{name}" for name in ("AWS_SESSION_TOKEN", "HF_TOKEN", "MY_API_KEY")}
    secrets |= {
        "WANDB_API_KEY": "s3cr3t",
        "https_proxy": "http://me:s3cr3t@proxy",
        "DB_PASSWORD": "s3cr3t",
    }
    done = confined(
        "import os\n"
        "shown = lambda: Path('/proc/self/environ').read_text()\n"
        "assert 's3cr3t' in shown()\n"
        "with guard.without_secrets():\n"
        "    print([n for n, v in os.environ.items() if 's3cr3t' in v], 's3cr3t' in shown(),\n"
        "          os.environ['KEPT'])\n"
        "print(os.environ['HF_TOKEN'])",
        KEPT="as it is",
        **secrets,
    )
    assert done.stdout == "[] False as it is\ns3cr3t-HF_TOKEN\n", done


def test_a_task_fetches_under_the_guard(tmp_path: Path) -> None:
    """`confined` is all of it at once."""
    settings = DownloadSettings()
    os.environ["TEST_SECRET"] = "x"
    try:
        with guard.confined(settings, tmp_path, 10), pytest.raises(guard.Forbidden):
            assert "TEST_SECRET" not in os.environ
            os.system("true")
        assert os.environ["TEST_SECRET"] == "x"
    finally:
        del os.environ["TEST_SECRET"]
