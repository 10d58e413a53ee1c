"""What img2dataset writes is trained on as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.conftest import TINY_MODEL, picture

IMG2DATASET = """
import os, sys
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
from img2dataset import download
if __name__ == "__main__":
    download(url_list=sys.argv[1], input_format="csv", url_col="url", caption_col="caption",
             output_folder=sys.argv[2], output_format="webdataset", processes_count=1,
             thread_count=4, image_size=64, number_sample_per_shard=16, enable_wandb=False)
"""


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """What img2dataset makes of forty pictures on a server, three of which are missing."""
    import http.server
    import threading
    from functools import partial

    site = tmp_path / "site"
    site.mkdir()
    rows = ["url,caption"]

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        for number in range(40):
            image, text = picture(number, 90, 70)
            if number % 15 != 4:
                (site / f"{number}.jpg").write_bytes(image)
            rows.append(f"http://127.0.0.1:{server.server_port}/{number}.jpg,{text}")
        (tmp_path / "urls.csv").write_text("\n".join(rows))
        script = tmp_path / "img2dataset_script.py"
        script.write_text(IMG2DATASET)
        out = tmp_path / "downloaded"
        command = [sys.executable, str(script), str(tmp_path / "urls.csv"), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_img2datasets_own_output_is_trained_on_by_the_command_line(
    downloaded: Path, tmp_path: Path
) -> None:
    assert len(list(downloaded.glob("*.tar"))) == 3
    root = Path(__file__).parents[3]
    tiny = [f"train.model.{key}={value}" for key, value in TINY_MODEL.items()]
    command = [sys.executable, "-m", "pipeline", "train", "configs/webdataset.yaml"]
    command += ["--run", str(tmp_path / "run"), "train.preset=cpu", *tiny]
    command += ["train.samples=64", "train.batch=8"]
    command += ["train.data.lanes=4", "train.data.margin=4", "train.threads=1"]
    command += ["train.log_every_steps=4", "train.data.checksums=true"]
    environment = os.environ | {"OPENWIT_TARS": str(downloaded), "OMP_NUM_THREADS": "1"}
    for said in ("37 samples in 3 shards", "nothing to run"):
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        logs = "".join(p.read_text() for p in (tmp_path / "run/train/logs").iterdir())
        assert said in done.stderr + logs
    assert (tmp_path / "run/train/out/model.safetensors").exists()
    rows = (tmp_path / "run/train/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [4, 8]
    assert json.loads(rows[-1])["epoch"] == pytest.approx(64 / 37, rel=1e-4)
