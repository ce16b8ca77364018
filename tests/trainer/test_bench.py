"""Parts of the benchmarks that can go wrong without anybody seeing it in their figures."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
from attune_trainer.training.settings import TrainingUtterance

from bench.weight_change import time_change
from tests.trainer.tiny_whisper import build_tiny_whisper


def test_the_time_of_a_weight_change_begins_before_the_change_is_sent() -> None:
    answering = ["one"]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(answering[0].encode())

        def log_message(self, *_: object) -> None:
            pass

    def change() -> None:
        answering[0] = "two"
        threading.Event().wait(0.3)  # the split is new long before whoever changed it is told so

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            seconds, failures = time_change(change, server.server_port, "two")
        finally:
            server.shutdown()
    assert 0.3 <= seconds < 5
    assert failures == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_usual_recipe_trains_in_the_precision_that_attune_takes_on_this_machine(
    tmp_path: Path, precision: str
) -> None:
    base = build_tiny_whisper(tmp_path / "base", window_seconds=30)
    noise = (np.random.default_rng(1).standard_normal(16000) * 0.1).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", noise, 16000, subtype="PCM_16")
    train = [TrainingUtterance(audio=tmp_path / "noise.wav", text="go on", seconds=1.0)] * 4
    (tmp_path / "train.json").write_text(json.dumps([one.model_dump(mode="json") for one in train]))
    # A processor that computes in bf16, or one that does not, whichever this is.
    script = (
        "import sys, torch\n"
        f"torch.cpu.get_capabilities = lambda: {{'avx512_bf16': {precision == 'bf16'}}}\n"
        "torch.cuda.is_available = lambda: False\n"
        "from bench import finetune_speed\n"
        "kinds = set()\n"
        "torch.nn.modules.module.register_module_forward_hook(\n"
        "    lambda module, _, out: kinds.add(out.dtype) if type(module) is torch.nn.Linear else None\n"
        ")\n"
        "finetune_speed.main()\n"
        "print(*kinds)\n"
    )
    arguments = ["--usual", f"--base={base}", f"--folder={tmp_path}", "--epochs=1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "usual.json").read_text())["precision"] == precision
    assert done.stdout.splitlines()[-1] == {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[precision]
