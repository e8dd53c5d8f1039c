"""The headless ComfyUI that other tests and `run.py demo` work with."""

import re
import sys
import time

import pytest
from retune.training.commands.comfyui_server import prepare, read_event, server

IMAGE = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": 255}}


def with_output(node: dict) -> dict:
    return {"1": IMAGE, "2": node}


def test_a_prompt_runs_and_its_events_are_recorded(comfyui_server):
    before = len(comfyui_server.events)
    preview = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    prompt_id = comfyui_server.queue(with_output(preview))
    (image,) = comfyui_server.wait(prompt_id, 60)["outputs"]["2"]["images"]
    assert (comfyui_server.base_directory / "temp" / image["filename"]).is_file()
    wanted, deadline = {"execution_start", "executed"}, time.monotonic() + 20
    while time.monotonic() < deadline:  # events come by another way than the history
        events = comfyui_server.events[before:]
        kinds = {e["type"] for e in events if e["data"].get("prompt_id") == prompt_id}
        if wanted <= kinds:
            break
        time.sleep(0.05)
    assert wanted <= kinds


def test_a_refused_prompt_says_which_input_is_wrong(comfyui_server):
    preview = {"class_type": "PreviewImage", "inputs": {}}
    with pytest.raises(ValueError, match=r"(?s)node 2 \(PreviewImage\).*images"):
        comfyui_server.queue(with_output(preview))


def test_a_failing_node_is_named_with_its_message(comfyui_server):
    outside = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "../../outside"}}
    with pytest.raises(RuntimeError, match=r"(?s)node 2 \(SaveImage\).*outside the output folder"):
        comfyui_server.run(with_output(outside), 60)


def test_a_comfyui_that_does_not_start_shows_its_log(comfyui, tmp_path):
    with pytest.raises(RuntimeError, match="(?s)code 2.*--no-such-option"):
        with server(comfyui, tmp_path, ("--no-such-option",)):
            pass


def test_comfyui_itself_counts_at_most_a_fifth_of_a_second_for_the_package(comfyui_server, comfyui, tmp_path):
    """In the best of three starts: the other worker's tests may have had the processor."""
    seconds = [counted(comfyui_server)]
    while min(seconds) > 0.2 and len(seconds) < 3:
        with server(comfyui, tmp_path / str(len(seconds))) as again:
            seconds.append(counted(again))
    assert min(seconds) <= 0.2, seconds


def counted(running) -> float:
    """Seconds that ComfyUI's log has for importing the package."""
    log = running.log.read_text(encoding="utf-8", errors="replace")
    return float(re.findall(r"([\d.]+) seconds\b.*custom_nodes.retune", log)[0])


def test_the_package_is_the_only_custom_node_and_a_second_start_keeps_it_so(tmp_path):
    for _ in range(2):
        prepare(tmp_path)
        assert [entry.name for entry in (tmp_path / "custom_nodes").iterdir()] == ["retune"]
        assert (tmp_path / "custom_nodes" / "retune" / "__init__.py").is_file()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    clone = tmp_path / "custom_nodes" / "retune"
    clone.mkdir(parents=True)
    (clone / "mine.txt").write_text("months of work", encoding="utf-8")
    with pytest.raises(ValueError, match="retune is a folder of its own; expected none there"):
        prepare(tmp_path)
    assert (clone / "mine.txt").read_text(encoding="utf-8") == "months of work"


def test_without_permission_for_links_the_package_is_copied(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(sys.modules["pathlib"].Path, "symlink_to", refuse)
    for _ in range(2):
        prepare(tmp_path)
    copied = {entry.name for entry in (tmp_path / "custom_nodes" / "retune").iterdir()}
    assert {"__init__.py", "nodes", "training", "js"} <= copied and not copied & {".git", ".venv", "tests", "output"}


def test_binary_messages_become_text_and_previews():
    text = b"\0\0\0\3" + b"\0\0\0\x035:3" + b"step 7"
    assert read_event(text) == {"type": "progress_text", "data": {"node": "5:3", "text": "step 7"}}
    assert read_event(b"\0\0\0\1" + b"\0\0\0\1" + b"jpeg")["type"] == "preview"
