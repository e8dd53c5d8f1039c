"""Files made with an earlier demo model load with today's, and it is said that they were made for another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from retune.training.commands.lora_files import ConvertLoraConfig, ResizeLoraConfig, convert_lora, resize_lora
from retune.training.commands.open_model import build_demo_model
from retune.training.common.foreign import read_tensors
from retune.training.config.embedding import EmbeddingConfig
from retune.training.config.lora import LoraConfig
from retune.training.data.dataset import from_images
from retune.training.demo.editions import (
    BASE,
    CONV_IN,
    EDITIONS,
    edition_of_run,
    edition_of_tokens,
    edition_of_unet,
    made_for_another,
)
from retune.training.demo.files import WEIGHTS, weights_path
from retune.training.demo.scenes import demo_examples
from retune.training.formats.embedding import Embedding, read_embedding
from retune.training.formats.embedding_fit import assign_to_encoders
from retune.training.formats.embedding_report import embedding_report
from retune.training.formats.embedding_save import save_embedding
from retune.training.formats.lora import read_lora
from retune.training.formats.lora_report import LoraReport
from retune.training.models.concepts import Concept
from retune.training.recipes.apply_results import with_tuned
from retune.training.recipes.lora import train_lora
from retune.training.recipes.textual_inversion import train_embedding
from retune.training.text_encoder.file import read_text_encoder
from retune.training.text_encoder.t5 import load_t5
from retune.training.text_encoder.t5_file import file_hash

FILES = Path(__file__).resolve().parents[1] / "fixtures" / "demo_0_3"
OLD, NEW = EDITIONS[0].name, EDITIONS[-1].name


@pytest.fixture
def pictures():
    images, captions = demo_examples(4, 0)
    return from_images(list(images), captions)


def conv_in_of(model):
    return dict((model.denoiser.canonical_name(n), p) for n, p in model.denoiser.network.named_parameters())[CONV_IN]


def test_the_last_edition_is_what_is_shipped():
    model = build_demo_model()
    assert model.denoiser.fingerprint == EDITIONS[-1].unet and model.autoencoder.fingerprint == EDITIONS[-1].vaes[0]
    t5 = read_tensors(weights_path("t5.safetensors"))[0]["shared.weight"]
    assert [edition_of_tokens(table) for table in (model.text_encoder.vocabularies["clip_l"].table, t5)] == [NEW, NEW]
    earlier = read_tensors(WEIGHTS / "earlier" / "t5.safetensors")[0]["shared.weight"]
    assert edition_of_tokens(earlier) == OLD and edition_of_tokens(torch.zeros(49408, 8)) == ""


def test_a_unet_is_known_by_its_first_convolution_also_when_it_was_trained():
    conv_in = conv_in_of(build_demo_model()).detach()
    noise = torch.randn(conv_in.shape, generator=torch.Generator().manual_seed(0))
    assert edition_of_unet(conv_in) == edition_of_unet(conv_in + 0.1 * conv_in.std() * noise) == NEW
    assert edition_of_unet(conv_in.std() * noise) == edition_of_unet(torch.zeros(320, 4, 3, 3)) == ""
    assert edition_of_unet(None) == ""


def test_a_run_is_known_by_its_unet_or_by_its_autoencoder():
    old = EDITIONS[0]
    for identity in ({"model": old.unet}, {"model": "reset", "vae": old.vaes[0]}, {"model": "x", "vae": old.vaes[1]}):
        assert edition_of_run(identity) == OLD
    assert edition_of_run({"model": ["odd"], "vae": None}) == edition_of_run({}) == ""


@pytest.mark.parametrize(
    ("base", "edition", "said"),
    [
        (EDITIONS[-1].unet, NEW, ""),
        (EDITIONS[0].unet, NEW, f"was made for {OLD}; this is {NEW}, "),
        ("0" * 32, NEW, ""),
        ("", NEW, f"does not say which model it was made for; files of {OLD} do not. This is {NEW}."),
        (EDITIONS[0].unet, "", ""),
    ],
)
def test_what_is_said_of_a_file(base, edition, said):
    found = made_for_another(base, edition)
    assert found.startswith(said) if said else found == ""


def test_an_old_lora_changes_the_model_with_a_warning(caplog):
    model = build_demo_model()
    before = {name: value.clone() for name, value in model.denoiser.network.state_dict().items()}
    with_tuned(model, [str(FILES / "warm_edges.safetensors")])
    assert any(not torch.equal(value, before[name]) for name, value in model.denoiser.network.state_dict().items())
    assert "warm_edges.safetensors does not say which model it was made for" in caplog.text
    report = LoraReport(read_lora(FILES / "warm_edges.safetensors"), 1.0, 1.0, edition=NEW, model_layers=1)
    assert f"files of {OLD} do not" in report.text()


def test_an_old_word_fits_with_a_warning():
    vocabularies = build_demo_model().text_encoder.vocabularies
    file = read_embedding(FILES / "heart.safetensors")
    concept = Concept("<heart>", assign_to_encoders(file, vocabularies))
    assert f"heart.safetensors does not say which model it was made for; files of {OLD} do not" in embedding_report(
        [file], concept, vocabularies
    )


def test_a_reference_to_the_old_t5_finds_it():
    saved = read_text_encoder(FILES / "t5_reference.safetensors")
    path = saved.find_t5([WEIGHTS])
    assert path.parent == WEIGHTS / "earlier"
    encoder = load_t5(path, saved.projection, padding=saved.padding)
    saved.check_tokenizer(encoder.tokenizer.fingerprint)
    context = encoder.encode(encoder.tokenize(["a red circle on the left"])).context
    expected = read_tensors(FILES / "expected.safetensors")[0]["t5_reference"]
    torch.testing.assert_close(context, expected, rtol=1e-4, atol=1e-5)


def test_a_reference_to_the_t5_of_a_former_version_finds_it():
    former, current = WEIGHTS / "earlier_0.4.0" / "t5.safetensors", weights_path("t5.safetensors")
    assert edition_of_tokens(read_tensors(former)[0]["shared.weight"]) == NEW
    saved = read_text_encoder(FILES / "t5_reference.safetensors")
    assert replace(saved, t5_sha256=file_hash(former)).find_t5([WEIGHTS]) == former
    assert replace(saved, t5_sha256=file_hash(current)).find_t5([WEIGHTS]) == current
    encoders = [load_t5(path, saved.projection, padding=saved.padding) for path in (former, current)]
    assert encoders[0].tokenizer.fingerprint == encoders[1].tokenizer.fingerprint
    tokens = encoders[0].tokenize(["a red circle on the left"])
    assert not torch.equal(*(encoder.encode(tokens).context for encoder in encoders))


def test_what_is_made_now_says_what_it_was_made_with(tmp_path, pictures):
    short = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3}
    train_lora(build_demo_model(), pictures, LoraConfig(run_name="l", rank=1, alpha=1.0, **short), tmp_path)
    train_embedding(build_demo_model(), pictures, EmbeddingConfig(run_name="e", token="<x>", **short), tmp_path)
    main = tmp_path / "l" / "l.safetensors"
    files = [
        tmp_path / "l" / "lora.safetensors",
        main,
        tmp_path / "converted.safetensors",
        tmp_path / "cut.safetensors",
    ]
    convert_lora(ConvertLoraConfig(lora=main, output=files[2], format="diffusers"))
    resize_lora(ResizeLoraConfig(lora=main, output=files[3], rank=1))
    files += (tmp_path / "e" / "embeddings").iterdir()
    assert len(files) == 5
    assert {read_tensors(file)[1][BASE] for file in files} == {EDITIONS[-1].unet}
    word = read_embedding(files[-1])
    vocabularies = build_demo_model().text_encoder.vocabularies
    concept = Concept("<x>", assign_to_encoders(word, vocabularies))
    assert "made for" not in embedding_report([word], concept, vocabularies)
    (pickled,) = save_embedding(tmp_path, Embedding((concept,), {"model": EDITIONS[-1].unet}), "A1111 pt")[0]
    assert read_embedding(pickled).metadata[BASE] == EDITIONS[-1].unet
