"""A set of prompts drawn by two models: figures in closed form, layouts, even samples, and a run that goes on."""

import csv
import json
import math

import pytest
import torch
from retune.training.__main__ import main
from retune.training.commands.evaluate import EvaluateConfig, draw_prompts, evaluate
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.common.callbacks import Callbacks
from retune.training.common.files import write_tensors
from retune.training.data.prompts import Prompt
from retune.training.evaluation.prompt_sets import choose, read_prompt_set, share_out
from retune.training.evaluation.statistics import compare_scores, summarize_diversity, summarize_scores

SIZES = {"sampling_steps": 2, "cfg": 2.0, "width": 64, "height": 64, "seeds": 2, "batch_size": 2}
WORDS = ("two small red circles", "a large blue square", "a large yellow star")


def test_figures_have_their_closed_forms():
    base = torch.tensor([[1.0, 3.0], [4.0, 4.0], [6.0, 0.0]])
    tuned = torch.tensor([[2.0, 3.0], [5.0, 6.0], [3.0, 2.0]])
    found = summarize_scores(base)
    assert found["mean"] == pytest.approx(3) and found["prompt_std"] == pytest.approx(1)  # of 2, 4, 3
    assert found["seed_std"] == pytest.approx(math.sqrt(2) * 2 / 3)  # of 11/3 and 7/3
    assert summarize_scores(base[:1, :1]) == {"mean": 1.0, "prompt_std": None, "seed_std": None}
    found = compare_scores(tuned, base)
    assert found["gain"] == pytest.approx(0.5)  # of 0.5, 1.5, -0.5
    assert found["gain_error"] == pytest.approx(1 / math.sqrt(3))
    assert found["win_rate"] == pytest.approx(4.5 / 6)  # 1 and a tie; 2; 1
    assert found["win_rate_error"] == pytest.approx(0.25 / math.sqrt(3))  # of 0.75, 1, 0.5
    assert compare_scores(base, base) == {"gain": 0.0, "gain_error": 0.0, "win_rate": 0.5, "win_rate_error": 0.0}
    one_seed = compare_scores(torch.tensor([[1.0]] * 7 + [[-1.0]] * 3), torch.zeros(10, 1))
    assert one_seed["win_rate_error"] == pytest.approx(math.sqrt(0.7 * 0.3 / 9))  # the binomial's
    assert compare_scores(base[:1], tuned[:1])["win_rate_error"] is None
    with pytest.raises(ValueError, match=r"scores are \(3, 2\) and \(2, 2\)"):
        compare_scores(base, base[:2])
    several = summarize_diversity(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.5]), 3)
    assert several == {"vendi": 2.0, "distance": 0.25, "spread": 0.5}


