"""Command lines and kept settings of the reference's scripts as recipes of ours."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from smkd.config import foreign_text, loading
from smkd.errors import ConfigError
from smkd.reference.option_table import EVALUATION_OPTIONS, TRAINING_OPTIONS, DottedSettings, Option, flag, number
from smkd.weights import read, recognise

SCRIPTS: dict[str, Mapping[str, Option]] = {"main_smkd.py": TRAINING_OPTIONS, "eval_smkd.py": EVALUATION_OPTIONS}
SERVERS = {"mini": "mini-imagenet", "tiered": "tiered-imagenet", "fs": "cifar-fs", "fc100": "fc100"}
WEIGHTS = (".pth", ".pt", ".bin", ".ckpt")
FIRST = ("phase", "epochs", "batch_size")
"""What every recipe that extends no other says."""
PROCESSES = ("nproc_per_node", "nproc-per-node")


@dataclass(frozen=True)
class Translation:
    """A recipe, and what became of the options that are not in it.

    Attributes:
        text: the recipe as YAML.
        notes: one line each.
    """

    text: str
    notes: tuple[str, ...]


def translate(path: Path) -> Translation:
    """The recipe for a command line, an args file (JSON, YAML or a printed Namespace), or a checkpoint's settings.

    Raises:
        ConfigError: unreadable, no settings of the reference, or a value that does not fit.
    """
    if path.suffix in WEIGHTS:
        options = recognise.options_of(read.read_weights(path))
        if not options:
            raise ConfigError(f"'{path}' holds no settings of a training script (no 'args')")
        return _recipe(options, "main_smkd.py", _processes(options, path), str(path))
    try:
        text = foreign_text.text_of(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read '{path}': not a text") from error
    options = _as_settings(text)
    if options:
        script = "eval_smkd.py" if "server" in options else "main_smkd.py"
        return _recipe(options, script, _processes(options, path), str(path))
    return _recipe(*_as_command(text, path), str(path))


def _as_settings(text: str) -> dict[str, Any]:
    """Options of an args file; none if the text is a command line."""
    namespace = re.search(r"Namespace\((.*)\)\s*$", text.strip(), re.DOTALL)
    if namespace is not None:
        try:
            call = ast.parse(f"f({namespace[1]})", mode="eval").body
            words = call.keywords if isinstance(call, ast.Call) else []
            return {word.arg: ast.literal_eval(word.value) for word in words if word.arg}
        # the last two where it is nested too deep
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return {}
    try:
        values = foreign_text.parsed(text) if text.lstrip().startswith("{") else foreign_text.value(text)
    except ValueError:
        return {}
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _processes(options: Mapping[str, Any], path: Path) -> int:
    try:
        return max(1, int(number(options.get("world_size") or 1)))
    except ConfigError as error:
        raise ConfigError(f"'{path}': world_size: {error}") from None


def _as_command(text: str, path: Path) -> tuple[dict[str, Any], str, int]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    try:
        words = shlex.split(re.sub(r";|&&", " ; ", "\n".join(lines).replace("\\\n", " ")))
    except ValueError as error:
        raise ConfigError(f"'{path}' is not a command line: {str(error).lower()}") from error
    commands: list[list[str]] = [[]]
    for word in words:
        if word == ";":
            commands.append([])
        elif word != "\\":  # left over at the end of the text
            commands[-1].append(word)
    ours = [each for each in commands if any(PurePosixPath(word).name in SCRIPTS for word in each)]
    if not ours:
        raise ConfigError(f"'{path}' runs neither of {', '.join(SCRIPTS)}, and holds no settings of them")
    if len(ours) > 1:
        raise ConfigError(f"'{path}' holds {len(ours)} commands; one file, one command")
    words = ours[0]
    place = next(place for place, word in enumerate(words) if PurePosixPath(word).name in SCRIPTS)
    launcher, script = _parsed(words[:place], path), PurePosixPath(words[place]).name
    processes = next((number(launcher[name]) for name in PROCESSES if name in launcher), 1)
    options = _parsed(words[place + 1 :], path, strict=True)
    return options, script, int(processes)


def _parsed(words: list[str], path: Path, *, strict: bool = False) -> dict[str, Any]:
    """Values by option; a list where there are several, true where there is none."""
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, _, value = word.lstrip("-").partition("=")
            current = values.setdefault(name, [])
            current.extend([value] if value else [])
        elif current is not None:
            current.append(word)
        elif strict:
            raise ConfigError(f"'{path}': '{word}' is no option (--name value)")
    return {name: found[0] if len(found) == 1 else found or True for name, found in values.items()}


def _recipe(options: Mapping[str, Any], script: str, processes: int, file: str) -> Translation:
    table = SCRIPTS[script]
    known: dict[str, Any] = {name: option.default for name, option in table.items()}
    reasons: dict[str, list[str]] = {}
    for name, value in options.items():
        if name in table and not table[name].meaningless:
            known[name] = value
        else:
            why = f"no meaning here, {table[name].meaningless}" if name in table else f"not an option of {script}"
            reasons.setdefault(why, []).append(f"--{name}")
    notes = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
    settings: DottedSettings = {}
    for name, option in table.items():
        if option.keys and (known[name], option.default) != (None, None):
            try:
                settings |= dict.fromkeys(option.keys, option.convert(known[name]))
            except ConfigError as error:
                raise ConfigError(f"'{file}': --{name}: {_line(error)}") from None
    try:
        more, extra = _training(known, processes) if script == "main_smkd.py" else _evaluation(known)
        text = _dumped(more | settings, f"From {PurePosixPath(file).name}, settings of the published code.")
    except ConfigError as error:
        raise ConfigError(f"'{file}': {_line(error)}") from None
    return Translation(text, (*notes, *extra))


def _line(error: ConfigError) -> str:
    """A message in one line, as options may hold anything."""
    return " ".join(str(error).split())[:400]


def _training(known: Mapping[str, Any], processes: int) -> tuple[DottedSettings, list[str]]:
    notes = []
    labels = flag(known["supervised_contrastive"])
    settings: DottedSettings = {"phase": "distill" if labels else "pretrain"}
    settings["epochs"] = int(number(known["epochs"]))
    settings["batch_size"] = int(number(known["batch_size_per_gpu"])) * processes
    settings["devices"] = processes
    dataset = "folder"
    if known["data_path"]:
        folder = PurePosixPath(str(known["data_path"]))
        root = folder.parent if folder.name in ("train", "base") else folder
        dataset = next((own for own in SERVERS.values() if own.split("-")[0] in root.name.lower()), "folder")
        settings["data.root"] = str(root)
        if dataset == "folder":
            notes.append(f"--data_path: '{root.name}' is none of the known data sets; data.dataset=folder")
    settings["data.dataset"] = dataset
    if known["pretrained_path"]:
        settings["init"] = str(PurePosixPath(str(known["pretrained_path"])) / str(known["pretrained_file"] or ""))
        notes.append("--pretrained_path: the reference also takes over the optimiser's state; init takes the weights")
    if not flag(known["shared_head"]):
        settings["head.num_patch_prototypes"] = int(number(known["patch_out_dim"]))
    if flag(known["shared_head"]) != flag(known["shared_head_teacher"]):
        notes.append("--shared_head_teacher: student and teacher are alike here; --shared_head decides")
    if not flag(known["use_masked_im_modeling"]):
        settings |= {"mask.ratio": [0.0], "mask.ratio_jitter": [0.0]}
    if flag(known["supervised_loss"]):
        settings["objective.supervised.weight"] = number(known["celoss_coefficient"])
        notes.append("--supervised_loss: here a classifier of the [CLS] token, there one of the head's output")
    for name, ours in (("norm_in_head", None), ("act_in_head", "gelu"), ("optimizer", "adamw")):
        if known[name] not in (ours, str(ours)):
            notes.append(f"--{name} {known[name]}: cannot be translated; here it is {ours or 'none'}")
    if number(known["lambda2"]):
        settings["objective.patch.matching"] = "reference"
        notes.append("patch term: as the published code computes it; objective.patch.matching=paper is the paper's")
    if known["partition"] != "val":
        notes.append("--partition: the best checkpoint is chosen on validation classes here, never on test classes")
    measured = _measured(known, dataset)
    return settings | {f"validation.{key}": value for key, value in measured.items()} | _parts(known), notes


def _evaluation(known: Mapping[str, Any]) -> tuple[DottedSettings, list[str]]:
    if str(known["server"]) not in SERVERS:
        raise ConfigError(f"--server {known['server']} is none of {', '.join(SERVERS)}")
    dataset = SERVERS[str(known["server"])]
    notes = []
    if int(number(known["iter_num"])) != EVALUATION_OPTIONS["iter_num"].default:
        notes.append("--iter_num: the reference ignores it and always takes 10000 episodes; taken as it is meant")
    source = str(PurePosixPath(str(known["ckp_path"])) / str(known["ckpt_filename"])) if known["ckp_path"] else "FILE"
    notes.append(f"measure with: smkd eval {source} --recipe RECIPE.yaml --data FOLDER")
    settings = {f"evaluation.{key}": value for key, value in _measured(known, dataset).items()}
    settings |= {"extends": f"{dataset}-distill", "evaluation.episodes": int(number(known["iter_num"]))}
    if known["partition"] != "test":
        settings["evaluation.split"] = known["partition"]
    return settings | _parts(known), notes


def _measured(known: Mapping[str, Any], dataset: str) -> DottedSettings:
    family = "cifar" if dataset in ("cifar-fs", "fc100") else "imagenet"
    method = str(known["evaluation_method"])
    heads = {"cosine": "prototype", "knn": f"knn:neighbours={known['top_k']}", "classifier": "classifier"}
    if method not in heads:
        raise ConfigError(f"--evaluation_method {method} is none of {', '.join(heads)}")
    return {
        "way": number(known["num_ways"]), "head": heads[method], "resize": number(known[f"img_size_{family}"]),
        "crop": number(known[f"img_resize_{family}"]),
    }  # fmt: skip


def _parts(known: Mapping[str, Any]) -> DottedSettings:
    named = {"cls_tokens": "cls", "avgpool_patchtokens": "mean", "weighted_avgpool_patchtokens": "weighted_mean"}
    return {"features.parts": [ours for theirs, ours in named.items() if flag(known[theirs])]}


def _dumped(settings: DottedSettings, summary: str) -> str:
    """As YAML, without what is the default anyway, checked."""
    values: dict[str, Any] = {"summary": summary}
    extends = settings.pop("extends", None)
    if extends is not None:
        values["extends"] = extends
        base = loading.resolve(extends)
    else:
        base = loading.check({key: settings[key] for key in FIRST})
    plain = base.model_dump(mode="json")
    for key, value in settings.items():
        *groups, last = key.split(".")
        inner, default = values, plain
        for group in groups:
            default = default[group]
        if key not in FIRST and value == default[last]:
            continue
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    for group in ("global_views", "local_views"):  # given whole or not at all
        if group in values:
            values[group] = {key: settings[f"{group}.{key}"] for key in ("count", "size", "scale")}
    loading.changed(base, {key: value for key, value in values.items() if key not in ("summary", "extends")})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
