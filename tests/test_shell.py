"""What every verb has around its work: outputs that replace nothing else, `-`, `~`, encodings, pipes and signals."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from classify_data import tiny_checkpoint
from made_images import photographs
from smkd import api, distributed, processes
from smkd.classify import FewShotClassifier, encoder
from smkd.cli import app
from smkd.config.loading import check, resolve
from smkd.data.loader import worker_count
from smkd.errors import ConfigError, DataError, SmkdError, SmkdWarning

SMKD = [sys.executable, "-m", "smkd"]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: str | Path) -> str:
    result = run(*words)
    assert isinstance(result.exception, SmkdError), (result.output, result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    photographs(tmp_path / "support", (2, 2, 2))
    result = run("fit", tmp_path / "support", "-o", tmp_path / "clf.smkd", "--backbone", "pixels")
    assert result.exit_code == 0, (result.output, result.exception)
    return tmp_path


def features_file(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["all_feats"] = np.random.default_rng(0).normal(size=(60, 8)).astype("f4")
        file["all_labels"] = np.repeat(np.arange(6), 10)
        file["count"] = [60]
    return path


# ---- outputs


def test_a_photograph_is_never_the_file_to_write(place: Path) -> None:
    photos = sorted((place / "support").rglob("*.jpg")) or sorted((place / "support").rglob("*.png"))
    before = state(place)
    for option in ("--json", "--csv"):
        assert option in refused("predict", place / "clf.smkd", option, *photos)
    unlisted = place / "name"  # without its ending
    photos[0].rename(unlisted)
    assert "is left as it is" in refused("predict", place / "clf.smkd", "--json", unlisted, *photos[1:])
    unlisted.rename(photos[0])
    assert "does not end in .jpg" in refused("predict", place / "clf.smkd", "--json", place / "new.jpg", photos[0])
    assert state(place) == before


def test_no_option_replaces_an_input(place: Path) -> None:
    photo = next(path for path in (place / "support").rglob("*") if path.is_file())
    clf, before = place / "clf.smkd", state(place)
    other = place / "link.smkd"
    other.symlink_to(clf)
    hard = place / "hard.smkd"
    os.link(clf, hard)
    for output in (clf, place / "support" / ".." / "clf.smkd", other, hard):
        assert "read by the same call" in refused("predict", clf, photo, "--json", output)
    other.unlink()
    hard.unlink()
    assert "read by the same call" in refused("fit", place / "support", "-o", place / "support", "--backbone", "pixels")
    assert state(place) == before


@pytest.mark.parametrize("kind", ["image", "table", "settings", "features", "index", "text", "folder"])
def test_what_is_of_another_kind_is_left_alone(place: Path, kind: str) -> None:
    there = place / "there"
    if kind == "image":
        Image.new("RGB", (8, 8)).save(there, "PNG")
    elif kind == "features":
        features_file(there)
    elif kind == "index":
        assert run("index", place / "support", "-o", there, "--backbone", "pixels").exit_code == 0
    elif kind == "folder":
        there.mkdir()
    else:
        there.write_text({"table": "a,b\n1,2\n", "settings": '{"lr": 1}', "text": "notes"}[kind])
    photo = next(path for path in (place / "support").rglob("*") if path.is_file())
    before = state(place)
    for words in (
        ("predict", place / "clf.smkd", photo, "--json", there),
        ("predict", place / "clf.smkd", photo, "--csv", there),
        ("fit", place / "support", "--backbone", "pixels", "-o", there),
    ):
        assert re.search("is left as it is|it is a folder", refused(*words))
    assert state(place) == before


def test_what_the_same_option_wrote_is_replaced(place: Path) -> None:
    photo = next(path for path in (place / "support").rglob("*") if path.is_file())
    empty = place / "made.by.mktemp"
    empty.touch()
    for _ in range(2):
        for words in (
            ("predict", place / "clf.smkd", photo, "--json", place / "a.json", "--csv", place / "a.csv"),
            ("fit", place / "support", "--backbone", "pixels", "-o", place / "b.smkd"),
            ("index", place / "support", "--backbone", "pixels", "-o", place / "i.smkd"),
            ("predict", place / "clf.smkd", photo, "--json", empty),
        ):
            result = run(*words)
            assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(empty.read_text())["images"]


def test_outputs_are_looked_at_before_the_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smkd.classify.encoder.open_encoder", lambda *_: pytest.fail("worked"))
    words = ("index", place / "support", "--backbone", "pixels", "-o")
    assert "is left as it is" in refused(*words, next(p for p in (place / "support").rglob("*") if p.is_file()))
    assert "cannot go to standard output" in refused(*words, "-")
    assert not (place / "-").exists()
    assert "File name too long" in refused(*words, place / ("n" * 300))
    (place / "file").touch()
    assert "a file is there where a folder is needed" in refused(*words, place / "file" / "index.smkd")


def test_two_options_do_not_write_one_file(place: Path) -> None:
    photo = next(path for path in (place / "support").rglob("*") if path.is_file())
    for name in (place / "a", "-"):
        assert "--json and --csv are both" in refused(
            "predict", place / "clf.smkd", photo, "--csv", name, "--json", name
        )


def test_folders(place: Path) -> None:
    source = features_file(place / "run.h5")
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("years")
    before = state(place)
    figures = ("eval", source, "--shot", "1", "--episodes", "5", "--figures")
    assert "holds other things than pictures" in refused(*figures, place / "mine")
    assert f"holds '{source}'" in refused(*figures, place)
    assert "it is a file; give a folder" in refused(*figures, source.with_name("clf.smkd"))
    verify = ("data", "verify", place / "support", "--sheets")
    assert "lies in" in refused(*verify, place / "support" / "sheets")
    assert "other things" in refused("demo", "-o", place / "mine")
    assert "holds other things" in refused("adapt", place / "support", "--backbone", "x.pt", "-o", place / "mine")
    with pytest.raises(ConfigError, match=r"holds other things \('thesis.txt'\) and no run"):
        api.pretrain(resolve("debug-pretrain", [f"out={place / 'mine'}"]))
    assert state(place) == before


def test_a_run_does_not_clear_what_it_reads(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "photos" / "a").mkdir(parents=True)
    (out / "config.yaml").touch()
    for words in (["data=" + str(out / "photos")], ["init=" + str(out), "overwrite=true"]):
        with pytest.raises(ConfigError, match=r"out=.*run holds (data\.root|init)=.*, which the run reads"):
            api.pretrain(resolve("debug-pretrain", [f"out={out}", *words]))
    assert (out / "photos").is_dir()


def test_standard_output(place: Path) -> None:
    photo = next(path for path in (place / "support").rglob("*") if path.is_file())
    found = run("predict", place / "clf.smkd", photo, "--json", "-")
    assert [Path(each["image"]) for each in json.loads(found.stdout)["images"]] == [photo]
    assert str(photo) in found.stderr
    rows = list(csv.reader(io.StringIO(run("predict", place / "clf.smkd", photo, "--csv", "-").stdout)))
    assert rows[0][:2] == ["image", "answer"]
    assert len(rows) == 2
    source = features_file(place / "run.h5")
    words = ("--shot", "1", "--episodes", "5", "--json", "-")
    assert json.loads(run("eval", source, *words).stdout)["results"]
    assert json.loads(run("compare", source, "--head", "knn", "--head", "prototype", *words).stdout)["comparisons"]
    verified = run("data", "verify", place / "support", "--json", "-", "--processes", "1")
    assert json.loads(verified.stdout)["splits"]
    assert not list(place.rglob("-"))


# ---- home


def test_home_is_expanded_on_every_road(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(place)
    config = resolve(
        "debug-pretrain", ["out=~/run", "data=~/support", "init=~/x.pt", "data.cache=mmap", "data.cache_dir=~"]
    )
    places = (config.out, config.data.root, config.init, config.data.cache_dir)
    assert places == (place / "run", place / "support", place / "x.pt", place)
    assert check({"phase": "pretrain", "epochs": 1, "out": "~/run"}).out == place / "run"
    photo = next(path for path in (place / "support").rglob("*") if path.is_file())
    near = f"~/{photo.relative_to(place)}"
    for words in (
        ("fit", "~/support", "-o", "~/new.smkd", "--backbone", "pixels"),
        ("predict", "~/clf.smkd", near, "--json", "~/a.json", "--csv", "~/a.csv"),
        ("index", "~/support", "--out=~/i.smkd", "--backbone", "pixels"),
        ("search", "~/i.smkd", near),
        ("data", "verify", "~/support", "--sheets", "~/sheets", "--processes", "1"),
    ):
        result = run(*words)
        assert not isinstance(result.exception, SmkdError), (words, result.exception)
        assert result.exit_code in (0, 1)
    from smkd.classify import FewShotClassifier

    FewShotClassifier.load("~/clf.smkd").save("~/again.smkd")
    assert {"new.smkd", "a.json", "a.csv", "i.smkd", "sheets", "again.smkd"} <= {each.name for each in place.iterdir()}
    assert not (place / "~").exists()
    with pytest.raises(ConfigError, match="no user 'nobody-here'"):
        resolve("debug-pretrain", ["out=~nobody-here/run"])
    assert "no user 'nobody-here'" in refused("search", "~nobody-here/i.smkd", near)


# ---- standard streams


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_that_cannot_be_encoded_lose_nothing(place: Path, encoding: str) -> None:
    photo = next(path for path in (place / "support").rglob("*") if path.is_file())
    photo = photo.rename(photo.with_name("Łódź ±" + photo.suffix))
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    words = ["predict", str(place / "clf.smkd"), str(photo), "--json", str(place / "a.json"), "--reject", "0"]
    done = subprocess.run([*SMKD, *words], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert json.loads((place / "a.json").read_text())["images"][0]["image"] == str(photo)


def test_results_are_written_before_they_are_printed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise UnicodeEncodeError("ascii", "±", 0, 1, "cannot")

    monkeypatch.setattr("smkd.cli.fewshot._print", broken)
    source, out = features_file(place / "run.h5"), place / "a.json"
    for words in (["eval", source], ["compare", source, "--head", "knn", "--head", "prototype"]):
        out.unlink(missing_ok=True)
        result = run(*words, "--shot", "1", "--episodes", "5", "--json", out)
        assert isinstance(result.exception, UnicodeEncodeError)
        assert json.loads(out.read_text())


ODD = "a\nproblem: b\x1b[31m\u202egpj"
SHOWN = r"a\nproblem: b\x1b[31m\u202egpj"


@pytest.mark.slow
def test_names_never_break_a_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)  # tables fold what is long
    photo = next(path for path in (place / "support").rglob("*") if path.is_file())
    photo = photo.rename(photo.with_name(ODD + photo.suffix))
    features_file(place / f"{ODD}.h5")
    table = (f"{ODD}.h5", "--shot", "1", "--episodes", "5", "--seed", "1")
    for words in (
        ("predict", place / "clf.smkd", photo),
        ("index", place / "support", "-o", place / f"{ODD}.smkd", "--backbone", "pixels"),
        ("search", place / f"{ODD}.smkd", photo, "--top", "9"),
        ("eval", *table),
        ("eval", *table, "--markdown"),
        ("compare", *table, "--head", "knn", "--head", "prototype"),
        ("data", "verify", place / "support", "--processes", "1"),
    ):
        result = run(*words)
        assert result.exit_code in (0, 1), (words, result.exception)
        assert SHOWN in result.output or words[0] in ("compare", "data")
        assert not any(line.startswith("problem: b") for line in result.output.splitlines())
        assert "\x1b" not in result.output
    photo.write_bytes(b"")
    assert f"{SHOWN}{photo.suffix}': the file is empty" in run("predict", place / "clf.smkd", photo, place).stderr
    answers = json.loads(run("predict", place / "clf.smkd", place, "--json", "-").stdout)
    assert str(photo) in answers["unreadable"]  # as it is
    done = subprocess.run([*SMKD, "predict", place / "clf.smkd", photo], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"smkd: cannot read image '{photo.parent}/{SHOWN}{photo.suffix}': the file is empty\n"
    processes.show_warning(SmkdWarning(f"'{ODD}'"), SmkdWarning, "file.py", 1)
    assert capsys.readouterr().err == f"smkd: '{SHOWN}'\n"


@pytest.mark.slow
def test_a_closed_pipe_is_no_traceback() -> None:
    process = subprocess.Popen([*SMKD, "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    process.wait()
    assert told == b""


# ---- processes


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK=0 is set but WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK=x: should be"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK=2: .* from 0 to 1;"),
        ({"RANK": "0", "WORLD_SIZE": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "WORLD_SIZE=0: "),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "a"}, "MASTER_PORT=a: "),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1", "LOCAL_RANK": "-1"},
            "LOCAL_RANK=-1: ",
        ),
    ],
)  # fmt: skip
def test_half_of_torchruns_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        distributed.place()


def test_an_empty_rank_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "")
    assert distributed.place() is None


def test_a_killed_loading_process_is_named() -> None:
    told = RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")
    line = r"^process 4711, which reads images, was killed \(Killed\): out of memory\?"
    with pytest.raises(DataError, match=line), processes.deaths_named():
        raise told
    with pytest.raises(RuntimeError, match=r"^another$"), processes.deaths_named():
        raise RuntimeError("another")


def test_a_daemon_process_starts_no_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 8)
    assert processes.default_jobs() == 8
    current = processes.multiprocessing.current_process()
    monkeypatch.setitem(current._config, "daemon", True)  # type: ignore[attr-defined]
    assert processes.default_jobs() == 1
    assert processes.allowed(4) == 0
    assert encoder._reading_processes(1000) == 0
    assert worker_count(resolve("debug-pretrain", ["num_workers=4"]), torch.device("cpu")) == 0
    with pytest.raises(ConfigError, match="a daemon process may start no others"):
        api.pretrain(resolve("debug-pretrain", ["devices=2", "accelerator=cpu", "out=/nowhere/x"]))


DEADLY = """
import multiprocessing, os, signal
import numpy as np
from smkd.classify.pictures import Pictures
from smkd.errors import DataError
from smkd.fewshot.features import Stream

