"""Finds ComfyUI for the tests that need it, keeps its checkout clean, and says once why they were skipped."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

# One thread per test process: results are repeatable, and parallel runs do not wait on each other's OpenMP barriers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = tuple(ROOT / "tests" / name for name in ("nodes", "browser"))  # every test in them needs ComfyUI

# The order of files under two workers: those that take minutes first, so that both workers end at the same time.
LONG_FILES = (
    "tests/browser/test_examples.py",
    "tests/nodes/test_real_size.py",
    "tests/nodes/test_real_layout.py",
    "tests/core/test_t5_sizes.py",
    "tests/nodes/test_t5_folders.py",
    "tests/nodes/test_cancel.py",
    "tests/fuzz/test_fuzz.py",
    "tests/nodes/test_headless.py",
    "tests/core/test_study.py",
    "tests/nodes/test_workflow.py",
    "tests/core/test_demo_weights.py",
    "tests/core/test_demo_style_lora.py",
    "tests/core/test_demo_embedding.py",
    "tests/browser/test_run_view.py",
)
# Files whose tests need gigabytes, one up to 13: one worker runs them all, never two at the same time.
LARGE_FILES = LONG_FILES[1:5]

comfyui_path: Path | None = None
base_directory: Path | None = None
skip_reason = ""


def load_run_py():
    """run.py as a module: it is a script beside the package, so it has no import name of its own."""
    spec = importlib.util.spec_from_file_location("retune_run_py", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing_requirements(requirements: Path) -> list[str]:
    """Names in ComfyUI's requirements.txt, up to its non-essential ones, that this interpreter lacks."""
    essential = requirements.read_text(encoding="utf-8").split("#non essential")[0]
    names = [match[0] for line in essential.splitlines() if (match := re.match(r"[\w.-]+", line))]
    installed = {re.sub(r"[-_.]+", "-", d.name).lower() for d in importlib.metadata.distributions() if d.name}
    return [name for name in names if re.sub(r"[-_.]+", "-", name).lower() not in installed]


def why_no_comfyui() -> str:
    """Empty when ComfyUI can be imported, else the reason it cannot. Sets `comfyui_path`."""
    global comfyui_path
    try:
        found = load_run_py().find_comfyui()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    if found is None:
        return "no ComfyUI found; install it with `comfy install` or set COMFYUI_PATH"
    missing = missing_requirements(found / "requirements.txt")
    if missing:
        names = ", ".join(missing)
        return f"this Python lacks {names}, which {found} requires; `python run.py test` installs them"
    comfyui_path = found
    return ""


def pytest_configure(config):
    global skip_reason, base_directory
    skip_reason = why_no_comfyui()
    if skip_reason:
        return
    base_directory = Path(tempfile.mkdtemp(prefix="retune-comfyui-"))
    for name in ("input", "output", "temp", "user", "custom_nodes", "models"):
        (base_directory / name).mkdir()
    sys.path.insert(0, str(comfyui_path))  # first: our own nodes/ would shadow ComfyUI's nodes.py
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(base_directory)


def pytest_unconfigure(config):
    if base_directory is not None:
        shutil.rmtree(base_directory, ignore_errors=True)


@pytest.fixture(scope="session")
def comfyui_server(tmp_path_factory):
    """A running ComfyUI (a `comfyui_server.Server`) with this package in it, shared by all tests."""
    if skip_reason:
        pytest.skip(skip_reason)
    from retune.training.commands.comfyui_server import server

    with server(comfyui_path, tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI checkout, importable; its input, output, models and user folders are temporary ones."""
    if skip_reason:
        pytest.skip(skip_reason)
    import folder_paths
    import torch

    torch.set_num_threads(1)
    for name in ("checkpoints", "clip", "vae", "diffusion_models", "loras"):  # as ComfyUI's main.py does
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.get_output_directory(), name))
    return comfyui_path


@pytest.fixture(scope="session")
def write_t5_folder():
    """`write(folder, ...)`: a small T5 encoder of random weights and its tokenizer, as Hugging Face lays them out."""
    return _write_t5_folder


def _write_t5_folder(folder: Path, *, umt5: bool = False, shard_size: str = "1GB", **changes) -> Path:
    """Two layers, 128 ids; changes: other fields of T5Config."""
    import torch
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2}
    config |= {"feed_forward_proj": "gated-gelu"} | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UMT5EncoderModel(UMT5Config(**config)) if umt5 else T5EncoderModel(T5Config(**config))
    model.save_pretrained(folder, max_shard_size=shard_size)
    _write_t5_tokenizer(folder / "tokenizer.json")
    return folder


def _write_t5_tokenizer(path: Path) -> None:
    """A Unigram tokenizer of 120 letters and words with T5's special tokens. Training one gives other ids each time."""
    from retune.training.text_encoder.prompts import PROMPTS
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]
    letters = sorted({letter for prompt in PROMPTS for letter in prompt} - {" "} | {"\u2581"})
    counts = Counter("\u2581" + word for prompt in PROMPTS for word in prompt.split())
    words = sorted(counts, key=lambda word: (-counts[word], word))[: 120 - len(special) - len(letters)]
    vocabulary = [(piece, 0.0) for piece in special] + [(piece, -9.0) for piece in letters]
    vocabulary += [(word, math.log(counts[word] / counts.total())) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))


