"""Starting a run's processes: here, and through submitit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_parallel import command, losses

from commvlm.cli import main
from commvlm.train import launch
from commvlm.train.keys import RecipeError


class TestOnThisMachine:
    @pytest.mark.slow
    def test_processes_share_a_run_and_an_error_is_one_line(self, world, tmp_path):
        """One run that goes well; then the finished folder with another recipe."""
        argv = [*command(world, tmp_path / "run", steps=2), "--processes", "2"]
        done = subprocess.run([sys.executable, "-m", "commvlm.cli", *argv], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
        assert done.stdout.strip().splitlines()[-1] == f"the model is in {tmp_path / 'run' / 'model'}"
        again = subprocess.run(
            [sys.executable, "-m", "commvlm.cli", *argv, "--train.seed", "7"], capture_output=True, text=True
        )
        assert again.returncode == 2
        said = [line for line in again.stderr.splitlines() if "error" in line.lower()]
        assert len(said) == 1, again.stderr
        assert "train.seed: 0 there, 7 now" in said[0]
        assert "Traceback" not in again.stderr


class TestOnACluster:
    @pytest.mark.slow
    def test_a_job_of_submitit_runs_the_command(self, world, tmp_path, capsys):
        pytest.importorskip("submitit")
        argv = command(world, tmp_path / "run", steps=2)
        assert main([*argv, "--submit", "local", "--processes", "2", "--cluster", "{timeout_min: 5}"]) == 0
        logs = tmp_path / "run-jobs"
        assert f"what it says is in {logs}" in capsys.readouterr().out
        end = time.monotonic() + 240
        while not (tmp_path / "run" / "run.json").exists() and time.monotonic() < end:
            time.sleep(0.2)
        said = [path.read_text() for path in sorted(logs.glob("*.err"))]
        assert (tmp_path / "run" / "run.json").exists(), said
        assert len(losses(tmp_path / "run")) == 2
        assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2

    def test_what_cannot_be_submitted_is_one_line(self, tmp_path, monkeypatch, capsys):
        pytest.importorskip("submitit")
        argv = ["train", "micro", "--out", str(tmp_path / "run")]
        assert main([*argv, "--submit", "local", "--nodes", "2"]) == 2
        assert "--nodes must be 1" in capsys.readouterr().err
        assert main([*argv, "--submit", "local", "--cluster", "{timeout: 5}"]) == 2
        assert "timeout" in capsys.readouterr().err
        assert main([*argv, "--submit", "local", "--cluster", "[5]"]) == 2
        assert "is no mapping" in capsys.readouterr().err
        assert main([*argv, "--submit", "slurm"]) == 2
        assert "no slurm takes jobs here" in capsys.readouterr().err

    def test_without_submitit_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "submitit", None)
        with pytest.raises(RecipeError, match=r"submitting needs submitit: pip install 'commvlm\[cluster\]'"):
            launch.submit(["train"], tmp_path, cluster="slurm", nodes=1, processes=1, options={})


class TestLaunchFiles:
    @pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
    def test_are_shell_scripts(self, name):
        path = Path(__file__).parents[1] / "launch" / name
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0

    @pytest.mark.parametrize(
        ("given", "meeting"),
        [
            ({"GPUS": "2"}, ["--standalone", "--nproc-per-node", "2"]),
            (
                {"GPUS": "4", "NODES": "2", "HEAD": "a:1"},
                [
                    "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "a:1", "--rdzv-id", "commvlm",
                    "--nproc-per-node", "4",
                ],
            ),
        ],
    )  # fmt: skip
    def test_torchrun_is_told(self, tmp_path, given, meeting):
        stub = tmp_path / "torchrun"
        stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        stub.chmod(0o755)
        script = Path(__file__).parents[1] / "launch" / "torchrun.sh"
        environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **given}
        said = subprocess.run(
            [str(script), "comm-7b", "--out", "a b"], env=environ, capture_output=True, text=True, check=True
        )
        assert said.stdout.splitlines() == [*meeting, "-m", "commvlm.cli", "train", "comm-7b", "--out", "a b"]
