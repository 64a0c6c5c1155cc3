"""Weights that are not finite, not plain, damaged or claim too much: one line that names the tensor or key."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import foreign_files as files
from classify_data import tiny_network
from made_images import photographs
from smkd import adaptation, api
from smkd.classify import Encoder, EncoderConfig, FewShotClassifier, ImageIndex, open_encoder
from smkd.cli import weights
from smkd.config.loading import resolve
from smkd.engine import checkpoint
from smkd.engine.restore import backbone_of, open_checkpoint, restore
from smkd.engine.step import Learner
from smkd.errors import CheckpointError, DataError, SmkdError
from smkd.publishing import write
from smkd.weights.read import read_weights

BASE = api.resolve("debug-pretrain", ["accelerator=cpu"])
MODEL = files.vit()
BAD = "blocks.1.attn.proj.weight"
NAN = r"1 of 4096 numbers of blocks\.1\.attn\.proj\.weight are NaN or infinite"


def refused(content: Any, tmp_path: Path, says: str) -> None:
    path = content if isinstance(content, Path) else files.saved(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(path, BASE)
    assert "\n" not in str(caught.value)


def spoiled(value: float = float("nan")) -> files.State:
    state = {name: weight.clone() for name, weight in files.weights(MODEL).items()}
    state[BAD].view(-1)[7] = value
    return state


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float, form: str) -> None:
    state = {name: weight.double() for name, weight in spoiled().items()}
    state[BAD].view(-1)[7] = value  # the last is infinite in float32
    path = tmp_path / "w.safetensors"
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    refused(path, tmp_path, NAN)


def test_on_every_road(tmp_path: Path) -> None:
    path = files.saved(spoiled(), tmp_path / "w.pth")
    data = photographs(tmp_path / "data", (3, 3))
    roads = {
        "load": lambda: api.load(path),
        "eval and features": lambda: api.open_features(path, recipe="debug-pretrain"),
        "fit": lambda: FewShotClassifier(path).fit([str(file) for file in data.rglob("*.png")], list("aaabbb")),
        "index": lambda: open_encoder(path),
        "export": lambda: write.export(path, "safetensors", tmp_path / "a.safetensors"),
        "from_pretrained": lambda: write.from_pretrained(path),
        "import": lambda: weights.import_(str(path), tmp_path / "out.pt"),
        "adapt": lambda: adaptation.adapt(data, tmp_path / "run", path),
        "init": lambda: api.pretrain(
            api.resolve("debug-pretrain", [f"out={tmp_path / 'a'}", f"init={path}", "model.embed_dim=64",
                                           "model.num_heads=1"])
        ),
    }  # fmt: skip
    for name, road in roads.items():
        with pytest.raises(CheckpointError, match=NAN):
            road()
        assert name
    assert not any((tmp_path / name).exists() for name in ("a.safetensors", "out.pt", "a", "run"))


def test_networks_in_memory_are_looked_at_too() -> None:
    network = tiny_network()
    network.norm.weight.data[3] = float("nan")
    config = api.resolve("debug-pretrain")
    for road in (
        lambda: api.evaluate(network, config), lambda: Encoder(EncoderConfig(model=config.model), network),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"1 of 32 numbers of norm\.weight are NaN or infinite"):
            road()


def test_what_is_left_out_may_hold_anything(tmp_path: Path) -> None:
    state = files.mae(MODEL)
    state["model"]["decoder_norm.weight"] = torch.full((24,), float("nan"))
    state["model"]["head.weight"] = torch.zeros(5, 64, dtype=torch.int8)
    open_checkpoint(files.saved(state, tmp_path / "w.pth"), BASE)


@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor:UserWarning", "ignore:TypedStorage is deprecated:UserWarning",
    "ignore:The PyTorch API of nested tensors:UserWarning",
)  # fmt: skip
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.to_sparse(), "norm.weight is sparse or nested; weights should be dense"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "norm.weight is qint8; weights should be float"),
        (lambda x: x.long(), "norm.weight is int64; weights"), (lambda x: x.bool(), "norm.weight is bool"),
        (lambda x: x.to(torch.float8_e4m3fn), "norm.weight is float8_e4m3fn"),
        (lambda x: x.to(torch.complex64), "norm.weight is complex64"),
        (lambda x: x.to("meta"), "norm.weight is without numbers"),
        (lambda x: torch.nested.nested_tensor([x]), "norm.weight is sparse or nested"),
        (lambda x: torch.zeros(1).expand(10**12), r"norm.weight is \[1000000000000\], .* more than 8 times the bytes"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_plain_floats_are_named(tmp_path: Path, change: Any, says: str) -> None:
    state = files.weights(MODEL)
    refused({**state, "norm.weight": change(state["norm.weight"])}, tmp_path, says)


def test_files_under_other_names_and_of_a_few_bytes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    torch.save(files.weights(MODEL), path)
    open_checkpoint(path, BASE)
    safetensors.torch.save_file(files.weights(MODEL), tmp_path / "w.pth")
    open_checkpoint(tmp_path / "w.pth", BASE)
    for length in range(1, 12):
        for content in (bytes(length), b"PK\3\4" + bytes(length), b"{" * length, b"\x80\x02" + bytes(length)):
            path.write_bytes(content)
            refused(path, tmp_path, "cannot read")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", tmp_path, "it is not a regular file")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_newer_protocols_of_pickles_are_named(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "w.pth"
    torch.save(files.weights(MODEL), path, pickle_protocol=protocol)
    if protocol == 3:
        open_checkpoint(path, BASE)
        return
    refused(path, tmp_path, f"its pickle is of protocol {protocol}; torch.save writes 2, save it so")


def rewritten(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive of `torch.save` with other records."""
    memory = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(memory, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    path.write_bytes(memory.getvalue())
    return path


def test_claims_that_the_file_cannot_hold(tmp_path: Path) -> None:
    state = {**files.weights(MODEL), "norm.weight": torch.arange(300.0)}
    path = files.saved(state, tmp_path / "w.pth")
    size = pickle.dumps(300, 2)[2:-1]

    def larger(name: str, data: bytes) -> bytes:
        return data.replace(size, pickle.dumps(60_000, 2)[2:-1]) if name.endswith("data.pkl") else data

    refused(rewritten(path, larger), tmp_path, "tensor data '.*' has 1200 bytes, its tensor needs 240000")
    path = files.saved(state, tmp_path / "w.pth")
    refused(
        rewritten(path, lambda _, data: data, zipfile.ZIP_DEFLATED),
        tmp_path,
        "record '.*' is compressed; torch.save ne",
    )
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K@", b"J\xff\xff\xff\x7f"))
    refused(path, tmp_path, "its tensors need [0-9]+ of [0-9]+ bytes")


@pytest.mark.parametrize(
    "opcode", [b"\x8e", b"\x8d", b"\x96", b"\x95", b"B", b"X", b"T", b"\x8b"], ids=lambda code: str(code.hex())
)
def test_a_pickle_that_claims_gigabytes(tmp_path: Path, opcode: bytes) -> None:
    """Long bytes, texts, arrays, frames and numbers: room is made for none of them."""
    length = b"\xff\xff\xff\x7f" + (b"\0" * 4 if opcode in b"\x8e\x8d\x96\x95" else b"")
    path = tmp_path / "w.pth"
    path.write_bytes(b"\x80\x02" + opcode + length + bytes(100))
    tracemalloc.start()
    refused(path, tmp_path, "damaged, or not a file of PyTorch or safetensors")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10**7


def test_weights_in_several_files(tmp_path: Path) -> None:
    names = sorted(files.weights(MODEL))
    files_of = {name: f"model-{1 + (place > 9)}-of-2.safetensors" for place, name in enumerate(names)}
    for file in set(files_of.values()):
        part = {name: value for name, value in files.weights(MODEL).items() if files_of[name] == file}
        safetensors.torch.save_file(part, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files_of}))
    for where in (tmp_path, index):
        for name, value in api.load(where).state_dict().items():
            torch.testing.assert_close(value, files.weights(MODEL)[name], rtol=0, atol=0)
    index.write_text(json.dumps({"weight_map": {**files_of, "norm.x": files_of["norm.bias"]}}))
    refused(tmp_path, tmp_path, r"lacks norm\.x \(1 weights\)")
    index.write_text(json.dumps({"weight_map": {**files_of, "norm.bias": "../w.safetensors"}}))
    refused(tmp_path, tmp_path, r"norm\.bias is in '\.\./w\.safetensors', which is no file beside it")
    for text, says in (("{", "not valid JSON"), ("[]", "not a JSON object"), ('{"weight_map": []}', "no weight_map")):
        index.write_text(text)
        refused(tmp_path, tmp_path, says)
    index.write_text(json.dumps({"weight_map": files_of}))
    (tmp_path / files_of["norm.bias"]).unlink()
    refused(tmp_path, tmp_path, "model-2-of-2.safetensors' is missing")


