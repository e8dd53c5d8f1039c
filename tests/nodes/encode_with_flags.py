"""Run by test_t5_flags.py in a process of its own: `encode_with_flags.py <ComfyUI> [its flags]`.

Encodes prompts with T5 CLIPs, all weights loaded, half of them left behind, and all of them left behind, and writes
{"flags": what ComfyUI made of them, "digests": {"<clip>, <loaded>": sha256 of the encodings' bytes}} as its last line.
"""

import hashlib
import json
import sys

import torch

torch.set_num_threads(1)
TEXTS = ["a red circle", "two small (blue:1.3) squares on a green ground, and a star", ""]


def parse_flags(flags):
    """As main.py does; ComfyUI refuses --cpu beside --lowvram and --novram, so the CPU is chosen afterwards."""
    import comfy.options

    comfy.options.enable_args_parsing()
    sys.argv = ["main.py", *flags]
    from comfy.cli_args import args

    args.cpu = True


def t5_clips():
    """(name, comfy.sd.CLIP) of the demo's T5 in the ways that it is used."""
    from retune.nodes.clips.t5_clip import load_t5_clip
    from retune.nodes.common.demo_model import load_demo
    from retune.training.text_encoder.projection import Projection

    _, clip, _ = load_demo()
    plain = load_t5_clip("demo", Projection(96, 128))
    yield "plain", plain
    yield "fp16", load_t5_clip("demo", Projection(96, 128), dtype="fp16")
    yield "SDXL", load_t5_clip("demo", Projection(96, 2048, pooled_width=1280))
    yield "beside CLIP", load_t5_clip("demo", Projection(96, 128, "resampler", tokens=8, layers=2), keep_clip=clip)
    patched = plain.clone()
    key = "t5base.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    shape = plain.cond_stage_model.get_parameter(key).shape
    patched.add_patches({key: ("diff", (torch.randn(shape, generator=torch.Generator().manual_seed(0)),))}, 0.1)
    yield "LoRA", patched


def leaving_behind(clip, share):
    """A clone that, whenever ComfyUI has loaded it, gives back a share of its weights: they are cast when used."""
    from comfy.patcher_extension import CallbacksMP

    def give_back(patcher, *_):
        patcher.partially_unload(patcher.offload_device, share * patcher.model_size())

    clone = clip.clone()
    clone.patcher.add_callback(CallbacksMP.ON_LOAD, give_back)
    return clone


def digest(clip):
    found = hashlib.sha256()
    for text in TEXTS:
        for part in clip.encode_from_tokens(clip.tokenize(text), return_pooled=True):
            if part is not None:
                found.update(repr(part.shape).encode() + part.float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def main(comfyui, *flags):
    sys.path.insert(0, comfyui)
    parse_flags(flags)
    import comfy.model_management as management

    digests = {}
    with torch.inference_mode():
        for name, clip in t5_clips():
            digests[f"{name}, loaded"] = digest(clip)
            assert not clip.cond_stage_model.model_lowvram
            for share in (0.5, 1.0):
                management.unload_all_models()  # what a clone has loaded is not loaded again
                partial = leaving_behind(clip, share)
                digests[f"{name}, {share:.0%} left behind"] = digest(partial)
                assert partial.cond_stage_model.model_lowvram
                assert partial.patcher.loaded_size() <= (1 - share) * partial.patcher.model_size() + 2**16
            digests[f"{name}, loaded again"] = digest(clip)
    made = {"state": management.vram_state.name, "smart memory": not management.DISABLE_SMART_MEMORY}
    sys.stdout.write("\n" + json.dumps({"flags": made, "digests": digests}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
