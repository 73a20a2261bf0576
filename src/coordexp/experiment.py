"""The composition root: the one module where configuration meets components.

A run is a chain of stages that meet in files: data -> model -> train -> predict -> evaluate -> report.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from coordexp.config.load import differing_keys, dump_config, load_config, to_plain
from coordexp.config.schema import ExperimentConfig
from coordexp.errors import ConfigError, DataError, RunStopped
from coordexp.grammar import Geometry
from coordexp.predicting import evaluate_predictions, predict_records, probe, progress_bar
from coordexp.preflight import check_folder, check_records, check_training, preflight
from coordexp.runs.manifest import RunDirectory, Status
from coordexp.terminal import Terminal

STAGES = ("data", "model", "train", "predict", "evaluate", "report")


def run(
    config: ExperimentConfig,
    run_dir: Path,
    *,
    command: list[str],
    overwrite: bool = False,
    resume: bool = False,
    until: str | None = None,
    console: Console | None = None,
) -> tuple[str, ...]:
    """Run an experiment from its data to its report; returns the expectations of the file that were missed.

    ``until`` names the last stage. The manifest says at every moment how far the run is; an
    interrupted or failed run is marked as such. ``resume`` continues such a run at the stage it stopped in. Under torchrun or
    accelerate every process calls this; they share the training stage, the rest is the first one's.

    Raises:
        CoordexpError: whatever the user can mend; nothing is left half-written under a final name.
        RunStopped: SIGTERM or Ctrl-C while training; a checkpoint was saved.
    """
    if until is not None and until not in STAGES:
        raise ConfigError(f"unknown stage {until!r}: expected one of {', '.join(STAGES)}")
    preflight(config)
    processes = _join()
    planned = STAGES if until is None else STAGES[: STAGES.index(until) + 1]
    if "train" in planned:
        check_training(config)
    console = console or Terminal(quiet=not processes.first)
    wanted = planned
    if processes.first:
        directory = _directory(config, run_dir, command, overwrite=overwrite, resume=resume)
        wanted = directory.remaining(planned) if resume else planned
        if not wanted:
            console.print(f"{run_dir}: nothing to resume, {planned[-1]} was the last stage and is done", soft_wrap=True)
    processes.wait()
    if not processes.first:
        directory = RunDirectory.open(run_dir, writes=False)
    wanted = processes.share(wanted)
    chain = _Chain(config, directory, console, resume, evaluated="evaluate" in planned)
    status: Status = "failed"
    try:
        with _termination():
            for stage in wanted:
                console.print(f"[{planned.index(stage) + 1}/{len(planned)}] {stage}", style="bold")
                with directory.stage(stage):
                    if processes.first or stage == "train":
                        getattr(chain, stage)()
                    if stage in ("data", "model"):
                        processes.wait()
                if stage == "train":
                    processes.leave()
                    if not processes.first:
                        return ()
        status = "complete"
    except (KeyboardInterrupt, RunStopped):
        status = "interrupted"
        console.print(f"{run_dir} is incomplete: the same command with --resume goes on, with --overwrite starts again", soft_wrap=True)
        raise
    finally:
        directory.finish(status)
    if "report" in wanted:
        # The report embeds the manifest, so it is written once more when the run is complete.
        chain.report()
        return chain.headline()
    return ()


def _join() -> Any:
    """The processes of this start; alone, nothing heavy is loaded for it."""
    from coordexp.train.processes import Processes

    return Processes.join()


def _directory(config: ExperimentConfig, run_dir: Path, command: list[str], *, overwrite: bool, resume: bool) -> RunDirectory:
    """A new run directory, or the one to go on with.

    Raises:
        ConfigError: resuming what is no run, or a run of another configuration.
    """
    if not resume:
        return RunDirectory.create(run_dir, name=config.name, config_yaml=dump_config(config), command=command, overwrite=overwrite)
    if not (run_dir / "manifest.json").is_file():
        raise ConfigError(f"{run_dir}: no run to resume (no manifest.json): leave --resume out to start one")
    directory = RunDirectory.open(run_dir)
    before = to_plain(load_config(run_dir / "config.yaml"))
    # Where the folder lies does not change the run.
    changed = [line for line in differing_keys(before, to_plain(config)) if not line.startswith("output_dir:")]
    if changed:
        raise ConfigError([f"{run_dir}: --resume needs the configuration the run began with: {line}" for line in changed])
    directory.resume(command)
    return directory


@contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM outside of training ends the run in good order too; training has its own way."""

    def stop(signum: int, frame: Any) -> None:
        raise RunStopped(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Chain:
    """The stages; each reads what the one before wrote."""

    config: ExperimentConfig
    directory: RunDirectory
    console: Console
    resume: bool = False
    evaluated: bool = True

    def _clear(self, *names: str) -> None:
        """What a stage that was stopped half-way left of its output."""
        for name in names:
            path = self._root / name
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)

    def _say(self, text: str) -> None:
        self.console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)

    @property
    def _root(self) -> Path:
        return self.directory.path

    def _split(self, name: str) -> Path:
        return self._root / "data" / f"{name}.jsonl"

    def data(self) -> None:
        """Make or import the data, read every record and check its image once."""
        from coordexp.data.records import verify_images

        data = self.config.data
        self._clear("data")
        with progress_bar(self.console, "images") as progress:
            if data.kind == "synth":
                from coordexp.data.synthetic import write_scenes

                write_scenes(self._root / "data", data.synth, progress)
            elif data.kind == "voc":
                from coordexp.data.importers.base import ImportOptions
                from coordexp.data.importers.formats import import_data

                assert data.source is not None
                options = ImportOptions(on_invalid=data.on_invalid)
                report = import_data("voc", Path(data.source), self._root / "data", options, progress=progress)
                for kind, lines in (("warning", report.warnings), ("left out", report.dropped)):
                    for line in lines:
                        self._say(f"{kind}: {line}")
                        self.directory.note(f"{kind}: {line}")
            else:
                assert data.source is not None
                (self._root / "data").symlink_to(Path(data.source).resolve(), target_is_directory=True)
        kept: dict[str, list[Any]] = {}
        for name in ("train", "val", "test"):
            records = self._records(name, quiet=False)
            # Made scenes were written a moment ago; other people's images are decoded once, up front.
            if data.kind != "synth":
                verify_images(records)
            kept[name] = records
            self.directory.add_file(f"data/{name}.jsonl")
        self._say(", ".join(f"{len(records)} {name}" for name, records in kept.items()) + " images")
        for note in check_records(self.config, kept, evaluated=self.evaluated):
            self._say(note)
            self.directory.note(note)

    def _records(self, split: str, *, quiet: bool = True) -> list[Any]:
        from coordexp.data.records import read_records

        data = self.config.data
        limit = {"train": data.max_train, "val": data.max_val, "test": data.max_test}[split]
        file = read_records(self._split(split), on_invalid=data.on_invalid, limit=limit)
        for reason in () if quiet else file.skipped:
            self._say(f"left out: {reason}")
            self.directory.note(f"left out: {reason}")
        if not file.records:
            raise DataError(f"{self._split(split)}: no usable record: nothing to {'train on' if split == 'train' else 'evaluate'}")
        return list(file.records)

    def model(self) -> None:
        """Make or take the model, give it coordinate tokens, write it to ``model/``."""
        from coordexp.modeling.extend import extend_model
        from coordexp.modeling.load import link_model_folder, load_tokenizer
        from coordexp.modeling.manifest import CHECKPOINT_MANIFEST
        from coordexp.modeling.tiny import write_tiny_model
        from coordexp.vocab.adapters import is_adapter
        from coordexp.vocab.coord_vocab import CoordVocab

        self._clear("tiny", "model")
        source = self.config.model.path
        base = write_tiny_model(self._root / "tiny", self.config.model.tiny) if source is None else Path(source)
        if not self.config.vocab.extend:
            CoordVocab.from_tokenizer(load_tokenizer(base))
        # An adapter is merged into a folder of its own: the next adapter's base must be a whole model.
        if self.config.vocab.extend or is_adapter(base):
            self._say(str(extend_model(base, self._root / "model", self.config.vocab)))
        else:
            link_model_folder(base, self._root / "model")
        if not self.config.model.keep_contract:
            (self._root / "model" / CHECKPOINT_MANIFEST).unlink(missing_ok=True)
        self._record_contract(self._root / "model")

    def _record_contract(self, folder: Path) -> None:
        """Fix the image size in the folder's own files and write ``coordexp.json``; every checkpoint gets a copy of both."""
        from coordexp.data.answers import answer_geometries
        from coordexp.data.staging import atomic_text
        from coordexp.modeling.load import pixel_budget, write_pixel_budget
        from coordexp.modeling.manifest import CHECKPOINT_MANIFEST, CheckpointManifest
        from coordexp.vocab.coord_vocab import CoordVocab

        template = self._template(folder)
        write_pixel_budget(folder, template.image_processor)
        low, high = pixel_budget(template.image_processor)
        manifest = CheckpointManifest(
            convention=template.codec.convention,
            num_bins=template.codec.num_bins,
            coord_start=CoordVocab.from_tokenizer(template.tokenizer, template.codec.num_bins).start,
            order=template.order,
            geometries=answer_geometries(self._records("train"), self.config.data.geometry),
            prompt=template.prompt,
            min_pixels=low,
            max_pixels=high,
            versions=self.directory.manifest["versions"],
        )
        with atomic_text(folder / CHECKPOINT_MANIFEST) as file:
            file.write(manifest.text())

    def _template(self, folder: Path) -> Any:
        from coordexp.data.template import ChatTemplate
        from coordexp.modeling.load import load_image_processor, load_tokenizer

        options = self.config.model
        check_folder(self.config, folder)
        return ChatTemplate(
            tokenizer=load_tokenizer(folder),
            image_processor=load_image_processor(folder, min_pixels=options.min_pixels, max_pixels=options.max_pixels),
            prompt=self.config.data.prompt,
            order=self.config.data.order,
            seed=self.config.seed,
            geometry=self.config.data.geometry,
        )

    def _geometries(self) -> tuple[Geometry, ...]:
        """What answers hold, by the contract that the model stage wrote."""
        from coordexp.modeling.manifest import read_checkpoint_manifest

        contract = read_checkpoint_manifest(self._root / "model")
        assert contract is not None
        return contract.geometries

    def train(self) -> None:
        """Train, log, save checkpoints and the final model under ``checkpoints/``."""
        from transformers import set_seed

        from coordexp.modeling.load import load_model
        from coordexp.plan.planner import memory_line
        from coordexp.train.launch import train

        if self.resume and (self._root / "checkpoints" / "final").is_dir():
            return
        folder = self._root / "model"
        template, held_out, geometries = self._template(folder), self._records("val"), self._geometries()
        records = self._records("train")
        if not self.console.quiet:
            self._say(memory_line(self.config, folder, (records, held_out)))
        set_seed(self.config.seed)
        model = load_model(folder, self.config.model, quantization=self.config.model.quantization)
        if self.config.model.liger:
            from coordexp.modeling.liger import use_liger

            use_liger(model)
        train(
            self.config.train,
            objective=self.config.objective,
            model=model,
            template=template,
            train_records=records,
            eval_records=held_out,
            run_dir=self._root,
            processor_from=folder,
            header={key: self.directory.manifest[key] for key in ("config_sha256", "git", "versions")},
            seed=self.config.seed,
            console=self.console,
            packing=self.config.data.packing,
            adapter=self.config.adapter,
            metrics=self.config.token_type_metrics,
            resume=self.resume,
            probe=partial(
                probe, template=template, records=held_out[: self.config.train.probe_samples], options=self.config.decode,
                geometries=geometries,
            ),
        )

    def predict(self) -> None:
        """Generate on the test split with the final model."""
        from coordexp.modeling.load import choose_device, load_model

        folder = self._root / "checkpoints" / "final"
        model = load_model(folder, self.config.model).to(choose_device("auto"))
        records = self._records("test")
        done = predict_records(
            model, self._template(folder), records, self._root / "predictions.jsonl", self.config.decode, self.console,
            geometries=self._geometries(),
        )  # fmt: skip
        if done.finished:
            self._say(f"the predictions of {len(records)} images were finished before")
        else:
            self._say(f"{done.boxes} objects on {len(records)} images, {done.boxes / done.seconds:.1f} objects/s")

    def evaluate(self) -> None:
        """Compare predictions with the test split."""
        evaluate_predictions(self._root / "predictions.jsonl", self._test_file(), self.config.evaluate, out=self._root)

    def _test_file(self) -> Path:
        """The records that predictions were made for: the split, or the lines of it that were used."""
        lines = self._split("test").read_text(encoding="utf-8").splitlines(keepends=True)
        used = [int(record.source.rpartition(":")[2]) for record in self._records("test")]
        if len(used) == sum(bool(line.strip()) for line in lines):
            return self._split("test")
        subset = self._root / "test-used.jsonl"
        subset.write_text("".join(lines[number - 1] for number in used), encoding="utf-8")
        return subset

    def report(self) -> None:
        """Write ``audit.json`` and ``report.html``, which shows its findings."""
        from coordexp.runs.audit import audit_run
        from coordexp.runs.report import write_report

        audit_run(self._root)
        write_report(self._root, self.config.report)

    def headline(self) -> tuple[str, ...]:
        """Print the headline numbers, what the file expected of them, and where the report is; return what was missed."""
        from coordexp.evaluate.result import best_readout, headline

        results = json.loads((self._root / "results.json").read_text(encoding="utf-8"))
        self.console.print()
        for label, value in headline(results):
            self._say(f"{label:<44} {value}")
        missed = []
        for key, least in self.config.evaluate.expect.items():
            value = results.get(key.replace(".best.", f".{best_readout(results)}."))
            reached = value is not None and value >= least
            verdict = "reached" if reached else "MISSED"
            self._say(f"{verdict}: {key} = {'undefined' if value is None else f'{value:.3f}'}, expected at least {least:g}")
            missed += [] if reached else [key]
        self._say(f"report: {os.path.relpath(self._root / 'report.html')}")
        return tuple(missed)