@pytest.fixture(scope="module")
def learner() -> Learner:
    made = Learner.create(BASE, 4, torch.device("cpu"), None)
    for parameter in made.pair.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.optimizer.step()
    return made


@pytest.fixture
def run(learner: Learner) -> dict[str, Any]:
    """What a checkpoint of a run holds."""
    return copy.deepcopy({
        **learner.state(), "epoch": 1, "step": 8, "best": 40.0, "stale": 0, "config": BASE.model_dump(mode="json"),
        "classes": ["a"], "version": "1",
    })  # fmt: skip


def resumed(state: dict[str, Any], learner: Learner, path: Path) -> None:
    checkpoint.save_checkpoint(state, path)
    restore(learner, checkpoint.load_checkpoint(path), optimizer=True)


def test_a_checkpoint_without_a_part_names_it(run: dict[str, Any], learner: Learner, tmp_path: Path) -> None:
    resumed(run, learner, tmp_path / "a.pt")
    for key in ("student", "teacher", "objective", "optimizer", "scaler", "epoch", "step", "best", "config"):
        without = {name: value for name, value in run.items() if name != key}
        with pytest.raises(CheckpointError, match=f"{key} is missing; the checkpoint is damaged"):
            resumed(without, learner, tmp_path / "a.pt")
    checkpoint.save_checkpoint({name: value for name, value in run.items() if name != "teacher"}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt': teacher is missing"):
        api.load(tmp_path / "a.pt")


@pytest.mark.parametrize("other", [None, 5, "text", [1], {"a": "b"}, torch.ones(2), float("nan"), 10**30])
def test_a_part_of_another_type_is_named(run: dict[str, Any], learner: Learner, tmp_path: Path, other: Any) -> None:
    for key in run:
        if key in ("version", "classes", "stale") or (key == "scaler" and isinstance(other, dict)):
            continue
        if key in ("epoch", "step", "best") and isinstance(other, int):
            continue
        with pytest.raises(SmkdError, match=key) as caught:
            resumed({**run, key: other}, learner, tmp_path / "a.pt")
        assert "\n" not in str(caught.value)


def test_damage_inside_the_parts_is_named(run: dict[str, Any], learner: Learner, tmp_path: Path) -> None:
    cases: list[tuple[tuple[str | int, ...], Any, str]] = [
        (("teacher", "backbone.norm.weight"), torch.full((32,), float("nan")), "32 of 32 numbers of teacher.backb"),
        (("objective", "cls_center"), torch.tensor([float("inf")] * 64), "64 of 64 numbers of objective.cls_center"),
        (("student", "backbone.norm.weight"), "x", "student.backbone.norm.weight is damaged"),
        (("student", "backbone.norm.weight"), torch.ones(32).long(), "student.backbone.norm.weight is int64"),
        (("teacher", "backbone.norm.weight"), torch.ones(31), r"norm.weight is \[31\], ours is \[32\]"),
        (("teacher", "head.last_layer.weight_v"), torch.ones(3, 3), "the teacher's projection head is not the one"),
        (("config", "model", "depth"), 10**9, "its weights do not fit its settings; the weights have model.depth=2"),
        (("config", "model", "embed_dim"), 10**9, "model.embed_dim=32"),
        (("config", "model", "image_size"), 32 * 10**9, "model.image_size=32"),
        (("config", "head", "num_prototypes"), 10**15, "projection head is not the one of its settings"),
        (("config", "head", "layers"), 10**9, "projection head is not the one of its settings"),
        (("config", "epochs"), "many", "config: epochs=many"),
        (("optimizer", "param_groups"), [], "optimizer.state has 0, but there are 0 parameters"),
        (("optimizer", "state", 0), {}, "optimizer.state.0.step is missing"),
        (("optimizer", "state", 0, "exp_avg"), torch.ones(2), r"optimizer.state.0.exp_avg is \[2\], but its parameter"),
        (("optimizer", "state", 0, "step"), torch.tensor(float("nan")), "optimizer.state.0.step are NaN"),
    ]  # fmt: skip
    for (*place, last), value, says in cases:
        state = copy.deepcopy(run)
        inner: Any = state
        for key in place:
            inner = inner[key]
        inner[last] = value
        with pytest.raises(CheckpointError, match=says) as caught:
            resumed(state, learner, tmp_path / "a.pt")
        assert "\n" not in str(caught.value)


def test_a_scaler_is_taken_where_one_is_in_use(run: dict[str, Any], learner: Learner, tmp_path: Path) -> None:
    learner = copy.copy(learner)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    resumed({**run, "scaler": {}}, learner, tmp_path / "a.pt")  # a run in another precision has none
    assert learner.scaler.get_scale() == 8.0
    kept = torch.amp.GradScaler("cpu", init_scale=1024.0).state_dict()
    resumed({**run, "scaler": kept}, learner, tmp_path / "a.pt")
    assert learner.scaler.get_scale() == 1024.0
    for change in ({"scale": float("nan")}, {"scale": 0.0}, {"growth_interval": "x"}, {"_growth_tracker": -1}):
        with pytest.raises(CheckpointError, match=f"scaler.{next(iter(change))}"):
            resumed({**run, "scaler": {**kept, **change}}, learner, tmp_path / "a.pt")


def fitted(folder: Path) -> Path:
    network = tiny_network()
    encoder = Encoder(EncoderConfig(model=BASE.model, resize=32, crop=32), network)
    features = np.random.default_rng(0).normal(size=(6, encoder.dim)).astype(np.float32)
    FewShotClassifier(encoder).fit(features, ["a", "a", "b", "b", "c", "c"]).save(folder / "clf.smkd")
    return folder / "clf.smkd"


def resaved(path: Path, place: tuple[str, ...], value: Any) -> None:
    """A file of `smkd fit` with another value in its settings."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["smkd"])
    tensors = safetensors.torch.load_file(path)
    inner = header["settings"]
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    safetensors.torch.save_file(tensors, path, {"smkd": json.dumps(header)})


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("temperature",), 0.0, "temperature: Input should be greater than 0"),
        (("temperature",), float("nan"), "temperature: "), (("temperature",), ..., "temperature is missing"),
        (("known",), [float("inf"), 0.0], r"known\.0"), (("seed",), 10**30, "seed"),
        (("classes",), ["a", "b\nc", "d"], r"class 'b\\nc': a name should be one line without control characters"),
        (("classes",), ["a", "\x1b[2J", "d"], "one line without control"),
        (("classes",), ["a"], "classes: List should"),
        (("label_type",), "<U900000", "label_type"), (("label_type",), "<i8", "classes are not of type <i8"),
        (("label_type",), "V99999999999", "label_type"), (("left_out",), [9, 3], "left_out: 9 of 3 images cannot be"),
        (("chosen",), "nonsense", "nonsense"), (("encoder", "std"), [0.0, 1.0, 1.0], r"encoder: std\.0"),
        (("encoder", "mean"), [float("nan"), 1.0, 1.0], r"encoder: mean\.0"),
        (("encoder", "crop"), 10**9, "encoder: crop"), (("encoder", "crop"), 31, "crop=31 is no whole number"),
        (("encoder", "model", "depth"), 10**9, "its weights do not fit its settings; the weights have model.depth=2"),
        (("encoder", "model", "embed_dim"), 2 * 10**9, "model.embed_dim=32"),
        (("encoder", "features", "blocks"), 10**9, "encoder: features.blocks: so many last blocks should be 1 to 1000"),
        (("encoder", "features", "blocks"), 3, "features.blocks: there is no block -3, the backbone has 2"),
        (("encoder", "features", "blocks"), [1, 2, 9], "features.blocks: there is no block 9, the backbone has 2"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_a_classifier_that_cannot_be_are_named(
    tmp_path: Path, place: tuple[str, ...], value: Any, says: str
) -> None:
    path = fitted(tmp_path)
    resaved(path, place, value)
    with pytest.raises(CheckpointError, match=says) as caught:
        FewShotClassifier.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_class_with_a_name_of_two_lines_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write '.*': class 'b\\nc': a name should be one line"):
        FewShotClassifier().fit(np.eye(4), ["a", "a", "b\nc", "b\nc"]).save(tmp_path / "clf.smkd")
    assert not (tmp_path / "clf.smkd").exists()


@pytest.mark.parametrize("name", ["support", "backbone.norm.weight", "features"])
def test_tensors_of_classifiers_and_indexes_that_are_not_finite(tmp_path: Path, name: str) -> None:
    path, load = fitted(tmp_path), FewShotClassifier.load
    if name == "features":
        path = tmp_path / "index.smkd"
        ImageIndex(Encoder(EncoderConfig(), None), np.ones((1, 768), np.float32), ["a"]).save(path)
        load = ImageIndex.load
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    tensors[name].view(-1)[0] = float("nan")
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises((CheckpointError, DataError), match=r"1 of [0-9]+ (numbers|rows).* are NaN or infinite"):
        load(path)


@pytest.mark.parametrize("header", ["[" * 10**5, "5", '{"kind": []}', '{"kind": "classifier", "format": 1}', "{"])
def test_headers_that_are_none(tmp_path: Path, header: str) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "clf.smkd", {"smkd": header})
    with pytest.raises(CheckpointError, match=r"clf\.smkd'"):
        FewShotClassifier.load(tmp_path / "clf.smkd")
    assert "a" in read_weights(tmp_path / "clf.smkd")


def test_a_backbone_with_damaged_settings_is_not_built(run: dict[str, Any]) -> None:
    run["config"]["model"]["mlp_dim"] = 10**9
    with pytest.raises(CheckpointError, match=r"the weights have model\.mlp_dim=128"):
        backbone_of(run, "f", "teacher")


def test_a_weight_that_cannot_be_loaded_is_named_in_a_line() -> None:
    network = tiny_network()
    weights = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    weights["backbone.norm.bias"] = weights["backbone.norm.bias"].to_sparse()  # of the right shape
    state = {"teacher": weights, "config": resolve("debug-pretrain").model_dump(mode="json")}
    with pytest.raises(CheckpointError, match=r"^'x\.pt': its weights do not fit .*\"norm\.bias\"[^\n]*$"):
        backbone_of(state, "x.pt", "teacher")
