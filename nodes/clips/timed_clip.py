"""A CLIP whose prompts become one conditioning for each range of noise levels, as a timestep resampler needs.

Stock nodes that encode a prompt call `encode_from_tokens_scheduled`, and samplers pick what is due by `start_percent`
and `end_percent`, as with ComfyUI-ELLA. Where one conditioning alone is asked for it is that of the middle.
"""

from __future__ import annotations

from functools import cache

import torch


def timed(clip):
    """The same CLIP, its schedule by time; its clones too."""
    clip.__class__ = _timed_class()
    return clip


def spans(bands: int, start: float = 0.0, end: float = 1.0) -> list[tuple[float, float, float]]:
    """(time, start_percent, end_percent) of every band that a range of percents touches, cut to it; noisiest first.

    time is the middle of the band as a share of the training timesteps, 1 - percent.
    """
    found = []
    for band in range(bands):
        first, last = max(start, band / bands), min(end, (band + 1) / bands)
        if first < last:
            found.append((1 - (band + 0.5) / bands, first, last))
    return found


@cache
def _timed_class() -> type:
    import comfy.sd

    class TimedCLIP(comfy.sd.CLIP):
        def clone(self, *args, **options):
            return timed(super().clone(*args, **options))

        def encode_from_tokens_scheduled(self, tokens, unprojected=False, add_dict=None, show_pbar=True):
            """T5 runs once, its projection once for each band; an empty range of percents gives nothing."""
            more, model = dict(add_dict or {}), self.cond_stage_model
            bands = self.patcher.get_model_object("projection").projection.bands
            if not bands:  # another projection was put into a clone
                return super().encode_from_tokens_scheduled(tokens, unprojected, more, show_pbar)
            result = []
            with model.remembering(not self.use_clip_schedule):
                for time, start, end in spans(bands, more.pop("start_percent", 0.0), more.pop("end_percent", 1.0)):
                    model.retune_time = torch.tensor([time])
                    span = {**more, "start_percent": start, "end_percent": end}
                    result += super().encode_from_tokens_scheduled(tokens, unprojected, span, show_pbar=False)
            return result

    return TimedCLIP