class Deadly(Pictures):
    labels = np.zeros(300, np.int64)

    def load(self, index):
        if index == 40 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(index)

images = Deadly([np.zeros((8, 8, 3), np.uint8)] * 300)
encode = lambda pixels: pixels.flatten(1).float()
stream = Stream(images, encode, 192, resize=8, crop=8, on_error="skip", batch_size=8, num_workers=1)
try:
    stream.collect()
except DataError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="a class of the script cannot be spawned")
def test_a_reading_process_that_is_killed_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", DEADLY], capture_output=True, text=True, check=False)
    # 'ended' where PyTorch saw that it was gone before the system's signal came
    line = (
        r"process \d+, which reads images, (was killed \(Killed\)|ended): out of memory\? use fewer with num_workers=\n"
    )
    assert re.fullmatch(line, done.stdout), (done.stdout, done.stderr)


def predict_in_a_daemon(classifier: Path, images: list[Path], answers: Any) -> None:
    assert multiprocessing.current_process().daemon
    answers.put(FewShotClassifier.load(classifier).predict(images).tolist())


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="only where readers are forked")
def test_300_images_are_predicted_in_a_daemon_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "cores", lambda: 4)
    photographs(tmp_path / "support", (2, 2))
    photos = sorted((tmp_path / "support").rglob("*.png"))
    backbone = tiny_checkpoint(tmp_path / "net.pt")
    labels = [photo.parent.name for photo in photos]
    FewShotClassifier(backbone, accelerator="cpu").fit(photos, labels).save(tmp_path / "clf.smkd")
    assert encoder._reading_processes(300) > 0
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    given = [photos[number % len(photos)] for number in range(300)]
    process = context.Process(target=predict_in_a_daemon, args=(tmp_path / "clf.smkd", given, answers), daemon=True)
    process.start()
    found = answers.get(timeout=60)
    process.join(10)
    assert process.exitcode == 0
    assert found == [photo.parent.name for photo in given]


