"""The net below the nodes: what no check foresaw names the node and the run; everything else passes as it is."""

import logging

import pytest
import torch


@pytest.fixture
def failing(comfyui):
    """A node class whose execute raises what it is given, in the net."""
    from comfy_api.latest import io
    from retune.nodes.ui.net import guarded

    class Failing(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Failing", display_name="Failing", category="retune", inputs=[])

        @classmethod
        def execute(cls, error, run_name="r"):
            if error is not None:
                raise error
            return run_name

    return guarded(Failing)


def test_an_unforeseen_error_names_node_and_run_and_is_logged(failing, caplog):
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError) as raised:
        failing.execute(KeyError("missing"), run_name="toy")
    assert str(raised.value).startswith("Failing, run toy failed: it has no entry 'missing' (KeyError)")
    assert isinstance(raised.value.__cause__, KeyError)
    assert "Failing, run toy failed" in caplog.text and "Traceback" in caplog.text


def test_errors_of_checks_a_lack_of_memory_and_interrupts_pass(failing):
    import comfy.model_management

    interrupt = comfy.model_management.InterruptProcessingException()
    for error in (
        ValueError("width is 3; expected 4"),
        FileNotFoundError("x"),
        torch.OutOfMemoryError("full"),
        interrupt,
    ):
        with pytest.raises(type(error)) as raised:
            failing.execute(error)
        assert raised.value is error
    assert failing.execute(None, run_name="fine") == "fine"


def test_every_node_is_in_the_net(schemas):
    """ComfyUI gets the guarded classes, under their own names."""
    import retune.nodes as nodes

    classes = [value for name, value in vars(nodes).items() if name.startswith("Retune") and hasattr(value, "execute")]
    assert len(classes) == len(schemas) and all(hasattr(node.execute.__func__, "__wrapped__") for node in classes)
