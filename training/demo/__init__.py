"""The demo model: a complete small text-to-image model, the drawn scenes it knows, and a judge that reads them back.

`scenes` draws captioned pictures, `judge` reads the caption's attributes from pixels, `build` trains the weights
(`python -m retune.training.demo.build`), `files` finds them.
"""
