"""bitsandbytes' advice on a package for 4-bit products on a CPU, which concerns no training."""

import logging
import subprocess
import sys

from retune.training.common.advice import KERNELS, without_kernels_advice

FIRST_IMPORT = """
import torch
from retune.training.config.lora import LoraConfig
from retune.training.trainables.lora import _lycoris_module
_lycoris_module("layer", torch.nn.Linear(4, 4), LoraConfig(run_name="r", rank=2), 0)
"""


def test_the_first_training_says_nothing_of_kernels(tmp_path):
    done = subprocess.run([sys.executable, "-c", FIRST_IMPORT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels" not in done.stdout + done.stderr


def test_that_logger_speaks_again_afterwards(caplog):
    with without_kernels_advice():
        logging.getLogger(KERNELS).warning("inside")
    logging.getLogger(KERNELS).warning("after")
    assert [record.message for record in caplog.records] == ["after"]
