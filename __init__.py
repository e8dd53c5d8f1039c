"""Retune: change how a text-to-image model listens. ComfyUI loads this file; everything heavy is imported lazily."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    from .nodes import RetuneExtension

    return RetuneExtension()
