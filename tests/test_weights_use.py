"""Foreign weights start phase 1 and phase 2, are evaluated, and become checkpoints; and where they come from."""

from __future__ import annotations

import functools
import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import typer
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from typer.testing import CliRunner

import foreign_files as files
from smkd import api
from smkd.cli import weights as verbs
from smkd.engine import checkpoint
from smkd.errors import CheckpointError, SmkdError
from smkd.models.vit import VisionTransformer, resized_positions
from smkd.weights import catalogue, fetch

pytestmark = pytest.mark.slow

QUICK = ("data.limit_per_class=4", "validation.every=0", "epochs=1", "optim.lr=1e-12", "optim.lr_end=0",
         "optim.warmup_epochs=0", "optim.teacher_momentum=1.0", "accelerator=cpu",
         "model.embed_dim=64", "model.depth=2", "model.num_heads=1")  # fmt: skip
MODEL = files.vit()

app = typer.Typer()
app.command("import")(verbs.import_)
app.command("import-args")(verbs.import_args)


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and isinstance(result.exception, SmkdError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def train(recipe: str, out: Path, init: str | Path, *words: str) -> dict[str, Any]:
    config = api.resolve(recipe, [f"out={out}", f"init={init}", *QUICK, *words])
    folder = api.pretrain(config) if config.phase == "pretrain" else api.distill(config)
    return checkpoint.load_checkpoint(folder / "checkpoints" / "last.pt")


def equal(state: dict[str, torch.Tensor], model: VisionTransformer) -> None:
    for name, value in files.weights(model).items():
        torch.testing.assert_close(state[f"backbone.{name}"], value, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training file of the published code."""
    content = files.smkd(MODEL, files.head())
    return files.saved(content, tmp_path_factory.mktemp("released") / "checkpoint0040.pth")


def test_a_training_file_starts_both_phases_with_head_and_centres(tmp_path: Path, released: Path) -> None:
    words = ("head.num_prototypes=32", "head.hidden_dim=48", "head.bottleneck_dim=16")
    for recipe in ("debug-pretrain", "debug-distill"):
        state = train(recipe, tmp_path / recipe, released, *words)
        equal(state["teacher"], MODEL)
        torch.testing.assert_close(state["teacher"]["head.mlp.0.weight"], files.head()["mlp.0.weight"])


def test_weights_without_a_head_start_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = files.saved(files.mae(MODEL), tmp_path / "mae.pth")
    state = train("debug-distill", tmp_path / "a", path)
    equal(state["teacher"], MODEL)
    assert state["teacher"]["head.mlp.0.weight"].abs().sum() > 0
    assert "left out: decoder_pos_embed" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_head_that_does_not_fit_starts_afresh(
    tmp_path: Path, released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = train("debug-pretrain", tmp_path / "a", released)
    equal(state["teacher"], MODEL)
    assert state["teacher"]["head.last_layer.weight_v"].shape == (64, 32)
    assert "the imported head does not fit this run's and is left out" in capsys.readouterr().out


def test_positions_are_interpolated_only_where_the_grid_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = files.vit(image_size=48)
    path = files.saved(files.timm(large), tmp_path / "large.pth")
    state = train("debug-pretrain", tmp_path / "a", path)
    expected = resized_positions(large.pos_embed, 4, 4)
    torch.testing.assert_close(state["teacher"]["backbone.pos_embed"], expected)
    torch.testing.assert_close(expected, large.positions(32, 32))
    assert "position embedding interpolated from 6 x 6 to 4 x 4 patches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch_size": 16}, r"this run's has .*patches of 8; set model\.patch_size=16"),
        ({"depth": 1, "register_tokens": 4}, r"set model\.depth=1 model\.register_tokens=4$"),
        ({"layer_scale": 1.0}, r"set model\.layer_scale=1\.0$"),
    ],
)
def test_weights_of_another_vit_name_the_settings(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = files.saved(files.timm(files.vit(**changes)), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=says):
        train("debug-pretrain", tmp_path / "a", path)
    assert not (tmp_path / "a").exists()


def test_blocks_behind_those_of_the_run_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = files.vit(depth=4)
    state = train("debug-pretrain", tmp_path / "a", files.saved(files.timm(deep), tmp_path / "deep.pth"))
    assert "left out: blocks 3 to 4 of the backbone (model.depth=2)" in capsys.readouterr().out
    deep.blocks = deep.blocks[:2]
    equal(state["teacher"], deep)


def test_the_optimiser_of_a_foreign_file_is_not_taken(tmp_path: Path, released: Path) -> None:
    with pytest.raises(CheckpointError, match="init_optimizer=true, but imported weights come without"):
        train("debug-pretrain", tmp_path / "a", released, "init_optimizer=true")


def test_import_writes_a_checkpoint_that_everything_takes(tmp_path: Path, released: Path) -> None:
    output = run("import", released, "-o", tmp_path / "run", "--recipe", "debug-pretrain")
    assert "a training file of SMKD or iBOT" in output
    assert "written:" in output
    files_of_it = {"run": tmp_path / "run", "file": tmp_path / "run" / "checkpoints" / "last.pt"}
    for name, where in files_of_it.items():
        equal(files.prefixed("backbone.", api.load(where).state_dict()), MODEL)
        words = ("head.num_prototypes=32", "head.hidden_dim=48", "head.bottleneck_dim=16")
        equal(train("debug-distill", tmp_path / f"next-{name}", where, *words)["teacher"], MODEL)
        features = api.open_features(where, changes={"evaluation": {"split": "val"}, "precision": "fp32"}).features()
        torch.testing.assert_close(features.values, direct(released).values)
    with pytest.raises(SmkdError, match="exists; choose another -o"):
        run("import", released, "-o", tmp_path / "run")
    with pytest.raises(SmkdError, match="is a checkpoint of smkd already"):
        run("import", files_of_it["file"], "-o", tmp_path / "b.pt")


@functools.cache
def direct(path: Path) -> Any:
    opened = api.open_features(
        path, recipe="debug-pretrain", changes={"evaluation": {"split": "val"}, "precision": "fp32"}
    )
    return opened.features()


def test_a_foreign_file_is_measured_with_a_recipe_only(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert direct(released).values.shape[1] == 2 * files.DIM
    api.open_features(released, recipe="debug-pretrain")
    said = capsys.readouterr()
    assert "a training file of SMKD or iBOT" in said.err
    assert said.out == ""
    with pytest.raises(CheckpointError, match="foreign weights need --recipe, or `smkd import`"):
        api.open_features(released)
    equal(files.prefixed("backbone.", api.load(released).state_dict()), MODEL)


def test_options_of_import(tmp_path: Path) -> None:
    model = files.vit(num_heads=4)
    state = files.weights(model)
    del state["norm.bias"]
    path = files.saved({"student": state}, tmp_path / "a.pth")
    words = ("--heads", "4", "--allow-missing", "norm.bias", "--network", "student")
    output = run("import", path, "-o", tmp_path / "a.pt", *words)
    assert "4 heads" in output
    assert "missing and allowed, as training begins: norm.bias" in output
    assert api.load(tmp_path / "a.pt").blocks[0].attn.num_heads == 4


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves tmp_path/served on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    (tmp_path / "served").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()
        thread.join()


def test_urls_with_a_checksum(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = files.saved(files.timm(MODEL), tmp_path / "served" / "vit.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    url = f"{server}/vit.pth#sha256={digest}"
    equal(files.prefixed("backbone.", api.load(url).state_dict()), MODEL)
    # a configuration keeps init as a path, which folds the slashes
    equal(train("debug-pretrain", tmp_path / "a", url)["teacher"], MODEL)
    path.unlink()  # the second time it comes from the cache
    equal(files.prefixed("backbone.", api.load(url).state_dict()), MODEL)
    assert [file.name for file in (tmp_path / "cache/smkd/weights").iterdir()] == [f"{digest[:16]}-vit.pth"]


def test_a_cut_download_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights as of archives: one downloader, and nobody downloads what another process is downloading."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = files.saved(files.timm(MODEL), tmp_path / "vit.pth")
    content, asked = path.read_bytes(), list[str | None]()

    class Cutting(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Range"))
            start = int((asked[-1] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if start else 200)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : start + 20_000] if len(asked) == 1 else content[start:])

        def log_message(self, format: str, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cutting) as serving:
        threading.Thread(target=serving.serve_forever).start()
        url = f"http://127.0.0.1:{serving.server_address[1]}/vit.pth#sha256={hashlib.sha256(content).hexdigest()}"
        with ThreadPoolExecutor(3) as pool:
            found = set(pool.map(fetch.locate_weights, [url] * 3))
        serving.shutdown()
    assert asked == [None, "bytes=20000-"]
    assert [file.read_bytes() for file in found] == [content]
    assert list(catalogue.weights_folder().iterdir()) == list(found)


def test_wrong_urls(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "served" / "vit.pth").write_bytes(b"another file")
    found = hashlib.sha256(b"another file").hexdigest()
    with pytest.raises(CheckpointError, match=rf"has SHA-256 {found}, expected {'0' * 64}; it is kept as '.*\.wrong'"):
        api.load(f"{server}/vit.pth#sha256={'0' * 64}")
    kept = tmp_path / "cache/smkd/weights" / f"{'0' * 16}-vit.pth.wrong"
    assert kept.read_bytes() == b"another file"
    for fragment in ("", "#sha256=12", "#md5=" + "0" * 64):
        with pytest.raises(CheckpointError, match=r"needs its checksum: http.*#sha256=<64 hex digits>"):
            api.load(f"{server}/vit.pth{fragment}")
    with pytest.raises(CheckpointError, match=r"cannot download http.*none\.pth: 404"):
        api.load(f"{server}/none.pth#sha256={'0' * 64}")
    with pytest.raises(CheckpointError, match=r"cannot download http.*a b: "):
        api.load(f"{server}/a b#sha256={'0' * 64}")
    with pytest.raises(CheckpointError, match=r"cannot download http://127\.0\.0\.1:9/a"):
        api.load(f"http://127.0.0.1:9/a#sha256={'0' * 64}")


def test_hub_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = files.vit(num_heads=4)
    files.saved(files.transformers(model, kind="vit"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    asked = []

    def download(repository: str, name: str, revision: str | None = None, **_: Any) -> str:
        asked.append((repository, name, revision))
        if repository == "org/away":
            raise LocalEntryNotFoundError("offline")
        if repository == "org/gated":
            raise OSError("403 Client Error: ask for access\nmore lines")
        if not (tmp_path / name).is_file():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    equal(files.prefixed("backbone.", api.load("hf:org/vit").state_dict()), model)
    assert asked[0] == ("org/vit", "model.safetensors", None)
    assert api.load("hf:org/vit@v1/pytorch_model.bin").blocks[0].attn.num_heads == 4
    assert asked[-2:] == [("org/vit", "pytorch_model.bin", "v1"), ("org/vit", "config.json", "v1")]
    for source, says in {
        "hf:org/vit/none.bin": r"'hf:org/vit/none\.bin' holds no weights; looked for none\.bin",
        "hf:org": r"is not of the form hf:owner/name",
        "hf:org/away": "cannot reach the Hub for 'hf:org/away'",
        "hf:org/gated": "cannot fetch 'hf:org/gated': 403 Client Error: ask for access$",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            fetch.locate_weights(source)