def training(folder: Path, *words: str) -> list[str]:
    settings = ["accelerator=cpu", f"out={folder / 'run'}", "epochs=500", "validation.every=0", "save_every=0"]
    return ["pretrain", "debug-pretrain", *settings, "batch_size=8", "data.limit_per_class=2", *words]


def descendants(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return [*children, *(each for child in children for each in descendants(child))]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("devices", "number", "code"), [(1, signal.SIGTERM, 143), (2, signal.SIGINT, 130)])
def test_signals_end_a_training_in_a_line(tmp_path: Path, devices: int, number: signal.Signals, code: int) -> None:
    words = training(tmp_path, f"devices={devices}", "num_workers=1")
    pipe = subprocess.PIPE
    process = subprocess.Popen([*SMKD, *words], stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("epoch 1/"))
        started = descendants(process.pid)
        assert len(started) >= devices
        sent = time.monotonic()
        process.send_signal(number)
        process.wait(60)
        left = started
        while left and time.monotonic() < sent + 10:
            left = [each for each in left if Path(f"/proc/{each}").exists()]
        assert not left
        assert time.monotonic() < sent + 10
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code
    assert process.stderr is not None
    (said,) = process.stderr.read().splitlines()
    assert re.fullmatch(rf"smkd: stopped by {number.name}: step \d+ of \d+ is saved, and the same command .*", said)