def test_layouts_of_the_known_sets(tmp_path):
    parti = 'Prompt\tCategory\tChallenge\tNote\na cat \tAnimals\tBasic\t\na sign saying "Hi"\tArts\tText\tby me\r\n\n'
    (tmp_path / "PartiPrompts.tsv").write_text("\ufeff" + parti, encoding="utf-8")
    found = list(read_prompt_set(tmp_path / "PartiPrompts.tsv"))
    assert found == [Prompt("a cat", category="Animals"), Prompt('a sign saying "Hi"', category="Arts")]
    for name in ("photo", "anime", "concept-art", "paintings"):
        (tmp_path / f"{name}.json").write_text(json.dumps([f"{name} {i}" for i in range(2)]), encoding="utf-8")
    found = list(read_prompt_set(tmp_path))
    assert [one.category for one in found[::2]] == ["anime", "concept-art", "paintings", "photo"]
    assert list(read_prompt_set(tmp_path / "photo.json")) == found[6:] and found[7].text == "photo 1"
    (tmp_path / "own.jsonl").write_text('{"prompt": "a cat", "category": "pets", "weight": 2}', encoding="utf-8")
    assert list(read_prompt_set(tmp_path / "own.jsonl")) == [Prompt("a cat", 2.0, "pets")]
    (tmp_path / "own.txt").write_text("a cat\na dog", encoding="utf-8")
    assert list(read_prompt_set(tmp_path / "own.txt")) == [Prompt("a cat"), Prompt("a dog")]
    (tmp_path / "empty").mkdir()
    for name, text, words in (
        ("a.tsv", "Text\tCategory\na\tb", "line 1: columns are text, category; expected Prompt"),
        ("a.tsv", "Prompt\tCategory\n \tb", "line 2: no prompt"),
        ("a.json", '{"a": 1}', "expected a list of texts"),
        ("a.json", "[", "is damaged or no JSON"),
        ("a.png", "", "expected a set of prompts: PartiPrompts.tsv"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            list(read_prompt_set(tmp_path / name))
    with pytest.raises(ValueError, match=r"empty holds no \.json file"):
        read_prompt_set(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_prompt_set(tmp_path / "nowhere")


def test_a_limit_takes_the_same_of_every_category():
    sizes = {"a": 50, "b": 4, "c": 30, "d": 16}
    prompts = [Prompt(f"{name} {i}", category=name) for i in range(50) for name in sizes if i < sizes[name]]
    assert choose([*prompts, Prompt("a 1", category="b")]) == prompts  # the second time it stands there does not count
    found = choose(prompts, 31)
    counts = {name: sum(one.category == name for one in found) for name in sizes}
    assert counts == {"a": 9, "b": 4, "c": 9, "d": 9}
    assert [one for one in prompts if one in found] == found
    assert found == choose(iter(prompts), 31) != choose(prompts, 31, seed=1)
    assert set(choose(prompts, 20)) <= set(found) and len(choose(prompts, 1000)) == 100
    chosen = [choose(prompts, 40, seed) for seed in range(200)]
    share = sum(prompts[0] in one for one in chosen) / 200
    assert share == pytest.approx(12 / 50, abs=0.1)
    assert share_out({"a": 1, "b": 1}, 1) == {"a": 0, "b": 1}


@pytest.fixture(scope="module")
def demo():
    return build_model(ModelConfig(model="demo"))


@pytest.fixture
def tuned(demo, tmp_path):
    """A result that changes the text encoder."""
    random = torch.Generator().manual_seed(0)
    own = {name: target.tensor for name, target in demo.text_encoder.weights.items()}
    values = {name: value + 0.05 * torch.randn(value.shape, generator=random) for name, value in own.items()}
    write_tensors(tmp_path / "tuned.safetensors", values)
    return tmp_path / "tuned.safetensors"


@pytest.fixture
def prompt_file(tmp_path):
    lines = ("Prompt\tCategory", *(f"{text}\t{text.split()[1]}" for text in WORDS))
    (tmp_path / "set.tsv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "set.tsv"


def test_noise_is_the_prompts_own(demo, prompt_file):
    config = EvaluateConfig(run_name="e", prompts=prompt_file, rewards=("demo CLIP",), **SIZES)
    both, alone = draw_prompts(demo, WORDS[:2], config), draw_prompts(demo, WORDS[1:2], config)
    assert both.shape == (2, 2, 3, 64, 64)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)
    assert (both[0, 0] - both[0, 1]).abs().mean() > 0.01


def test_a_stopped_measurement_goes_on_and_other_settings_are_refused(tuned, prompt_file, tmp_path):
    def config(**changes):
        values = {"run_name": "e", "prompts": prompt_file, "rewards": ("demo aesthetic", "demo CLIP"), **SIZES}
        return EvaluateConfig(**(values | changes))

    def model(*files):
        return ModelConfig(model="demo", tuned=tuple(map(str, files)))

    class Stops(Callbacks):
        texts: list[str] = []

        def on_text(self, text):
            self.texts.append(text)
            if text.startswith("drawing with the tuned model: 1"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model(tuned), config(), tmp_path / "stopped", Stops())
    file = tmp_path / "stopped" / "e" / "scores.jsonl"
    before = file.read_bytes()
    assert before.count(b"\n") == 4 and Stops.texts[3:] == [
        "drawing with the tuned model: 0 of 3 prompts",
        "drawing with the tuned model: 1 of 3 prompts",
    ]
    file.write_bytes(before + b'{"model": "tuned", "prom')
    found = evaluate(model(tuned), config(batch_size=3, save_images=True), tmp_path / "stopped")
    assert file.read_bytes().startswith(before) and file.read_bytes().count(b"\n") == 6
    assert len(list((tmp_path / "stopped" / "e" / "images" / "tuned").glob("0000[12]_[01].png"))) == 4
    whole = evaluate(model(tuned), config(), tmp_path / "whole")
    assert {k: v for k, v in found.items() if k != "run"} == {k: v for k, v in whole.items() if k != "run"}
    assert found["all"]["prompts"] == 3 and {n: f["prompts"] for n, f in found["categories"].items()} == {
        "large": 2,
        "small": 1,
    }
    aesthetic = found["all"]["rewards"]["demo aesthetic"]
    gain = aesthetic["tuned"]["mean"] - aesthetic["base"]["mean"]
    assert aesthetic["gain"] == pytest.approx(gain) and gain != 0 and 0 <= aesthetic["win_rate"] <= 1
    assert {"base", "tuned", "kept"} == found["all"]["diversity"].keys()
    with open(tmp_path / "whole" / "e" / "scores.csv", encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2 * 3 * 2 and rows[0]["prompt"] == WORDS[0] and rows[-1]["category"] == "large"
    mean = sum(float(row["demo aesthetic"]) for row in rows[6:]) / 6
    assert mean == pytest.approx(aesthetic["tuned"]["mean"])
    for given, changes, words in (
        ((tuned,), {"seeds": 3}, "seeds is 3; run 'e' was made with 2"),
        ((f"{tuned}:0.5",), {}, "put into the models differs"),
        ((tuned,), {"limit": 2}, "limit is 2"),
        ((tuned,), {"rewards": ("demo CLIP",)}, "the rewards .* differs"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(model(*given), config(**changes), tmp_path / "whole")


def test_the_command_line_compares_equal_models_as_equal(tuned, prompt_file, tmp_path, capsys):
    flags = ["evaluate", "--model", "demo", "--prompts", str(prompt_file), "--rewards", "demo CLIP", "--seeds", "1"]
    flags += "--sampling-steps 1 --width 64 --height 64 --limit 2 --run-name e --output".split() + [str(tmp_path)]
    same = ["--tuned", f"{tuned}:0"]
    assert main([*flags, *same, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = found["all"]["rewards"]["demo CLIP"]
    assert (figures["gain"], figures["win_rate"]) == (0, 0.5) and found["all"]["diversity"] == {}
    assert main([*flags, *same]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["demo", "CLIP", "all", "2"] in [line[:4] for line in lines]
    assert main([*flags, "--run-name", "alone"]) == 0
    assert "win rate" not in capsys.readouterr().out
    (tmp_path / "none.txt").write_text("\n# nothing\n", encoding="utf-8")
    assert main([*flags, "--prompts", str(tmp_path / "none.txt")]) == 2
    assert "hold no prompts" in capsys.readouterr().err
