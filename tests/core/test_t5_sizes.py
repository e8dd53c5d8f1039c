"""Every published T5 size: a file of its true layout and widths gives the states of transformers' own encoder.

Widths, heads, kinds and vocabularies are those of the published config.json files, weights are random, and the depth is
cut to two blocks. Up to "base" the file is the whole encoder-decoder as it was published; above, the encoder alone, as
those sizes are shared for image models.
"""

from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from retune.training.text_encoder.t5 import t5_model
from retune.training.text_encoder.t5_file import read_t5
from safetensors.torch import save_file

TOKENS = 140  # past the 128 positions at which the distance buckets end
RELU = {"feed_forward_proj": "relu", "tie_word_embeddings": True}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

# name: (d_model, d_ff, d_kv, heads)
V1_1 = {
    "small": (512, 1024, 64, 6),
    "base": (768, 2048, 64, 12),
    "large": (1024, 2816, 64, 16),
    "XL": (2048, 5120, 64, 32),
    "XXL": (4096, 10240, 64, 64),
}
V1_0 = {
    "small": (512, 2048, 64, 8),
    "base": (768, 3072, 64, 12),
    "large": (1024, 4096, 64, 16),
    "3B": (1024, 16384, 128, 32),
    "11B": (1024, 65536, 128, 128),
}
BYTES = {
    "small": (1472, 3584, 64, 6),
    "base": (1536, 3968, 64, 12),
    "large": (1536, 3840, 64, 16),
    "XL": (2560, 6720, 64, 32),
    "XXL": (4672, 12352, 64, 64),
}


@dataclass(frozen=True)
class Family:
    """Checkpoints that differ in size alone. model: how transformers' classes of the family begin."""

    model: str
    vocabulary: int
    kind: dict
    sizes: dict[str, tuple[int, int, int, int]]

    def config(self, size: str):
        d_model, d_ff, d_kv, heads = self.sizes[size]
        # In two bytes a number the table alone would take 1 or 2 GB: slow to write and to hash, no different to read.
        vocabulary = 40_000 if size in ("XL", "XXL") and self.vocabulary > 200_000 else self.vocabulary
        widths = {"d_model": d_model, "d_ff": d_ff, "d_kv": d_kv, "num_heads": heads, "vocab_size": vocabulary}
        return getattr(hf, self.model + "Config")(**widths, **self.kind, num_layers=2, num_decoder_layers=2)

    def build(self, size: str, suffix: str):
        """The model on the meta device."""
        with torch.device("meta"):
            return getattr(hf, self.model + suffix)(self.config(size))


FAMILIES = {
    "v1.0": Family("T5", 32128, RELU, V1_0),
    "v1.1, flan, lm-adapt": Family("T5", 32128, GATED, V1_1),
    "Pile-T5": Family("UMT5", 32128, GATED, {size: V1_1[size] for size in ("base", "large", "XL", "XXL")}),
    "mT5": Family("MT5", 250112, GATED, V1_1),
    "UMT5": Family("UMT5", 256384, GATED, {size: V1_1[size] for size in ("small", "base", "XL", "XXL")}),
    "ByT5": Family("T5", 384, GATED, BYTES),
}
QUICK = {("v1.0", "small"), ("v1.1, flan, lm-adapt", "small"), ("Pile-T5", "base"), ("ByT5", "small")}
CASES = [
    pytest.param(family, size, id=f"{family} {size}", marks=[] if (family, size) in QUICK else pytest.mark.slow)
    for family, about in FAMILIES.items()
    for size in about.sizes
]


def random_weights(model, cheap_noise):
    """bfloat16 tensors of a model without its tied names. Every part is large enough to change the output."""
    state = {}
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        if name.endswith("embed_tokens.weight") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        values = cheap_noise(tensor.shape, seed) * scale_of(name, tensor.shape, model.config.d_kv)
        state[name] = (1 + 0.1 * values if "layer_norm" in name else values).bfloat16()
    return state


def scale_of(name, shape, d_kv):
    """What keeps the states and the attention's scores near one; T5 does not divide the scores by sqrt(d_kv)."""
    if "layer_norm" in name or "shared" in name or "relative_attention_bias" in name:
        return 1.0
    return shape[1] ** -0.5 * (d_kv**-0.5 if ".q." in name else 1.0)


@torch.no_grad()
def states_of(encoder):
    """States of random tokens, the last one of the vocabulary among them, before three masked pads."""
    ids = torch.randint(3, encoder.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    ids[0, 5] = encoder.config.vocab_size - 1
    mask = (torch.arange(TOKENS) < TOKENS - 3).long()[None]
    return encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0, : TOKENS - 3]


def reference(family, size, weights):
    """transformers' encoder of the published configuration, in fp32."""
    encoder = family.build(size, "EncoderModel")
    named = {name: weights["shared.weight" if "embed_tokens" in name else name] for name in encoder.state_dict()}
    state = {name: tensor.float() for name, tensor in named.items() if "embed_tokens" not in name}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    encoder.load_state_dict(state, assign=True)
    return encoder.eval()


@pytest.fixture
def file(tmp_path):
    """Goes away after the test: pytest keeps the folders of three runs, and the largest files are a gigabyte."""
    path = tmp_path / "t5.safetensors"
    yield path
    path.unlink()


@pytest.mark.parametrize("family, size", CASES)
def test_equals_transformers(family, size, file, cheap_noise):
    family = FAMILIES[family]
    published = "ForConditionalGeneration" if size in ("small", "base") else "EncoderModel"
    weights = random_weights(family.build(size, published), cheap_noise)
    save_file(weights, file)
    expected = states_of(reference(family, size, weights))
    del weights
    found = states_of(t5_model(read_t5(file)))
    assert expected.std() > 0.3
    assert (found - expected).abs().max() < 1e-4