@pytest.mark.slow
def test_a_users_error_among_several_processes_is_said_once(tmp_path: Path) -> None:
    photographs(tmp_path / "photos" / "train", (8, 8))
    broken = next(path for path in (tmp_path / "photos").rglob("*") if path.is_file())
    broken.write_bytes(broken.read_bytes()[:50])
    words = training(
        tmp_path, "devices=2", f"data={tmp_path / 'photos'}", "data.dataset=folder", "data.limit_per_class=8"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "smkd"]
    for start in (SMKD, torchrun):
        done = subprocess.run([*start, *words], capture_output=True, text=True, check=False)
        ours = [line for line in done.stderr.splitlines() if line.startswith("smkd: ")]
        assert len(ours) == 1, done.stderr
        assert str(broken) in ours[0]
        if start is SMKD:
            assert done.returncode == 2
            assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_a_warning_among_several_processes_is_a_line_said_once(tmp_path: Path) -> None:
    photographs(tmp_path / "photos" / "train", (8, 8))
    (next((tmp_path / "photos" / "train").iterdir()) / "far.heic").touch()
    words = ["devices=2", f"data={tmp_path / 'photos'}", "data.dataset=folder", "data.limit_per_class=8", "epochs=1"]
    done = subprocess.run([*SMKD, *training(tmp_path, *words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "far.heic" in line or "SmkdWarning" in line]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("smkd: ")


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    settings = ["devices=2", "accelerator=cpu", f"out={tmp_path / 'run'}"]
    script.write_text(
        "import smkd\n"
        f"config = smkd.resolve('debug-pretrain', {settings})\n"
        "try:\n    smkd.pretrain(config)\nexcept smkd.errors.SmkdError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert "main guard" in done.stdout
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
