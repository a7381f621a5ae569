"""timm's encoders: the contract in a process where timm is, and what is said where it is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TimmWrapperConfig

from commvlm.model import CheckpointError, find_checkpoint
from commvlm.model.families import family_of

FOLDER = Path(sys.prefix) / "timm"
"""Apart from the environment itself: torchvision, which timm imports, would break the library's own processors there."""


def test_timms_vision_transformers_keep_the_contract():
    if not (FOLDER / "timm").is_dir():
        pytest.skip("timm is not installed for the tests; `make setup` does that")
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER), str(here), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "timm_cases.py"]
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_without_timm_the_extra_is_named(tmp_path):
    """As it is in this process."""
    config = TimmWrapperConfig(architecture="eva02_large_patch14_clip_336")
    with pytest.raises(ValueError, match=r"pip install 'commvlm\[timm\]'") as error:
        family_of(config).depth(config)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(
        '{"architecture": "eva02_large_patch14_clip_336", "model_type": "timm_wrapper"}'
    )
    with pytest.raises(CheckpointError, match=r"pip install 'commvlm\[timm\]'"):
        find_checkpoint(str(tmp_path))
