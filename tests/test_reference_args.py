"""Command lines of the published code as recipes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import foreign_files as files
from smkd import api
from smkd.config import loading
from smkd.config.run_config import RunConfig
from smkd.errors import ConfigError
from smkd.reference.translate import translate
from test_weights_use import app

PHASE_1 = r"""
# as in the published commands
python -m torch.distributed.launch --nproc_per_node=8 main_smkd.py \
    --data_path /data/mini-imagenet-480/train --output_dir /runs/p1 --epochs 1600 \
    --lambda1 1.0 --lambda2 0.0 --lambda3 1.0 --batch_size_per_gpu 64 --pred_ratio 0 0.3 --pred_ratio_var 0 0.2 \
    --prod_mode true --wandb_entity me --dist_url tcp://localhost:10001 --use_fp16 false --local_crops_number 8
"""
PHASE_2 = """
torchrun --nproc_per_node 4 code/main_smkd.py --data_path /data/CIFAR-FS/train --supervised_contrastive
 --pretrained_path /runs/p1 --pretrained_file checkpoint1250.pth --lambda2 1.0 --lambda3 0.0 --weighted_pool True
 --epochs 150 --batch_size_per_gpu 32 --saveckp_freq 5 --evaluate_freq 5 --shared_head false --patch_out_dim 4096
 --evaluation_method knn --top_k 3 --patch_size 16 --arch vit_tiny --optimizer sgd --no_such 1
 --global_crops_scale 0.4 1
