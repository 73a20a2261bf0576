import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from coordexp.errors import ConfigError, DataError
from coordexp.runs import manifest
from coordexp.runs.manifest import RunDirectory, read_manifest

CONFIG = "name: a run\n"


def create(path: Path, **more: bool) -> RunDirectory:
    return RunDirectory.create(path, name="a run", config_yaml=CONFIG, command=["/opt/env/bin/coordexp", "run", "/data/x.yaml"], **more)


def on_disk(run: RunDirectory) -> dict[str, object]:
    content = json.loads((run.path / "manifest.json").read_text())
    assert isinstance(content, dict)
    return content


def test_new_run_is_running_with_its_config(tmp_path: Path) -> None:
    run = create(tmp_path / "deep" / "run")
    content = on_disk(run)
    assert content["schema"] == 1
    assert content["status"] == "running"
    assert content["finished"] is None
    assert content["config_sha256"] == hashlib.sha256((run.path / "config.yaml").read_bytes()).hexdigest()
    assert (run.path / "config.yaml").read_text() == CONFIG
    assert content["command"] == ["coordexp", "run", "/data/x.yaml"]
    assert sorted(p.name for p in run.path.iterdir()) == ["config.yaml", "manifest.json"]


def test_directory_in_use_is_refused_with_its_status(tmp_path: Path) -> None:
    run = create(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.stage("train"):
        raise KeyboardInterrupt
    with pytest.raises(ConfigError, match=r"status 'running' in stage 'train'.*another output_dir.*--overwrite"):
        create(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"expected JSON.*left as it is"):
            create(tmp_path, overwrite=overwrite)


def test_overwrite_removes_a_run_but_no_other_directory(tmp_path: Path) -> None:
    (create(tmp_path / "run").path / "results.json").write_text("{}")
    assert not (create(tmp_path / "run", overwrite=True).path / "results.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="no run directory"):
        create(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(ConfigError, match="found a file"):
        create(tmp_path / "mine" / "thesis.txt")


def test_stage_is_named_while_it_runs_and_timed_when_it_ends(tmp_path: Path) -> None:
    run = create(tmp_path)
    with run.stage("data"):
        assert on_disk(run)["stage"] == "data"
    assert on_disk(run)["stage"] is None
    first = run.manifest["stages"]["data"]
    with run.stage("data"):
        pass
    assert run.manifest["stages"]["data"] >= first >= 0


def test_stopped_run_keeps_the_stage_it_stopped_in(tmp_path: Path) -> None:
    run = create(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.stage("train"):
        raise KeyboardInterrupt
    assert (on_disk(run)["status"], on_disk(run)["stage"]) == ("running", "train")
    run.finish("interrupted")
    content = on_disk(run)
    assert (content["status"], content["stage"]) == ("interrupted", "train")
    assert content["finished"] is not None
    run.finish("complete")
    assert on_disk(run)["stage"] is None


def test_notes_and_file_hashes_are_recorded_and_read_back(tmp_path: Path) -> None:
    run = create(tmp_path)
    (tmp_path / "predictions.jsonl").write_bytes(b"{}\n")
    run.note("one image was skipped")
    assert run.add_file("predictions.jsonl") == hashlib.sha256(b"{}\n").hexdigest()
    again = RunDirectory.open(tmp_path)
    assert again.manifest == run.manifest
    assert again.manifest["notes"] == ["one image was skipped"]
    with pytest.raises(DataError, match="found none"):
        run.add_file("results.json")


def test_unreadable_manifest_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="expected a JSON object"):
        read_manifest(tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(tmp_path)
    before = (tmp_path / "manifest.json").read_text()

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(manifest.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run.note("lost")
    assert (tmp_path / "manifest.json").read_text() == before


def test_git_state_is_the_commit_of_a_tracked_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    source = tmp_path / "module.py"
    source.write_text("a = 1\n")
    assert manifest.git_state(source) is None

    def git(*arguments: str) -> str:
        options = ["-c", "user.name=t", "-c", "user.email=t@example.invalid", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", str(tmp_path), *options, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert manifest.git_state(source) is None
    git("add", "module.py")
    git("commit", "-q", "-m", "one")
    assert manifest.git_state(source) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    source.write_text("a = 2\n")
    assert manifest.git_state(source) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert manifest.git_state(source) is None


def test_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PACKAGES", ("numpy", "no-such-package-of-ours"))
    assert sorted(manifest.versions()) == ["numpy", "python"]


def test_manifest_does_not_load_torch() -> None:
    code = (
        "import sys; from coordexp.runs import manifest; h = manifest.hardware(); "
        "assert h['cpu_count'] and 'cuda' not in h; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
