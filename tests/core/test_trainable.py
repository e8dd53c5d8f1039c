"""Master weights: in effect inside `attach` and nowhere else; gradients go into them alone."""

import gc
import weakref

import pytest
import torch
from retune.training.models.layers import select
from retune.training.models.parameters import parameter_refs
from retune.training.models.protocols import Conditioning
from retune.training.trainables.weights import SelectedWeights, TrainableGroup


def attn2(model):
    """Masters of the cross-attention of a tiny UNet."""
    found = parameter_refs(model.denoiser.network)
    return SelectedWeights({n: found[n] for n in select(found, "cross-attention")}, [model.denoiser.network])


def loss(model):
    random = torch.Generator().manual_seed(0)
    noisy, words = torch.randn(1, 4, 8, 8, generator=random), torch.randn(1, 5, 32, generator=random)
    return model.denoiser.predict(noisy, torch.tensor([1.0]), Conditioning(words)).square().mean()


def test_masters_are_copies_in_fp32(tiny_model):
    tiny_model.denoiser.network.half()
    trainable = attn2(tiny_model)
    live = dict(tiny_model.denoiser.network.named_parameters())
    for name, master in trainable.parameters.items():
        assert master.dtype == torch.float32 and torch.equal(master, live[name].float())
        assert master.data_ptr() != live[name].data_ptr()
    assert len(trainable) == sum(live[name].numel() for name in trainable.parameters)


def test_attach_takes_effect_and_leaves_nothing_behind(tiny_model):
    network, trainable = tiny_model.denoiser.network, attn2(tiny_model)
    before = dict(network.named_parameters())
    plain = loss(tiny_model).item()
    with trainable.attach():
        assert loss(tiny_model).item() == plain
    doubled = {name: 2 * value for name, value in trainable.values().items()}
    with torch.no_grad(), trainable.attach(doubled):
        assert loss(tiny_model).item() != plain
    after = dict(network.named_parameters())
    assert before.keys() == after.keys() and all(before[n] is after[n] for n in before)
    assert loss(tiny_model).item() == plain


def test_attach_restores_after_an_exception_and_keeps_frozen_flags(tiny_model):
    network, trainable = tiny_model.denoiser.network, attn2(tiny_model)
    network.conv_in.weight.requires_grad_(False)
    before = {name: (p, p.requires_grad) for name, p in network.named_parameters()}
    with pytest.raises(KeyError), trainable.attach():
        attached = dict(network.named_parameters())
        assert {n for n, p in attached.items() if p.requires_grad} == trainable.parameters.keys()
        raise KeyError("anything")
    assert all(before[n][0] is p and before[n][1] == p.requires_grad for n, p in network.named_parameters())


def test_attach_restores_when_the_given_values_lack_a_name(tiny_model):
    network, trainable = tiny_model.denoiser.network, attn2(tiny_model)
    before = dict(network.named_parameters())
    partial = dict(list(trainable.values().items())[:2])
    with pytest.raises(KeyError), trainable.attach(partial):
        pass
    assert all(before[n] is p and p.requires_grad for n, p in network.named_parameters())


def gradients(model, checkpointing):
    trainable = attn2(model)
    with trainable.attach(), model.denoiser.checkpointing(checkpointing):
        loss(model).backward()
    return {name: p.grad for name, p in trainable.parameters.items()}


def test_gradients_go_into_the_masters_only_and_equal_autograds(tiny_model):
    network = tiny_model.denoiser.network
    found = gradients(tiny_model, checkpointing=False)
    assert all(p.grad is None for p in network.parameters())
    loss(tiny_model).backward()
    live = dict(network.named_parameters())
    assert all(found[name].abs().sum() > 0 for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, live[name].grad, rtol=1e-4, atol=1e-8)


def test_checkpointing_inside_attach_gives_the_same_gradient(tiny_model):
    plain, recomputed = gradients(tiny_model, False), gradients(tiny_model, True)
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-5, atol=1e-9)


def test_load_wants_the_same_names_and_shapes(tiny_model):
    trainable = attn2(tiny_model)
    values = {name: torch.full_like(value, 0.5) for name, value in trainable.values().items()}
    trainable.load(values)
    assert all((p == 0.5).all() for p in trainable.parameters.values())
    name = next(iter(values))
    with pytest.raises(ValueError, match="expected the same names"):
        trainable.load({n: v for n, v in values.items() if n != name})
    with pytest.raises(ValueError, match=r"is \(1,\); expected \("):
        trainable.load(values | {name: torch.zeros(1)})


def test_targets_find_every_parameter_once_and_nothing_is_an_error(tiny_model):
    network = tiny_model.denoiser.network
    found = parameter_refs(network, "unet.")
    assert found.keys() == {"unet." + name for name, _ in network.named_parameters()}
    assert all(found["unet." + name].tensor is p for name, p in network.named_parameters())
    with pytest.raises(ValueError, match="selection of weights to train is empty"):
        SelectedWeights({}, [network])


def test_all_parts_of_a_group_over_one_network_train(tiny_model):
    """The first part's masters are parameters of the network by the time the second takes effect."""
    network = tiny_model.denoiser.network
    refs = parameter_refs(network)
    parts = [SelectedWeights({n: refs[n] for n in select(refs, layers)}, [network]) for layers in LAYERS_OF_PARTS]
    group = TrainableGroup((parts[0], 1.0), (parts[1], 0.5))
    before = {name: (p, p.requires_grad) for name, p in network.named_parameters()}
    with group.attach():
        loss(tiny_model).backward()
    assert all(p.grad.abs().sum() > 0 for p in group.parameters.values())
    assert all(p.grad is None and before[n] == (p, p.requires_grad) for n, p in network.named_parameters())
    expected = gradients(tiny_model, checkpointing=False)
    for name, gradient in expected.items():
        torch.testing.assert_close(parts[0].parameters[name].grad, gradient, rtol=1e-5, atol=1e-9)


LAYERS_OF_PARTS = ("cross-attention", "self-attention")


def test_networks_are_frozen_once_for_many_attaches(tiny_model, monkeypatch):
    network, trainable = tiny_model.denoiser.network, attn2(tiny_model)
    before = {name: (p, p.requires_grad) for name, p in network.named_parameters()}
    plain = loss(tiny_model)
    with pytest.raises(KeyError), trainable.mounted():
        assert not any(p.requires_grad for p in network.parameters())
        assert loss(tiny_model).item() == plain.item()
        monkeypatch.setattr(torch.Tensor, "requires_grad_", None)  # no flag is touched again
        for _ in range(2):
            with trainable.attach():
                assert {n for n, p in network.named_parameters() if p.requires_grad} == trainable.parameters.keys()
        monkeypatch.undo()
        raise KeyError("anything")
    assert all(before[n][0] is p and before[n][1] == p.requires_grad for n, p in network.named_parameters())
    assert not any("forward" in vars(module) for module in network.modules())


def test_a_parameter_that_is_replaced_meanwhile_leaves_memory(tiny_model):
    """As when a model is moved to another device: no copy may stay behind."""
    layer = tiny_model.denoiser.network.conv_in
    old = weakref.ref(layer.weight)
    with attn2(tiny_model).mounted():
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        gc.collect()
        assert old() is None
    assert layer.weight.requires_grad