@pytest.fixture(scope="session")
def cheap_noise():
    """`draw(shape, seed)`: standard normal numbers, a million of them again and again: a real size takes minutes."""
    import torch

    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))

    def draw(shape, seed: int = 0):
        start, count = 7919 * seed % len(noise), math.prod(shape)
        return noise.repeat(1 + (start + count) // len(noise))[start : start + count].view(shape)

    return draw


@pytest.fixture(scope="session")
def cheap_weights(cheap_noise):
    """`make(shapes)`: fp16 weights by name, of a usual size; norms are one, biases zero."""
    import torch

    def make(shapes):
        state = {}
        for seed, (name, shape) in enumerate(shapes.items()):
            if len(shape) > 1:
                state[name] = (cheap_noise(shape, seed) * (0.7 * math.prod(shape[1:]) ** -0.5)).half()
            else:
                state[name] = torch.full(shape, float(name.endswith("weight"))).half()
        return state

    return make


@pytest.fixture(scope="session")
def comfy_cli(tmp_path_factory):
    """`comfy_cli(*arguments, cwd=None)`: what `comfy` did, as subprocess.run gives it; with a home of its own."""
    beside = Path(sys.executable).with_name("comfy.exe" if sys.platform == "win32" else "comfy")
    found = str(beside) if beside.exists() else shutil.which("comfy")
    if found is None:
        pytest.skip("comfy-cli is not installed: pip install comfy-cli")
    home = str(tmp_path_factory.mktemp("home"))
    about = {"env": os.environ | {"HOME": home, "LOCALAPPDATA": home}, "capture_output": True, "text": True}
    command = [found, "--skip-prompt", "--no-enable-telemetry"]
    return lambda *arguments, cwd=None: subprocess.run([*command, *arguments], cwd=cwd, timeout=1800, **about)


class SkippedTest(pytest.Item):
    """Stands for a test whose file cannot be imported without ComfyUI."""

    def runtest(self):
        pytest.skip(skip_reason)

    def reportinfo(self):
        return self.path, 0, self.name


class SkippedFile(pytest.File):
    def collect(self):
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        names = (node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        return [SkippedTest.from_parent(self, name=name) for name in names if name.startswith("test_")]


def pytest_pycollect_makemodule(module_path, parent):
    if skip_reason and any(folder in module_path.parents for folder in FOLDERS):
        return SkippedFile.from_parent(parent, path=module_path)
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: place(item.nodeid))
    for item in items:
        uses_fixture = {"comfyui", "comfyui_server"} & set(getattr(item, "fixturenames", ()))
        if uses_fixture or any(folder in item.path.parents for folder in FOLDERS):
            item.add_marker(pytest.mark.comfyui)
        if skip_reason and item.get_closest_marker("comfyui"):
            item.add_marker(pytest.mark.skip(reason=skip_reason))


def place(nodeid: str) -> int:
    """A test's place in the order of `LONG_FILES`; all other files come after these, as pytest collected them."""
    file = nodeid.split("::")[0]
    return LONG_FILES.index(file) if file in LONG_FILES else len(LONG_FILES)


def unit(nodeid: str) -> str:
    """What one worker runs without a break: a test's file, or all of `LARGE_FILES`."""
    file = nodeid.split("::")[0]
    return "large models" if file in LARGE_FILES else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """pytest-xdist's scheduler of whole files, in the order of collection; for `-n` without `--dist`."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return unit(nodeid)

    config.option.loadscopereorder = False
    return Files(config, log) if config.getvalue("dist") == "load" else None


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "comfyui" in report.keywords]
    if skip_reason and skipped:
        terminalreporter.write_line(f"{len(skipped)} ComfyUI tests skipped: {skip_reason}")


@pytest.fixture(scope="session")
def sd15_unet():
    """A UNet of SD1.5's layout (context 768) at a tenth of its width, random weights."""
    import torch
    from diffusers import UNet2DConditionModel

    config = {
        "block_out_channels": (32, 64, 128, 128),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**config).eval()


@pytest.fixture(scope="session")
def sdxl_unet():
    """A UNet of SDXL's layout (context 2048, pooled text and sizes 2816) at a tenth of its width, random weights."""
    import torch
    from diffusers import UNet2DConditionModel

    config = {
        "block_out_channels": (32, 64, 128),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 2048,
        "attention_head_dim": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**config).eval()


@pytest.fixture(autouse=True)
def shared_peaks(request, monkeypatch, tmp_path_factory):
    """All runs of a test process keep the peaks of their steps in one place: alike ones are computed once."""
    if "retune.training" not in sys.modules or request.node.get_closest_marker("own_peaks"):
        return
    from retune.training.loop.known_peaks import KnownPeaks

    folder, original = tmp_path_factory.getbasetemp() / "peaks", KnownPeaks.__init__
    monkeypatch.setattr(KnownPeaks, "__init__", lambda self, _, key: original(self, folder, key))
    monkeypatch.setattr("retune.training.loop.known_peaks.KEPT", 10**4)


@pytest.fixture(scope="session")
def lora_kinds():
    """tests/lora_kinds.py: random layers of every algorithm, with the weights that come of them."""
    return load_beside("lora_kinds")


def load_beside(name: str):
    """A module of this folder; the tests' folders are no packages."""
    spec = importlib.util.spec_from_file_location(f"retune_{name}", ROOT / "tests" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def live_bytes():
    """tests/live_bytes.py: a mode that counts the bytes of tensors which operations make inside of it."""
    return load_beside("live_bytes").LiveBytes


@pytest.fixture
def device():
    """tests/simulated_device.py, entered: a device that is not there, with what it counts."""
    module = load_beside("simulated_device")
    with module.simulated_device() as mode:
        yield mode
