"""Files of tensors: safetensors' own bytes, written with one tensor after the other in RAM."""

import hashlib
import json
import weakref

import pytest
import torch
from retune.training.common import tensor_writer
from retune.training.common.files import write_tensors
from retune.training.common.foreign import read_tensors
from retune.training.runs import state_file
from safetensors.torch import save_file


def one_of_each_dtype():
    random = torch.Generator().manual_seed(0)
    tensors = {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3), 'ü."q\\': torch.ones(2)}
    for dtype, code in tensor_writer.DTYPES.items():
        numbers = torch.randint(0, 100, (3, 5), generator=random, dtype=torch.uint8)
        value = numbers.view(dtype) if dtype.itemsize == 1 and dtype.is_floating_point else numbers.to(dtype)
        tensors |= {f"z.{code}": value, f"a.{code}": value[:2].clone()}
    return tensors


@pytest.mark.parametrize("metadata", [{}, {"one": 'line\nand\ttab é\x01 "\\'}])
def test_the_bytes_are_those_of_safetensors(tmp_path, metadata):
    tensors = one_of_each_dtype()
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    write_tensors(tmp_path / "ours.safetensors", tensors, metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_metadata_is_sorted_and_strides_do_not_matter(tmp_path):
    value = torch.arange(24.0).view(2, 3, 4)
    for name, tensor, entries in (("a", value, "xyz"), ("b", value.permute(2, 0, 1).contiguous(), "zyx")):
        tensor = tensor if name == "a" else tensor.permute(1, 2, 0)
        write_tensors(tmp_path / name, {"w": tensor}, {entry: entry for entry in entries})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(read_tensors(tmp_path / "a")[0]["w"], value)


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="w is of torch.complex128; expected one of safetensors' dtypes"):
        write_tensors(tmp_path / "w", {"w": torch.zeros(2, dtype=torch.complex128)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write, most", [(write_tensors, 1), (state_file.write_state_file, 2)])
def test_copies_of_two_tensors_are_in_memory_at_most(tmp_path, monkeypatch, write, most):
    alive, counts, to_bytes = weakref.WeakSet(), [], tensor_writer.tensor_bytes

    def counted(tensor):
        alive.add(tensor.untyped_storage())
        counts.append(len(alive))
        return to_bytes(tensor)

    monkeypatch.setattr(tensor_writer, "tensor_bytes", counted)
    tensors = {f"w{i}": torch.randn(100, 50, generator=torch.Generator().manual_seed(i)).T for i in range(12)}
    write(tmp_path / "it.safetensors", tensors, {"step": "1"})
    assert len(counts) == 12 and max(counts) <= most
    found, metadata = read_tensors(tmp_path / "it.safetensors")
    assert metadata["step"] == "1" and all(torch.equal(found[name], value) for name, value in tensors.items())


def test_a_state_has_the_bytes_of_earlier_versions(tmp_path):
    """The digest of version 0.3 on: SHA-256 over the sorted metadata, then each tensor's name and own digest."""
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(0)}
    metadata = {"retune.state": "{}", "about": "x"}
    digests = []
    for name in sorted(tensors):
        value = tensors[name]
        digest = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        digests.append([name, digest.hexdigest()])
    whole = hashlib.sha256(json.dumps([sorted(metadata.items()), *digests]).encode()).hexdigest()
    write_tensors(tmp_path / "before.safetensors", tensors, {**metadata, "retune.digest": whole})
    state_file.write_state_file(tmp_path / "now.safetensors", tensors, metadata)
    assert (tmp_path / "now.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()
    for copy in (True, False):
        found, about, verified = state_file.read_state_file(tmp_path / "before.safetensors", copy)
        assert verified and about == metadata
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
