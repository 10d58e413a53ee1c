"""What we stand on in img2dataset and pycurl: an upgrade that moves it fails here, by its name."""

from __future__ import annotations

import inspect
import io
import re
import socket
from importlib.metadata import version
from pathlib import Path
from types import CodeType
from typing import Any

import pyarrow as pa
import pycurl
import pytest
from PIL import Image

from dataset_build.download import connection
from tests.dataset_build.download.conftest import picture


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def table(tmp_path: Path, urls: list[str]) -> str:
    source = str(tmp_path / "rows.feather")
    rows = pa.table({"row": pa.array(range(len(urls)), pa.int64()), "url": urls})
    with pa.OSFile(source, "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)
    return source


OPTIONS: dict[str, Any] = {
    "thread_count": 2,
    "save_caption": True,
    "extract_exif": False,
    "column_list": ["row", "url"],
    "timeout": 1,
    "number_sample_per_shard": 10,
    "oom_shard_count": 5,
    "compute_hash": None,
    "verify_hash_type": None,
    "encode_format": "jpg",
    "retries": 0,
    "user_agent_token": None,
    "disallowed_header_directives": None,
}


def test_the_pinned_version_is_installed() -> None:
    assert version("img2dataset") == "1.47.0"


def test_the_downloaders_names_and_signatures(staging: Any) -> None:
    module = staging.img2dataset.downloader
    assert parameters(module.download_image_with_retry) == [
        *("row", "timeout", "retries"),
        *("user_agent_token", "disallowed_header_directives"),
    ]
    downloader = module.Downloader
    assert set(parameters(downloader.__init__)) == {
        *("self", "sample_writer_class", "resizer", "output_folder", "blurring_bbox_col"),
        *OPTIONS,
    }
    assert parameters(downloader.download_shard) == ["self", "row"]
    # Its name is looked up as a global of its module, from the shard function's own code.
    codes = [downloader.download_shard.__code__]
    for code in codes:
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    assert any("download_image_with_retry" in code.co_names for code in codes)
    assert downloader.download_shard.__globals__ is vars(module)


def test_the_transport_is_exchanged_and_nothing_else_is_asked(
    staging: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole shard with a made-up transport: the writer's protocol as it is really used."""
    calls: list[Any] = []

    class Writer:
        def __init__(self, *arguments: Any) -> None:
            calls.append(("made", *arguments))

        def write(self, *arguments: Any) -> None:
            calls.append(("write", *arguments))

        def close(self) -> None:
            calls.append(("close",))

    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("asked"))
    own = staging.img2dataset.downloader.download_image_with_retry
    bodies = {0: io.BytesIO(picture()), 1: None, 2: io.BytesIO(b"no picture at all")}
    downloader = staging.GuardedDownloader(
        lambda pair: (pair[0], bodies[pair[0]], None if bodies[pair[0]] else "dead_link"),
        sample_writer_class=Writer,
        resizer=staging.EightBitResizer(32, "keep_ratio", True),
        output_folder=str(tmp_path),
        **OPTIONS,
    )
    source = table(tmp_path, ["http://a.example/0", "http://a.example/1", "http://a.example/2"])
    downloader.download_shard((0, source))
    assert staging.img2dataset.downloader.download_image_with_retry is own
    made, *writes, closed = calls
    assert made[:5] == ("made", 0, str(tmp_path), True, 5)
    assert (type(made[5]), made[6:], closed) == (pa.Schema, ("jpg",), ("close",))
    by_row = {write[4]["row"]: write[1:] for write in writes}
    assert [len(write) for write in by_row.values()] == [4] * 3  # picture, key, caption, meta
    stored, key, caption, meta = by_row[0]
    assert Image.open(io.BytesIO(stored)).size == (43, 32)
    assert (key, caption) == ("000000", None)
    sizes = ("width", "height", "original_width", "original_height")
    assert [meta[name] for name in sizes] == [43, 32, 64, 48]
    assert (meta["status"], meta["url"]) == ("success", "http://a.example/0")
    assert by_row[1][0] is by_row[2][0] is None
    assert by_row[1][3]["error_message"] == "dead_link"
    assert by_row[2][3]["status"] == "failed_to_resize"
    assert (tmp_path / "00000_stats.json").exists()
    assert not Path(source).exists()


def test_the_resizers_arguments_and_answers(staging: Any) -> None:
    assert {
        *("image_size", "resize_mode", "resize_only_if_bigger", "encode_quality"),
        *("min_image_size", "max_image_area", "max_aspect_ratio", "blurrer"),
    } <= set(parameters(staging.Resizer.__init__))
    assert parameters(staging.Resizer.__call__) == ["self", "img_stream", "blurring_bbox_list"]
    # Its code runs with others of these.
    ours = {"A", "cv2", "SuppressStdoutStderr"}
    assert ours <= set(staging.Resizer.__call__.__code__.co_names)
    assert ours <= vars(staging.img2dataset.resizer).keys()
    limits = {"min_image_size": 16, "max_image_area": 4000, "max_aspect_ratio": 2}
    resizer = staging.Resizer(32, "keep_ratio", True, **limits)
    answers = {
        (64, 48): None,
        (64, 8): "image too small",
        (80, 60): "image area too large",
        (90, 30): "aspect ratio too large",
    }
    for (width, height), error in answers.items():
        answer = resizer(io.BytesIO(picture(0, width, height)))
        assert answer[5] == error
        assert len(answer) == 6
    data, *sizes, _ = resizer(io.BytesIO(picture()))
    assert sizes == [43, 32, 64, 48]
    assert data.startswith(b"\xff\xd8\xff")
    from img2dataset.resizer import ResizeMode

    from dataset_build.download import DownloadSettings

    choices = DownloadSettings.model_fields["resize_mode"].annotation.__args__  # type: ignore[union-attr]
    assert set(choices) == set(ResizeMode.__members__)


def curl_names() -> list[str]:
    """What the package takes from pycurl that is a number."""
    folder = Path(connection.__file__).parent
    sources = "".join(path.read_text() for path in sorted(folder.glob("*.py")))
    return sorted(set(re.findall(r"\bpycurl\.([A-Z][A-Z0-9_]+)", sources)))


@pytest.mark.parametrize("name", curl_names())
def test_pycurl_has_what_we_set(name: str) -> None:
    assert isinstance(getattr(pycurl, name), int)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_libcurl_asks_before_each_socket_and_takes_no_for_an_answer(host: str) -> None:
    """The whole guard hangs on this callback: when it comes, what it is given, what it may say."""
    from tests.dataset_build.download.conftest import HostileWeb

    server = HostileWeb(host)
    asked: list[tuple[Any, ...]] = []

    def refuse(*arguments: Any) -> int:
        asked.append(arguments)
        return int(pycurl.SOCKET_BAD)

    curl = pycurl.Curl()
    curl.setopt(pycurl.OPENSOCKETFUNCTION, refuse)
    curl.setopt(pycurl.PROXY, "")
    curl.setopt(pycurl.URL, f"http://{f'[{host}]' if ':' in host else host}:{server.port}/ok.jpg")
    with pytest.raises(pycurl.error) as failed:
        curl.perform()
    curl.close()
    server.close()
    assert failed.value.args[0] == pycurl.E_COULDNT_CONNECT
    ((purpose, (family, kind, protocol, target)),) = asked
    assert purpose == pycurl.SOCKTYPE_IPCXN
    assert family == (socket.AF_INET6 if ":" in host else socket.AF_INET)
    assert (kind & ~socket.SOCK_CLOEXEC, protocol) == (socket.SOCK_STREAM, socket.IPPROTO_TCP)
    number = target[0].decode() if isinstance(target[0], bytes) else target[0]
    assert (number, target[1]) == (host, server.port)
    assert server.connections == 0


def test_libcurl_speaks_https() -> None:
    assert {"http", "https"} <= set(pycurl.version_info()[8])
