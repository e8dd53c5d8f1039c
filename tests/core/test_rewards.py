"""Rewards against transformers, OpenCLIP's forward pass and closed forms, from files in the true key layouts."""

import numpy as np
import pytest
import torch
from PIL import Image
from retune.training.models.clip import clip_config
from retune.training.rewards.clip_towers import vision_config
from retune.training.rewards.heads import folded, read_head
from retune.training.rewards.load import KINDS, RewardConfig, load_reward
from retune.training.rewards.preprocess import Preprocess, centre_crop, checked_later, resize_shorter
from retune.training.rewards.tokens import ClipTokens
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from .conftest import seeded, write_clip_tokenizer

PROMPTS = ["a red circle on the left", "two small blue squares", "a green star, white background"]
VISION = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 224, "patch_size": 32, "projection_dim": 24, "hidden_act": "quick_gelu"}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
TEXT |= {"max_position_embeddings": 77, "projection_dim": 24, "hidden_act": "quick_gelu"}
MLP_WIDTHS = (24, 1024, 128, 64, 16, 1)


def noise(count=3, height=224, width=224, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """(tokenizer folder, vocabulary size)"""
    folder = tmp_path_factory.mktemp("rewards") / "tokenizer"
    return folder, write_clip_tokenizer(folder)


@pytest.fixture(scope="module")
def clip(words):
    """transformers' CLIPModel, weights large enough that scores differ."""
    from transformers import CLIPConfig, CLIPModel

    size = words[1]
    text = TEXT | {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    model = seeded(lambda: CLIPModel(config))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))
    return model


@pytest.fixture(scope="module")
def clip_file(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("hugging face") / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, path)
    return path


