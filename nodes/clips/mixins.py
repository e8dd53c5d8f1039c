"""Methods added to an object of ComfyUI whose class is only known when it is there."""

from __future__ import annotations

from functools import cache


def add_mixin(instance, mixin: type):
    """The same object, its class a subclass of its present one in which the methods of `mixin` come first.

    ComfyUI's `CLIP.clone` makes a plain CLIP, so that a mixin's `clone` adds the mixin again.
    """
    if not isinstance(instance, mixin):
        instance.__class__ = _subclass(mixin, type(instance))
    return instance


@cache
def _subclass(mixin: type, base: type) -> type:
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
