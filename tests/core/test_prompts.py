"""Prompts of files: read line by line, drawn by weight, held out, and named where they are too long."""

import json
import logging
import tracemalloc

import pytest
import torch
from retune.training.commands.open_model import ModelConfig, build_model
from retune.training.data.prompt_lengths import long_prompts, warn_of_long_prompts
from retune.training.data.prompts import (
    Prompt,
    PromptFile,
    PromptOrder,
    prompt_weights,
    prompts_fingerprint,
    read_prompts,
    split_held_out,
)

PROMPTS = [Prompt("a red circle"), Prompt("two small blue squares"), Prompt("a green star, white background")]


def shown(prompts, batches, size=2, seed=0):
    order = PromptOrder(prompts, size, seed)
    return [slot.prompt for number in range(1, batches + 1) for slot in order.batch(number)]


def test_files_and_what_is_wrong_in_them(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa cät\r\n# about\r\n\r\n a dog \n".encode())
    assert list(read_prompts(tmp_path / "p.txt")) == [Prompt("a cät"), Prompt("a dog")]
    rows = '{"prompt": "a cat", "weight": 3, "category": "pets"}\n\n{"text": "a  dog"}'
    (tmp_path / "p.jsonl").write_text(rows, encoding="utf-8")
    found = read_prompts(tmp_path / "p.jsonl")
    assert list(found) == [found[0], found[-1]] == [Prompt("a cat", 3.0, "pets"), Prompt("a dog")] == found[:]
    for text, words in (
        ("", "hold no prompts"),
        ('\n{"weight": 1}', "line 2: no prompt"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a", "weight": 0}', "weight is 0; expected a number above 0"),
        ('{"prompt": "a", "category": 3}', "category is 3; expected a text"),
    ):
        (tmp_path / "bad.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            read_prompts(tmp_path / "bad.jsonl")
    (tmp_path / "bad.txt").write_bytes("a cat\na dög".encode("latin-1"))
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read_prompts(tmp_path / "bad.txt")
    (tmp_path / "p.jsonl").write_text('{"prompt": "another"}', encoding="utf-8")
    with pytest.raises(ValueError, match="p.jsonl has changed"):
        found[0]


@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_order_is_that_of_the_listed_prompts(tmp_path, count):
    listed = [Prompt(f"prompt {i}", 1.0 + i % 3 * (count == 100)) for i in range(count)]
    rows = "\n".join(json.dumps({"prompt": one.text, "weight": one.weight}) for one in listed)
    (tmp_path / "p.jsonl").write_text(rows, encoding="utf-8")
    file = read_prompts(tmp_path / "p.jsonl")
    assert (
        prompts_fingerprint(file) == prompts_fingerprint(listed) != prompts_fingerprint([*listed, Prompt("one more")])
    )
    assert shown(file, 20) == shown(listed, 20) and (count == 1 or shown(file, 20) != shown(file, 20, seed=1))


def test_weights_and_epochs():
    weighted = [Prompt("a cat", 3.0), Prompt("a dog"), Prompt("a cow", 1e-9)]
    counts = {text: shown(weighted, 1000).count(text) / 2000 for text in ("a cat", "a dog", "a cow")}
    assert counts["a cat"] == pytest.approx(0.75, abs=0.04) and counts["a cow"] == 0
    order = PromptOrder(PROMPTS, 3, 0)
    assert {slot.prompt for slot in order.batch(5)} == {prompt.text for prompt in PROMPTS}
    assert len({tuple(s.prompt for s in order.batch(n)) for n in range(1, 9)}) > 2
    again = order.batch(3)
    assert [slot.prompt for slot in again] == shown(PROMPTS, 3, 3)[6:] and again[1].index == 1


def test_held_out_prompts_are_in_no_batch():
    many = [Prompt(str(i), 1.0 + i % 2) for i in range(40)]
    training, held_out = split_held_out(many, 0.2, 4)
    assert [one.text for one in held_out] == ["4", "9", "14", "19"] and len(training) == 36
    assert list(training) == [one for one in many if one not in held_out] and training[-1] == many[-1]
    assert list(prompt_weights(training)) == [one.weight for one in training]
    assert not {one.text for one in held_out} & set(shown(training, 200, 4))
    assert split_held_out(many, 0.0, 4) == (many, [])
    training, held_out = split_held_out(many[:2], 0.1, 4)
    assert (list(training), held_out) == (many[:1], many[1:2])


def test_a_long_file_is_not_held_in_memory(tmp_path):
    lines = 50_000
    (tmp_path / "p.txt").write_text("\n".join(f"{i}, " + "a long prompt " * 10 for i in range(lines)))
    tracemalloc.start()
    try:
        prompts = PromptFile(tmp_path / "p.txt")
        training, held_out = split_held_out(prompts, 0.1, 16)
        order = PromptOrder(training, 8, 0)
        found = {slot.prompt for number in range(1, 20) for slot in order.batch(number)}
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 19 * 8 and len(held_out) == 16
    assert kept < 40 * lines and most < 60 * lines  # the texts alone are 150 bytes each


def test_prompts_beyond_the_window_are_named_once(caplog):
    model = build_model(ModelConfig(model="demo"))
    encoder = model.text_encoder
    per_word = len(encoder.vocabularies["clip_l"].ids("red"))
    long, longest, fits = ("red " * (count // per_word) for count in (80, 200, 75))
    prompts = [Prompt(fits), Prompt(long), Prompt("a red circle"), Prompt(longest)]
    found = long_prompts(encoder, prompts)
    assert [number for number, _, _ in found] == [4, 2] and found[1][1] == 80
    assert [len(windows) for windows in encoder.tokenize([fits, long, longest])] == [1, 2, 3]
    with caplog.at_level(logging.WARNING):
        warn_of_long_prompts(encoder, prompts)
    (message,) = (one.getMessage() for one in caplog.records if one.name.endswith("prompt_lengths"))
    assert "2 prompts have more than 75 tokens" in message and "prompt 2 has 80 (red red" in message
    assert "in windows of 75, as ComfyUI does" in message
    caplog.clear()
    swapped = build_model(ModelConfig(model="demo", t5="demo", max_tokens=20)).text_encoder
    many = Prompt("a small red circle on the left, " * 4)
    assert len(swapped.tokenize([many.text])[0]) == 20 and torch.equal(
        swapped.encode(swapped.tokenize([many.text])).context,
        swapped.encode(swapped.tokenize([many.text + ", and more of it"])).context,
    )
    caplog.clear()
    warn_of_long_prompts(swapped, [many])
    assert "the text encoder cuts them to 19: raise max_tokens" in caplog.text
    caplog.clear()
    warn_of_long_prompts(swapped, [Prompt("a red circle")])
    assert not caplog.text