def open_clip_state(clip):
    """The same weights as OpenCLIP names them: fused projections, and the two last ones transposed."""
    state, result = clip.state_dict(), {"logit_scale": clip.state_dict()["logit_scale"]}
    parts = {"q": 0, "k": 1, "v": 2}
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inner["self_attn.out_proj"] = "attn.out_proj"
    outer = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
    }
    fused = {}
    for name, tensor in state.items():
        tower = "visual.transformer" if name.startswith("vision_model") else "transformer"
        if ".encoder.layers." in name:
            number, rest = name.split(".encoder.layers.")[1].split(".", 1)
            path, kind = rest.rsplit(".", 1)
            start = f"{tower}.resblocks.{number}."
            if path in inner:
                result[f"{start}{inner[path]}.{kind}"] = tensor
            else:
                fused.setdefault(f"{start}attn.in_proj_{kind}", {})[parts[path.split(".")[1][0]]] = tensor
        elif name in outer:
            result[outer[name]] = tensor
        elif name.rsplit(".", 1)[0] in outer:
            result[f"{outer[name.rsplit('.', 1)[0]]}.{name.rsplit('.', 1)[1]}"] = tensor
    result |= {name: torch.cat([rows[i] for i in range(3)]) for name, rows in fused.items()}
    result["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    result["text_projection"] = state["text_projection.weight"].T.contiguous()
    return result


def open_clip_tower(state, start, x, heads, mask, act):
    """OpenCLIP's Transformer, from its weights: nn.MultiheadAttention on fused projections, residuals, MLP."""
    for number in range(2):
        block = f"{start}.resblocks.{number}."
        p = {name.removeprefix(block): tensor for name, tensor in state.items() if name.startswith(block)}
        y = functional.layer_norm(x, x.shape[-1:], p["ln_1.weight"], p["ln_1.bias"])
        attention = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
        attention.load_state_dict({name.removeprefix("attn."): t for name, t in p.items() if name.startswith("attn.")})
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = functional.layer_norm(x, x.shape[-1:], p["ln_2.weight"], p["ln_2.bias"])
        y = act(functional.linear(y, p["mlp.c_fc.weight"], p["mlp.c_fc.bias"]))
        x = x + functional.linear(y, p["mlp.c_proj.weight"], p["mlp.c_proj.bias"])
    return x


@torch.no_grad()
def open_clip_cosine(state, pixels, tokens, act):
    """CLIP.forward of open_clip, the diagonal."""
    x = functional.conv2d(pixels, state["visual.conv1.weight"], stride=32).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = functional.layer_norm(x, x.shape[-1:], state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = open_clip_tower(state, "visual.transformer", x, 2, None, act)[:, 0]
    x = functional.layer_norm(x, x.shape[-1:], state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    image = functional.normalize(x @ state["visual.proj"], dim=-1)
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    mask = torch.full((77, 77), float("-inf")).triu(1)
    x = open_clip_tower(state, "transformer", x, 1, mask, act)
    x = functional.layer_norm(x, x.shape[-1:], state["ln_final.weight"], state["ln_final.bias"])
    text = functional.normalize(x[range(len(x)), tokens.argmax(-1)] @ state["text_projection"], dim=-1)
    return (image * text).sum(-1)


def test_pickscore_is_transformers_clip_times_its_temperature(clip, clip_file, words):
    reward = load_reward(RewardConfig(kind="PickScore", file=clip_file, tokenizer=words[0]))
    images, tokens = noise(), ClipTokens(*words)(PROMPTS)
    with torch.no_grad():
        output = clip(pixel_values=Preprocess(224)(images), input_ids=tokens)
    torch.testing.assert_close(reward.scores(images, PROMPTS), output.logits_per_image.diagonal(), rtol=0, atol=1e-4)
    assert reward.scores(images, PROMPTS).std() > 1e-3
    embeddings = reward.image_embeddings(images)
    torch.testing.assert_close(embeddings, functional.normalize(output.image_embeds, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ["auto", "gelu"])
def test_hpsv2_is_open_clips_cosine_from_its_own_file(clip, words, tmp_path, activation):
    state = open_clip_state(clip)
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    config = RewardConfig(
        kind="HPSv2", file=tmp_path / "HPS_v2.1_compressed.pt", tokenizer=words[0], activation=activation
    )
    reward, images = load_reward(config), noise()
    tokens = ClipTokens(*words, pad=0)(PROMPTS)
    assert (tokens == 0).sum() > 100
    act = functional.gelu if activation == "gelu" else (lambda x: x * torch.sigmoid(1.702 * x))
    wanted = open_clip_cosine(state, Preprocess(224)(images), tokens, act)
    torch.testing.assert_close(reward.scores(images, PROMPTS), wanted, rtol=0, atol=1e-5)


def test_clip_is_transformers_cosine(clip, clip_file, words):
    reward = load_reward(RewardConfig(kind="CLIP", file=clip_file, tokenizer=words[0]))
    with torch.no_grad():
        output = clip(pixel_values=Preprocess(224)(noise()), input_ids=ClipTokens(*words)(PROMPTS))
    wanted = (output.image_embeds * output.text_embeds).sum(-1)
    torch.testing.assert_close(reward.scores(noise(), PROMPTS), wanted, rtol=0, atol=1e-5)


def test_preprocessing_is_that_of_transformers_image_processor():
    from transformers import CLIPImageProcessor

    picture = (noise(1, 224, 224)[0] * 255).round().byte()
    pil_image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    wanted = CLIPImageProcessor()(images=pil_image, return_tensors="pt").pixel_values
    torch.testing.assert_close(Preprocess(224)(picture[None] / 255), wanted, rtol=0, atol=1e-5)


def test_clip_of_two_files_and_wrapped_names(clip, clip_file, words, tmp_path):
    state = clip.state_dict()
    vision = {f"module.{name}": t for name, t in state.items() if name.startswith("vis")}
    save_file(vision, tmp_path / "vision.safetensors")
    save_file({name: t for name, t in state.items() if name.startswith("text")}, tmp_path / "text.safetensors")
    files = {"file": tmp_path / "text.safetensors", "image_tower": tmp_path / "vision.safetensors"}
    two = load_reward(RewardConfig(kind="CLIP", tokenizer=words[0], **files))
    one = load_reward(RewardConfig(kind="CLIP", file=clip_file, tokenizer=words[0]))
    assert torch.equal(two.scores(noise(), PROMPTS), one.scores(noise(), PROMPTS))
    assert two.fingerprint == one.fingerprint


def aesthetic_mlp(relu=False):
    dropouts = (0.2, 0.2, 0.1)
    layers = []
    for place, (width, out) in enumerate(zip(MLP_WIDTHS, MLP_WIDTHS[1:], strict=False)):
        layers.append(nn.Linear(width, out))
        layers += [nn.ReLU()] * (relu and place < 4)
        layers += [nn.Dropout(dropouts[place])] if place < 3 else []
    return seeded(lambda: nn.Sequential(*layers))


@pytest.mark.parametrize("relu", [False, True])
def test_aesthetic_is_the_published_network_on_the_embedding(clip, clip_file, tmp_path, relu):
    mlp = aesthetic_mlp(relu)
    if relu:  # its order is linear, ReLU, dropout, so that the places are 0, 3, 6, 9, 11
        assert [i for i, layer in enumerate(mlp) if isinstance(layer, nn.Linear)] == [0, 3, 6, 9, 11]
    else:
        assert [i for i, layer in enumerate(mlp) if isinstance(layer, nn.Linear)] == [0, 2, 4, 6, 7]
    torch.save({f"layers.{name}": tensor for name, tensor in mlp.state_dict().items()}, tmp_path / "head.pth")
    reward = load_reward(RewardConfig(kind="aesthetic", file=tmp_path / "head.pth", image_tower=clip_file))
    with torch.no_grad():
        embeds = clip.visual_projection(clip.vision_model(Preprocess(224)(noise())).pooler_output)
        wanted = mlp(functional.normalize(embeds, dim=-1))[:, 0]
    torch.testing.assert_close(reward.scores(noise(), PROMPTS), wanted, rtol=0, atol=1e-4)


def test_folding_is_the_product_of_the_layers():
    layers = [layer.double() for layer in aesthetic_mlp() if isinstance(layer, nn.Linear)]
    one, (a, b, c, d, e) = folded(layers), layers
    torch.testing.assert_close(one.weight, e.weight @ d.weight @ c.weight @ b.weight @ a.weight)
    x = torch.rand(5, 24, dtype=torch.float64)
    torch.testing.assert_close(one(x), nn.Sequential(*layers)(x), rtol=0, atol=1e-12)
    v1 = read_head({"weight": torch.ones(1, 3), "bias": torch.ones(1)})
    assert v1(torch.ones(2, 3)).tolist() == [[4.0], [4.0]]


def test_demo_rewards_are_those_the_demo_was_built_with():
    from retune.tools.build_demo import scorer as build_scorer

    images = noise(3, 128, 128)
    aesthetic, clip = (load_reward(RewardConfig(kind=kind)) for kind in KINDS[-2:])
    torch.testing.assert_close(aesthetic.scores(images, PROMPTS), build_scorer.aesthetic(images), rtol=0, atol=1e-5)
    tokens = build_scorer.tokens_of(build_scorer.clip_tokenizer(), PROMPTS)
    with torch.no_grad():
        both = build_scorer.embeddings(build_scorer.load_scorer(), build_scorer.normalised(images), tokens)
    torch.testing.assert_close(clip.scores(images, PROMPTS), (both[0] * both[1]).sum(-1), rtol=0, atol=1e-5)


def smooth(height, width):
    """A picture with structure at several sizes, and edges that make a bicubic filter overshoot."""
    from retune.tools.build_demo.vae import pictures
    from retune.training.demo.scenes import held_out_scenes

    images = pictures(held_out_scenes(6, 3), 3).float() / 255
    return functional.interpolate(images, (height, width), mode="bilinear").clamp(0, 1)


@pytest.fixture(scope="module")
def published(clip_file, words, tmp_path_factory):
    """kind -> a reward of this kind on the tower of `clip`; the aesthetic's head is a direction, without a bias."""
    head = tmp_path_factory.mktemp("head") / "head.safetensors"
    direction = torch.randn(1, 24, generator=torch.Generator().manual_seed(4))
    save_file({"weight": direction, "bias": torch.zeros(1)}, head)

    def reward(kind):
        if kind == "aesthetic":
            return load_reward(RewardConfig(kind=kind, file=head, image_tower=clip_file))
        return load_reward(RewardConfig(kind=kind, file=clip_file, tokenizer=words[0]))

    return reward


SIZES = [(512, 512), (640, 448), (300, 511)]


@pytest.mark.parametrize(
    ("kind", "size"), [*(("PickScore", size) for size in SIZES), ("aesthetic", SIZES[1]), ("CLIP", SIZES[1])]
)
def test_full_size_pictures_score_as_after_8_bit_pillow_preprocessing(published, kind, size):
    images = smooth(*size)
    shorter = min(size)
    wanted = []
    for image in images:
        picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        new = tuple(int(224 * side / shorter) for side in reversed(size))
        picture = picture.resize(new, Image.Resampling.BICUBIC)
        left, top = (int(round((side - 224) / 2)) for side in new)
        picture = picture.crop((left, top, left + 224, top + 224))
        wanted.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    wanted = torch.stack(wanted)
    reward, prompts = published(kind), PROMPTS * 2
    ours, theirs = reward.scores(images, prompts), reward.scores(wanted, prompts)
    assert (ours - theirs).abs().max() <= 0.01 * theirs.abs().mean()  # random weights: single scores are near 0
    assert (centre_crop(resize_shorter(images, 224), 224) - wanted).abs().max() < 2 / 255
    assert (ours[:, None] - ours).abs().max() > 0.02 * theirs.abs().max()  # the bound can fail


@pytest.mark.parametrize("kind", KINDS[:4])
def test_the_gradient_of_published_kinds_reaches_every_value_in_and_out_of_range(published, kind):
    reward, images = published(kind), (3 * noise(2, 224, 320) - 1).requires_grad_()
    reward.scores(images, PROMPTS[:2]).sum().backward()
    gradient = centre_crop(images.grad, 224)
    assert torch.isfinite(images.grad).all() and (gradient != 0).float().mean() > 0.999
    assert all(parameter.grad is None for parameter in reward.network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_gradients_are_on_one_device_which_is_not_read(published, device, kind):
    reward = load_reward(RewardConfig(kind=kind)) if kind.startswith("demo") else published(kind)
    images, results = noise(2, 224, 320), []
    for where in ("cpu", "lazy"):
        reward.network.to(where)
        given = images.to(where).requires_grad_()
        device.reset()
        with checked_later():
            scores = reward.scores(given, PROMPTS[:2])
        (gradient,) = torch.autograd.grad(scores.sum(), given)
        assert scores.device == given.device and not device.reads
        results.append((scores.detach().cpu(), gradient.cpu()))
    for there, here in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4 * float(here.abs().max()))


def test_pads_change_nothing_and_long_prompts_are_cut_with_one_warning(clip_file, words, caplog):
    hps, clip = (load_reward(RewardConfig(kind=k, file=clip_file, tokenizer=words[0])) for k in ("HPSv2", "CLIP"))
    assert torch.equal(hps.scores(noise(), PROMPTS), clip.scores(noise(), PROMPTS))
    tokens = ClipTokens(*words)
    long = tokens(["a red circle on the left " * 30] * 2)
    assert long.shape == (2, 77) and long[0, -1] == words[1] - 1 and len(caplog.records) == 1
    assert torch.equal(tokens(["a <|endoftext|> red circle"]), tokens(["a red circle"]))


PUBLISHED = {  # image width, layers, heads, patch, pixels, projection, activation; text width, layers, heads
    "ViT-B/32": (768, 12, 12, 32, 224, 512, "quick_gelu", 512, 12, 8),
    "ViT-L/14": (1024, 24, 16, 14, 224, 768, "quick_gelu", 768, 12, 12),
    "ViT-L/14 at 336": (1024, 24, 16, 14, 336, 768, "quick_gelu", 768, 12, 12),
    "ViT-H/14": (1280, 32, 16, 14, 224, 1024, "gelu", 1024, 24, 16),
    "ViT-bigG/14": (1664, 48, 16, 14, 224, 1280, "gelu", 1280, 32, 20),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_the_published_clips_are_read_from_shapes(name):
    width, layers, heads, patch, pixels, projection, act, text_width, text_layers, text_heads = PUBLISHED[name]

    def tower(width, layers):
        return {f"encoder.layers.{i}.mlp.fc1.weight": torch.empty(4 * width, width) for i in range(layers)}

    with torch.device("meta"):
        image = tower(width, layers) | {
            "embeddings.patch_embedding.weight": torch.empty(width, 3, patch, patch),
            "embeddings.position_embedding.weight": torch.empty((pixels // patch) ** 2 + 1, width),
            "visual_projection.weight": torch.empty(projection, width),
        }
        text = tower(text_width, text_layers) | {
            "embeddings.token_embedding.weight": torch.empty(49408, text_width),
            "embeddings.position_embedding.weight": torch.empty(77, text_width),
            "text_projection.weight": torch.empty(projection, text_width),
        }
    found, words = vision_config(image), clip_config(text)
    assert list(found.values()) == [width, 4 * width, layers, heads, projection, pixels, patch, act]
    assert words["num_attention_heads"] == text_heads and words["num_hidden_layers"] == text_layers
    assert words["projection_dim"] == projection and words["eos_token_id"] == 49407


HUGGING_FACE = {"PickScore": "yuvalkirstain/PickScore_v1", "HPSv2": "xswu/HPSv2", "CLIP": "openai/clip-vit-large"}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_missing_and_wrong_files_are_named_with_source_and_folder(kind, words, clip, tmp_path):
    def error_of(content, name="wrong.safetensors"):
        path = None if name is None else tmp_path / name
        if content is not None:
            save_file(content, path) if path.suffix == ".safetensors" else path.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_reward(RewardConfig(kind=kind, file=path, tokenizer=words[0]))
        text = str(caught.value)
        assert HUGGING_FACE[kind] in text and "models/retune_rewards" in text
        assert name is None or name in text
        return text

    assert "none is chosen" in error_of(None, None)
    assert "does not exist" in error_of(None, "absent.safetensors")
    assert "damaged" in error_of(b"no tensors", "HPS.pt")
    assert "no text tower" in error_of({n: t for n, t in clip.state_dict().items() if n.startswith("vis")})
    assert "lacks 1 tensors" in error_of({n: t for n, t in clip.state_dict().items() if "post_layernorm.bias" not in n})
    if kind == "PickScore":
        assert "logit_scale" in error_of({n: t for n, t in clip.state_dict().items() if n != "logit_scale"})


def test_a_wrong_aesthetic_head_or_tower_is_named(clip_file, words, tmp_path):
    save_file({"weight": torch.ones(1, 8), "bias": torch.ones(1)}, tmp_path / "head.safetensors")
    for files, wanted in [
        ({}, "improved-aesthetic-predictor"),
        ({"file": clip_file, "image_tower": clip_file}, "no aesthetic head"),
        ({"file": tmp_path / "head.safetensors"}, "openai/clip-vit-large-patch14"),
        ({"file": tmp_path / "head.safetensors", "image_tower": tmp_path / "no"}, "models/clip_vision"),
        ({"file": tmp_path / "head.safetensors", "image_tower": clip_file}, "24 values and the head reads 8"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=wanted):
            load_reward(RewardConfig(kind="aesthetic", **files))
