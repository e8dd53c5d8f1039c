"""Methods added to single objects of ComfyUI, such as one CLIP or tokenizer."""

from __future__ import annotations

from functools import cache


def add_mixin(instance, mixin: type):
    """Replaces the class of an object by a subclass in which the methods of `mixin` come first; returns the object.

    ComfyUI's `CLIP.clone` makes a plain CLIP, so the `clone` of a CLIP's mixin must add the mixin again.
    """
    if not isinstance(instance, mixin):
        instance.__class__ = _subclass(mixin, type(instance))
    return instance


@cache
def _subclass(mixin: type, base: type) -> type:
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
