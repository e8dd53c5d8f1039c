"""What version 0.1.0 left on disk means the same now: its stopped runs go on to its ends, its files are read alike."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from retune.training.__main__ import main
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.common.foreign import read_tensors
from retune.training.data.images import load_image
from retune.training.demo.files import weights_path
from retune.training.formats.embedding import read_embedding
from retune.training.formats.lora import read_lora
from retune.training.formats.lora_difference import LINEAR_KINDS, delta_weight
from retune.training.models.clip import ClipTextEncoder
from retune.training.models.protocols import Conditioning
from retune.training.objectives.denoising import DenoisingObjective
from retune.training.rewards import load
from retune.training.text_encoder.file import read_text_encoder
from retune.training.text_encoder.stock_file import read_stock_file
from retune.training.text_encoder.t5 import load_t5

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "version_0_1"
FILES = FIXTURES / "files"
RUNS = sorted(path.name for path in (FIXTURES / "runs").iterdir())
PROMPT = "a red circle on the left"
INEXACT = ("reward", "lora")
"""Runs whose last digits differ by now: prompts that train are encoded in a batch, and a LoRA's output is added to that
of its layer in one product."""
DROPPED = "lora"
"""The run whose text encoder trains with dropout: in a batch its masks are others."""


def same_arithmetic() -> bool:
    """Whether sums come out here as they did where the files were made, to the last bit."""
    made = json.loads((FIXTURES / "runs" / "train" / "stopped" / "config.json").read_bytes())["environment"]
    here = (torch.__version__, torch.get_num_threads(), torch.backends.cpu.get_cpu_capability())
    return here == (made["torch"], made["threads"], (FIXTURES / "cpu.txt").read_text().strip())


def check_tensors(found, expected, exact=True):
    """The same names and values: all bits of them where the arithmetic is the same and they are `exact`.

    A key's bias moves by what rounding leaves of its gradient: attention is the same whatever it is.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if exact and same_arithmetic():
            assert torch.equal(found[name], value), name
        else:
            atol = 1e-4 if name.endswith("k_proj.bias") else 1e-6
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def near(one, other) -> bool:
    """Whether two JSON values are the same, their numbers nearly."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(near, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)
    return one == other


def contains(one, other) -> bool:
    """Whether a JSON object has all entries of another one, and perhaps more, such as settings that are new."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(key in one and contains(one[key], value) for key, value in other.items())
    return one == other


def expected_of(file):
    """What version 0.1.0 read from a file, by the names that it gave the tensors."""
    tensors, _ = read_tensors(FILES / "expected.safetensors", f"{file}|")
    return {name.removeprefix(f"{file}|"): value for name, value in tensors.items()}


def one_by_one(objective, samples, step, indices):
    """The captions' conditioning as version 0.1.0 encoded it."""
    captions = [objective._drop_caption(s.caption, step, i) for i, s in zip(indices, samples, strict=True)]
    return Conditioning.cat(map(objective.text_of, captions))


@pytest.mark.parametrize("kind", RUNS)
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, kind, monkeypatch):
    exact = kind not in INEXACT
    rewards = {path.name: path for path in (FIXTURES / "demo").iterdir()}  # the demo's, which are others now
    monkeypatch.setattr(load, "weights_path", lambda name: rewards.get(name) or weights_path(name))
    if kind == DROPPED:
        monkeypatch.setattr(DenoisingObjective, "_texts", one_by_one)
    folder, run = FIXTURES / "runs" / kind, tmp_path / "r"
    shutil.copytree(folder / "stopped", run)
    words = json.loads((folder / "arguments.json").read_bytes())
    assert main([word.replace("{here}", str(FIXTURES)).replace("{output}", str(tmp_path)) for word in words]) == 0
    expected = folder / "expected"
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_bytes().splitlines()] for f in (run, expected)]
    assert rows[0] == rows[1] if exact and same_arithmetic() else near(*rows)
    results = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert results == sorted(
        path.relative_to(run) for path in run.rglob("*.safetensors") if path.parent != run / "state"
    )
    for name in results:
        (found, said), (tensors, known) = read_tensors(run / name), read_tensors(expected / name)
        check_tensors(found, tensors, exact)
        assert known.keys() <= said.keys()
        if "retune.run" in known:
            assert contains(json.loads(said["retune.run"]), json.loads(known["retune.run"]))
    for picture in (expected / "samples").iterdir():
        shown, wanted = (load_image(path) for path in (run / "samples" / picture.name, picture))
        torch.testing.assert_close(shown, wanted, rtol=0, atol=0 if exact and same_arithmetic() else 1.5 / 255)
    assert json.loads((run / "status.json").read_bytes())["state"] == "finished"


def test_a_t5s_projection():
    saved = read_text_encoder(FILES / "t5_projection.safetensors")
    encoder = load_t5(saved.find_t5([FIXTURES]), saved.projection, padding=saved.padding)
    saved.check_tokenizer(encoder.tokenizer.fingerprint)
    conditioning = encoder.encode(encoder.tokenize([PROMPT]))
    found = {**saved.projection.state_dict(), "context": conditioning.context, "pooled": conditioning.pooled}
    check_tensors(found, {k: v for k, v in expected_of("t5_projection").items() if not k.startswith("comfyui")})
    assert (saved.target_std, saved.padding.max_tokens, saved.padding.pad) == (0.2, 64, "max_tokens")
    assert (saved.dtype, saved.keeps_clip) == ("fp32", False)


def test_a_clip_of_the_stock_layout():
    state, about = read_stock_file(FILES / "clip_l.safetensors")
    model = build_model(ModelConfig(model=str(FIXTURES / "model.safetensors"), tokenizer=FIXTURES / "tokenizer"))
    clip = ClipTextEncoder.from_state(state, model.text_encoder.network.config.to_dict(), FIXTURES / "tokenizer")
    check_tensors({**state, "context": clip.encode(clip.tokenize([PROMPT])).context}, expected_of("clip_l"))
    assert about["run"] == "r" and [reward["reward"] for reward in about["rewards"]] == ["demo aesthetic", "demo CLIP"]


@pytest.mark.parametrize("file", ["lora_kohya", "lora_diffusers", "lora_kinds"])
def test_a_lora(file):
    found = {}
    for module in read_lora(FILES / f"{file}.safetensors").modules.values():
        found |= {f"{module.name}|{role}": value for role, value in module.tensors.items()}
        if module.kind in LINEAR_KINDS:
            found[f"{module.name}|difference"] = delta_weight(module)
    check_tensors(found, expected_of(file))


@pytest.mark.parametrize("file", sorted(path.name for path in (FILES / "embeddings").iterdir()))
def test_an_embedding(file):
    read = read_embedding(FILES / "embeddings" / file)
    found = {f"{read.layout}|{read.token}|{read.step}|{encoder}": vectors for encoder, vectors in read.parts}
    check_tensors(found, expected_of(file))
