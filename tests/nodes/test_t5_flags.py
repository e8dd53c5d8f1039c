"""ComfyUI's memory flags, each set in a process of its own, do not change a bit of what T5 CLIPs encode.

--lowvram and --novram cannot stand beside --cpu, and on a CPU ComfyUI puts them (and dynamic VRAM) aside; what they do
on a GPU, leaving weights behind, is therefore forced in those processes too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.comfyui

SCRIPT = Path(__file__).with_name("encode_with_flags.py")
FLAGS = {
    "lowvram": ["--lowvram"],
    "novram": ["--novram"],
    "all that a CPU takes": (
        "--cpu --cpu-vae --disable-smart-memory --disable-dynamic-vram --disable-async-offload "
        "--disable-pinned-memory --disable-mmap --reserve-vram 8 --fast"
    ).split(),
}


def encoded(comfyui, folder, flags):
    """What the script found, in an empty folder: this repository's nodes/ would stand before ComfyUI's nodes.py."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(comfyui), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain(comfyui, tmp_path_factory):
    return encoded(comfyui, tmp_path_factory.mktemp("plain"), ["--cpu"])


@pytest.mark.slow
def test_weights_left_behind_change_no_bit(plain):
    digests = plain["digests"]
    clips = {name.split(",")[0] for name in digests}
    assert len(clips) == 5 and len(digests) == 4 * len(clips)
    assert len({digests[f"{clip}, loaded"] for clip in clips}) == 4  # the demo's file is in half precision itself
    for name, digest in digests.items():
        assert digest == digests[f"{name.split(',')[0]}, loaded"], name


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLAGS)
def test_flags_change_no_bit(comfyui, plain, tmp_path, kind):
    found = encoded(comfyui, tmp_path, FLAGS[kind])
    assert found["digests"] == plain["digests"]
    assert plain["flags"] == {"state": "DISABLED", "smart memory": True}
    assert found["flags"] == {"state": "DISABLED", "smart memory": "--disable-smart-memory" not in FLAGS[kind]}


@pytest.mark.parametrize("flag", ["--lowvram", "--novram", "--highvram", "--gpu-only"])
def test_comfyui_refuses_flags_for_a_gpu_beside_cpu(comfyui, flag, capsys):
    from comfy.cli_args import parser

    with pytest.raises(SystemExit):
        parser.parse_args(["--cpu", flag])
    assert f"argument {flag}: not allowed with argument --cpu" in capsys.readouterr().err


def test_dynamic_vram_leaves_a_cpu_alone(comfyui, monkeypatch):
    import comfy.model_patcher
    from retune.nodes.clips.t5_clip import load_t5_clip
    from retune.training.text_encoder.projection import Projection

    def encode():
        clip = load_t5_clip("demo", Projection(96, 128))
        assert not clip.patcher.is_dynamic()
        with torch.inference_mode():
            return clip.encode_from_tokens(clip.tokenize("two small blue squares")).clone()

    plain = encode()
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    assert torch.equal(encode(), plain)
