"""A CLIP whose prompts become one conditioning for each range of noise levels, as a timestep resampler requires.

Stock nodes that encode a prompt call `encode_from_tokens_scheduled`, and samplers choose by `start_percent` and
`end_percent`, as with ComfyUI-ELLA. `encode_from_tokens` returns the conditioning of the middle of the range.
"""

from __future__ import annotations

import torch

from .mixins import add_mixin


def timed(clip):
    """The same CLIP, which from now on encodes a prompt once for each range of noise levels; so do its clones."""
    return add_mixin(clip, Timed)


def spans(bands: int, start: float = 0.0, end: float = 1.0) -> list[tuple[float, float, float]]:
    """Where a range of sampling meets the bands of a timestep resampler, noisiest band first.

    Args:
        bands: number of equal ranges into which the training timesteps are cut.
        start: first percent of sampling, 0..1.
        end: last percent of sampling, 0..1.

    Returns:
        (time, start_percent, end_percent) of every band that the range touches, cut to it. time is the middle of the
        band as a share of the training timesteps, 1 - percent.
    """
    touched = []
    for band in range(bands):
        first, last = max(start, band / bands), min(end, (band + 1) / bands)
        if first < last:
            touched.append((1 - (band + 0.5) / bands, first, last))
    return touched


class Timed:
    """Mixin of a CLIP: one conditioning for each band of its timestep resampler."""

    def clone(self, *args, **options):
        return timed(super().clone(*args, **options))

    def encode_from_tokens_scheduled(self, tokens, unprojected=False, add_dict=None, show_pbar=True):
        """T5 runs once and the projection once for each band; an empty range of percents returns an empty list."""
        more, model = dict(add_dict or {}), self.cond_stage_model
        bands = self.patcher.get_model_object("projection").projection.bands
        if not bands:  # a projection of another kind was put into a clone
            return super().encode_from_tokens_scheduled(tokens, unprojected, more, show_pbar)
        result = []
        with model.caching_states(not self.use_clip_schedule):
            for time, start, end in spans(bands, more.pop("start_percent", 0.0), more.pop("end_percent", 1.0)):
                model.retune_time = torch.tensor([time])
                span = {**more, "start_percent": start, "end_percent": end}
                result += super().encode_from_tokens_scheduled(tokens, unprojected, span, show_pbar=False)
        return result