"""
EVALUATION = """python eval_smkd.py --server mini --num_shots 5 --ckp_path /runs/p2 --ckpt_filename checkpoint0040.pth
--output_dir /runs/out --evaluation_method classifier --iter_num 1000"""


def recipe(text: str, tmp_path: Path) -> tuple[RunConfig, str]:
    (tmp_path / "command.txt").write_text(text.replace("\n", " ") if "\\" not in text else text)
    made = translate(tmp_path / "command.txt")
    (tmp_path / "recipe.yaml").write_text(made.text)
    return api.resolve(str(tmp_path / "recipe.yaml")), "\n".join(made.notes)


def test_phase_1(tmp_path: Path) -> None:
    config, notes = recipe(PHASE_1, tmp_path)
    assert (config.phase, config.epochs, config.batch_size, config.devices) == ("pretrain", 1600, 512, 8)
    assert config.data.root == Path("/data/mini-imagenet-480")
    assert config.data.dataset == "mini-imagenet"
    assert (config.objective.cls.weight, config.objective.patch.weight, config.objective.mim.weight) == (1, 0, 1)
    assert not config.objective.labels
    assert config.precision == "fp32"
    assert config.local_views.count == 8
    assert config.mask.ratio == (0, 0.3)
    assert config.out == Path("/runs/p1")
    assert config.save_every == 50
    assert "--prod_mode, --wandb_entity: no meaning here" in notes
    assert "--dist_url: no meaning here" in notes
    assert "never on test classes" in notes


def test_phase_1_is_the_recipe_of_the_package(tmp_path: Path) -> None:
    plain = PHASE_1.replace("--use_fp16 false --local_crops_number 8", "")
    config, _ = recipe(plain, tmp_path)
    ours = api.resolve("mini-imagenet-pretrain", ["data=/data/mini-imagenet-480", "devices=8"])
    # what the off terms would do differs, and nothing else
    changes = [line.split(":")[0] for line in loading.differences(config, ours)]
    assert changes == ["objective.patch.weighting", "recipe"]


def test_phase_2(tmp_path: Path) -> None:
    config, notes = recipe(PHASE_2, tmp_path)
    assert (config.phase, config.epochs, config.batch_size) == ("distill", 150, 128)
    assert config.data.dataset == "cifar-fs"
    assert config.init == Path("/runs/p1/checkpoint1250.pth")
    assert config.objective.labels
    assert config.objective.patch.weighting == "attention"
    assert config.objective.patch.matching == "reference"
    assert config.head.num_patch_prototypes == 4096
    assert config.model.size == "tiny"
    assert config.validation.head == "knn:neighbours=3"
    assert (config.validation.every, config.save_every) == (5, 5)
    assert config.global_views.scale == (0.4, 1.0)
    assert "--no_such: not an option of main_smkd.py" in notes
    assert "--optimizer sgd: cannot be translated; here it is adamw" in notes
    assert "--shared_head_teacher: student and teacher are alike here" in notes


def test_evaluation(tmp_path: Path) -> None:
    config, notes = recipe(EVALUATION, tmp_path)
    assert config.evaluation.shots == (5,)
    assert config.evaluation.episodes == 1000
    assert config.evaluation.head == "classifier"
    assert (config.evaluation.resize, config.evaluation.crop) == (360, 320)
    assert config.data.dataset == "mini-imagenet"
    assert "smkd eval /runs/p2/checkpoint0040.pth --recipe RECIPE.yaml --data FOLDER" in notes
    assert "--iter_num: the reference ignores it" in notes
    config, _ = recipe("python eval_smkd.py --server fc100 --num_ways 10", tmp_path)
    assert (config.evaluation.resize, config.evaluation.crop, config.evaluation.way) == (256, 224, 10)
    assert config.data.dataset == "fc100"


NAMESPACE = argparse.Namespace(
    epochs=30, batch_size_per_gpu=16, world_size=2, lambda2=0.0, lambda3=1.0, global_crops_scale=(0.4, 1.0), gpu=0,
    data_path="/data/tiered_imagenet-480/train", supervised_contrastive=False, evaluate_freq=None, arch="vit_small",
)  # fmt: skip


def test_args_files_and_checkpoints(tmp_path: Path) -> None:
    texts = {
        "args.json": json.dumps(vars(NAMESPACE)),
        "args.txt": str(NAMESPACE),
        "args.yaml": "\n".join(f"{key}: {value}" for key, value in vars(NAMESPACE).items()),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    torch.save({"args": NAMESPACE, "teacher": {}}, tmp_path / "checkpoint.pth")
    for name in (*texts, "checkpoint.pth"):
        made = translate(tmp_path / name)
        (tmp_path / "r.yaml").write_text(made.text)
        config = api.resolve(str(tmp_path / "r.yaml"))
        assert (config.epochs, config.batch_size, config.devices) == (30, 32, 2), name
        assert config.data.dataset == "tiered-imagenet"
        assert config.global_views.scale == (0.4, 1.0)
        assert config.validation.every == 0
        assert any(note.startswith("--world_size, --gpu: no meaning here") for note in made.notes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("python train.py --lr 1", r"'.*command\.txt' runs neither of main_smkd\.py, eval_smkd\.py"),
        ("python main_smkd.py --lr fast", r"--lr: 'fast' is not a number"),
        ("python main_smkd.py --weighted_pool maybe", "--weighted_pool: 'maybe' is neither true nor false"),
        ("python main_smkd.py --arch vit_huge", "--arch: 'vit_huge' is none of vit_tiny"),
        ("python main_smkd.py stray --lr 1", "'stray' is no option"),
        ("python main_smkd.py --lr '1", "is not a command line: no closing quotation"),
        ("python main_smkd.py; python main_smkd.py", "2 commands; one file, one command"),
        ("python main_smkd.py --patch_size 15", r"=224 is not divisible by model\.patch_size=15; use 210"),
        ("python eval_smkd.py --server imagenet", "--server imagenet is none of mini"),
        ("python eval_smkd.py --evaluation_method svm", "--evaluation_method svm is none of cosine"),
    ],
)
def test_wrong_commands(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "command.txt").write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        translate(tmp_path / "command.txt")
    assert "\n" not in str(caught.value)


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read '.*none\.txt': No such file"):
        translate(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="holds no settings of a training script"):
        translate(files.saved({"model": {}}, tmp_path / "a.pth"))


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "command.txt").write_text(PHASE_1)
    shown = CliRunner().invoke(app, ["import-args", str(tmp_path / "command.txt")])
    assert shown.exit_code == 0
    assert "phase: pretrain" in shown.stdout
    assert "--prod_mode" not in shown.stdout
    assert "--prod_mode, --wandb_entity: no meaning here" in shown.stderr
    target = tmp_path / "mine.yaml"
    again = CliRunner().invoke(app, ["import-args", str(tmp_path / "command.txt"), "-o", str(target)])
    assert again.stdout == ""
    assert target.read_text() == shown.stdout
