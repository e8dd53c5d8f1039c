"""report.html: one page that needs no other file and shows what it is given, escaped."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from retune.training.__main__ import main
from retune.training.common.files import write_json
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.lora import LoraConfig
from retune.training.config.reward import RewardTuneConfig
from retune.training.config.run import TrainModelConfig
from retune.training.config.sample_prompts import SamplePrompts
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.images import save_png
from retune.training.data.prompts import Prompt
from retune.training.recipes.lora import train_lora
from retune.training.recipes.reward import tune
from retune.training.recipes.textual_inversion import train_embedding
from retune.training.recipes.unet import train_model
from retune.training.rewards.combined import CombinedReward, Term
from retune.training.rewards.load import RewardConfig, load_reward
from retune.training.runs.folder import RunFolder
from retune.training.runs.report import MAX_SAMPLES, SIDE, data_url, write_report
from retune.training.runs.report_text import ending

NASTY = "<script>alert(\"x\")</script> & 'quotes'"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "a & b")
    folder.samples.mkdir(parents=True)
    for step in (0, 4):
        name = f"{step:06d}_00.png"
        save_png(torch.rand(3, 8, 8), folder.samples / name)
        folder.add_row({"event": "sample", "step": step, "epoch": step / 2, "files": [name], "prompts": [NASTY]})
    for step in range(1, 5):
        folder.add_row({"step": step, "loss": 1 / step})
    return folder


def test_page_is_self_contained_and_escaped(folder):
    picture = torch.rand(3, 4, 4)
    path = write_report(
        folder, {"Table <1>": [{"what": NASTY, "share": 0.123456, "n": 3}]}, {"Title": [(NASTY, picture)]}
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == folder.path / "report.html" and text.startswith("<!doctype html>")
    assert "script" not in page.tags and "http" not in text and "@import" not in text and "url(" not in text
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert len(page.links) == 1 + 1 + 2  # chart, picture, two samples
    assert page.words.count(NASTY) == 1 + 1 + 2 and "0.123" in page.words and "3" in page.words
    assert {"step 0, epoch 0", "step 4, epoch 2"} <= set(page.words)
    assert "a & b" in page.words and "Table <1>" in page.words


def test_sample_files_are_inside_byte_for_byte(folder):
    text = write_report(folder, {}).read_text(encoding="utf-8")
    inside = [base64.b64decode(data) for data in re.findall(r'base64,([^"]+)"', text)]
    assert [(folder.samples / f"{s:06d}_00.png").read_bytes() for s in (0, 4)] == inside[1:]


def test_a_picture_survives_its_data_url():
    import numpy as np
    from PIL import Image

    image = torch.randint(0, 256, (5, 7, 3), generator=torch.Generator().manual_seed(0)) / 255
    data = base64.b64decode(data_url(image.movedim(-1, 0)).removeprefix("data:image/png;base64,"))
    decoded = torch.from_numpy(np.array(Image.open(io.BytesIO(data))))
    assert torch.equal(decoded, (image * 255).round().byte())


def test_large_samples_are_made_smaller_and_only_so_many_moments_are_shown(tmp_path):
    from PIL import Image

    folder = RunFolder(tmp_path / "large")
    folder.samples.mkdir(parents=True)
    save_png(torch.rand(3, 600, 300), folder.samples / "x.png")
    for step in range(100):
        folder.add_row(
            {"event": "sample", "step": step, "epoch": 0.0, "files": ["x.png", "gone.png"], "prompts": ["a", "b"]}
        )
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    shown = [word for word in page.words if re.match(r"step \d+, epoch", word)]
    assert len(shown) == MAX_SAMPLES and shown[0] == "step 0, epoch 0" and shown[-1] == "step 99, epoch 0"
    small = [link for link in page.links if link.startswith("data:image/jpeg;base64,")]
    with Image.open(io.BytesIO(base64.b64decode(small[0].partition(",")[2]))) as image:
        assert image.size == (SIDE // 2, SIDE) and len(small) == MAX_SAMPLES  # those that are gone are left out


def test_every_kind_of_run_reports_itself_in_words(tiny_model, pictures, tmp_path):
    settings = TrainingSettings(warmup_steps=0, validation_fraction=0.3, validate_every=1, gradient_accumulation=2)
    samples = SamplePrompts(prompts=("a red circle",), every=1, steps=1, cfg=1.0, width=32, height=32)
    values = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "settings": settings, "samples": samples}
    train_model(tiny_model, pictures, TrainModelConfig(run_name="model", train="QK", **values), tmp_path)
    train_lora(tiny_model, pictures, LoraConfig(run_name="lora", rank=2, **values), tmp_path)
    word = EmbeddingConfig(run_name="embedding", token="<thing>", vectors=2, **values)
    train_embedding(tiny_model, pictures, word, tmp_path)
    reward = CombinedReward([Term(reward=load_reward(RewardConfig(kind="demo aesthetic")))])
    short = {"sampling_steps": 1, "gradient_steps": 1, "cfg": 1.0, "width": 32, "height": 32, "train": "UNet LoRA"}
    tune(
        tiny_model, reward, [Prompt("a"), Prompt("b")], RewardTuneConfig(run_name="reward", **short, **values), tmp_path
    )
    words = {
        "model": ["Layers of the UNet (QK) are retrained", "4 images a step (batches of 2, 2 summed up)"],
        "lora": ["A LoRA of rank 2 and alpha 16 learns on attention + feed-forward", "loss, smoothed"],
        "embedding": ["<thing> becomes a word of 2 vectors, starting at random", "nearest words"],
        "reward": ["UNet LoRA is tuned by rewards of pictures of 32x32", "1 of 1 sampler steps", "reward, smoothed"],
    }
    for kind, expected in words.items():
        text = (tmp_path / kind / "report.html").read_text(encoding="utf-8")
        page = Page(text)
        said = " ".join(page.words)
        assert "Finished after 2 steps." in said and "AdamW at a peak learning rate of 0.001" in said
        assert all(one in said for one in expected), (kind, said[:600])
        assert "script" not in page.tags and "http" not in text and len(page.links) == 1 + 3
        assert {"lr_schedule", "run_name", "torch"} <= set(page.words) and "Share of captions replaced" in said


def test_the_verb_writes_the_report_of_a_run_that_did_not_end(folder, capsys):
    (folder.path / "report.html").unlink(missing_ok=True)
    assert main(["report", str(folder.path)]) == 2 and "no config.json" in capsys.readouterr().err
    config = dataclasses.asdict(TrainModelConfig(run_name="r"))
    record = {"identity": {"kind": "model"}, "config": config, "environment": {"torch": "2"}}
    write_json(folder.path / "config.json", record)
    folder.set_status("failed", 4, message="memory ran out <here>.")
    assert main(["report", str(folder.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(folder.path / "report.html")
    page = Page((folder.path / "report.html").read_text(encoding="utf-8"))
    assert any(word.startswith("Failed: memory ran out <here>, after step 4.") for word in page.words)


@pytest.mark.parametrize(
    "status, expected",
    [
        ({"state": "interrupted", "step": 7}, "Stopped by the user, after step 7."),
        (
            {"state": "finished", "step": 7, "finished_on_request": True, "steps_asked": 30},
            "before all of its 30 steps",
        ),
        ({"state": "finished", "step": 7, "stopped_early": True, "stale": 3, "best_step": 4}, "weights after step 4"),
        (
            {"state": "finished", "step": 7, "result": "guard", "best_step": 4}
            | {"guard": {"floor": 0.8, "share": 0.5, "fell_at": 7, "stopped": True}},
            "The guard ended it: diversity is 50 % of the start's, below 80 %; the result is that of step 4.",
        ),
        ({"state": "new", "step": 0}, "Nothing was trained yet."),
    ],
)
def test_the_end_is_told_in_words(status, expected):
    assert expected in ending(status)


def test_a_report_tells_what_changed_on_the_way_and_knows_settings_of_earlier_versions(folder):
    first = dataclasses.asdict(TrainModelConfig(run_name="r", steps=4))
    for later in ("lr_cycles", "precision"):  # as if they had come after this run
        del first["settings"][later]
    second = {**first, "steps": 9, "settings": {**first["settings"], "save_every": 7}}
    stretches = [{"after_step": 0, "config": first}, {"after_step": 4, "config": second, "environment": {"threads": 2}}]
    record = {"identity": {"kind": "model"}, "config": second, "stretches": stretches}
    write_json(folder.path / "config.json", record)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    words = " | ".join(page.words)
    assert "9 steps were asked for" in words and "fp32" in words and "Stretches of steps" in words
    for row in ("5 | config.steps | 9 | 4", "5 | config.settings.save_every | 7 | 100", "5 | environment.threads | 2"):
        assert row in words, row


def test_a_finished_runs_report_says_so_before_its_status_does(folder):
    status = {"state": "finished", "step": 4}
    assert "Finished after 4 steps." in Page(write_report(folder, status=status).read_text(encoding="utf-8")).words
