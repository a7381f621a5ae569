"""Similarity maps and principal components of features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from commvlm.cli import main
from commvlm.data.geometry import PadSquare
from commvlm.probe import maps


class TestMaps:
    def test_cosines_and_the_patch_of_a_point(self):
        tokens = torch.randn(16, 5)
        found = maps.similarity(tokens, 3).numpy()
        raw = tokens.numpy()
        expected = [a @ raw[3] / np.linalg.norm(a) / np.linalg.norm(raw[3]) for a in raw]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        view = PadSquare(64, 32)
        assert maps.patch_at((0, 0), view, (4, 4)) == 4  # the padding is above
        assert maps.patch_at((63.9, 31.9), view, (4, 4)) == 11
        with pytest.raises(ValueError, match="is not in the image"):
            maps.patch_at((0, 32), view, (4, 4))

    def test_principal_components_are_those_of_the_covariance_whatever_the_sign(self):
        tokens = torch.randn(50, 6) * torch.tensor([9.0, 5, 3, 0.1, 0.1, 0.1])
        found = maps.principal(tokens)
        torch.testing.assert_close(found, maps.principal(tokens))
        _, axes = np.linalg.eigh(np.cov(tokens.numpy().T))
        for k in range(3):
            scores = tokens.numpy() @ axes[:, -1 - k]
            assert abs(np.corrcoef(scores, found[:, k].numpy())[0, 1]) > 0.97  # clipped at its ends
        assert 0 <= found.min() <= found.max() <= 1

    def test_they_are_drawn(self, tmp_path):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
        command = ["probe", "simmap", str(tmp_path / "a.png"), "--at", "20,10", "--encoders", "clip,twin=micro:dinov2"]
        assert main([*command, "--layers", "2,8", "--out", str(tmp_path / "m.png")]) == 0
        assert Image.open(tmp_path / "m.png").width > 800
        assert (
            main(["probe", "pca", str(tmp_path / "a.png"), "--encoders", "clip", "--out", str(tmp_path / "p.png")]) == 0
        )
        assert main([*command[:3], "--at", "20,90", "--encoders", "clip", "--out", str(tmp_path / "n.png")]) == 2
        assert not (tmp_path / "n.png").exists()
