"""A recipe: every number of a run, strictly typed, from a YAML file plus `key=value` overrides."""

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from ..config import Config
from ..data.params import AugmentConfig
from ..errors import UserError
from ..nn.backbones import is_map_network
from ..nn.build import NetworkConfig, THeadConfig
from .schedule import Duration, in_steps

Fraction = Annotated[float, Field(ge=0, le=1)]
Floats = Annotated[
    tuple[float, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]
Ints = Annotated[
    tuple[PositiveInt, ...],
    Field(min_length=1),
    BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v),
]


class DataConfig(Config):
    root: str | None = None  # a folder, list, tar, table, array or URL: data.open_source
    channels: Literal[1, 3] = 3
    mean: Floats = (0.485, 0.456, 0.406)
    std: Floats = (0.229, 0.224, 0.225)
    workers: NonNegativeInt = 8  # processes that prepare batches, or threads of dali; 0: neither
    # Who decodes and crops: pillow (the reference), cpu, dali; auto: the fastest that is there.
    loader: Literal["auto", "cpu", "dali", "pillow"] = "auto"
    drop_last: bool = True  # false: the last batch of an epoch is filled up with its first pictures
    check: bool = True  # every picture is decoded once before training, and what is good cached
    max_bad: Fraction = 0.01  # a larger share of unreadable pictures stops the run at once

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> "DataConfig":
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.channels:
                raise ValueError(f"{key} needs {self.channels} values, one a channel")
        if min(self.std) <= 0:
            raise ValueError("std must be > 0")
        return self


class ScheduleConfig(Config):
    lr: PositiveFloat
    final_lr: NonNegativeFloat  # not scaled with the batch (official)
    weight_decay: NonNegativeFloat
    final_weight_decay: NonNegativeFloat


class OptimizerConfig(ScheduleConfig):
    # torch's fused sgd and adamw, timm's lars, and NVIDIA apex's for GPUs (apex.py).
    name: Literal["sgd", "adamw", "lars", "apex-sgd", "apex-adamw", "apex-lamb"]
    momentum: Fraction = 0.9  # of sgd, lars and apex-sgd
    trust: PositiveFloat = 0.001  # of lars: a step's length in that of its tensor, at lr 1

    @model_validator(mode="after")
    def _lamb_decays(self) -> "OptimizerConfig":
        if self.name == "apex-lamb" and self.weight_decay == self.final_weight_decay == 0:
            raise ValueError(
                "weight_decay: LAMB adapts the tensors that are decayed, at 0 it is AdamW: set a "
                "weight_decay, or name=apex-adamw"
            )
        return self


class TemperatureWarmup(Config):
    self: Duration
    cross: Duration
    search: Duration


class ModelConfig(NetworkConfig):
    weights: str | None = None  # a file a new run's backbone starts from, with its library's names
    cross_weight: NonNegativeFloat = 1.0  # lambda of this model's cross and search losses
    optimizer: OptimizerConfig
    t_head_optimizer: ScheduleConfig | None = None  # None: the T-Head is trained like the rest
    clip: PositiveFloat | None = 3.0  # gradient norm of each tensor
    temperature_warmup: TemperatureWarmup


class LossConfig(Config):
    student_temperature: PositiveFloat = 0.1
    warmup_teacher_temperature: PositiveFloat = 0.04
    teacher_temperature: PositiveFloat = 0.07
    center_momentum: Fraction = 0.9
    # Logits are stored (fused, reference) or not (fused-linear); auto: what is faster and fits.
    prototypes: Literal["auto", "fused-linear", "fused", "reference"] = "auto"


class TeacherConfig(Config):
    momentum: Fraction = 0.996
    final_momentum: Fraction = 1.0


class TrainConfig(Config):
    duration: Duration
    batch: PositiveInt  # pictures an optimizer step, all micro-batches together
    accumulate: PositiveInt = 1
    warmup: Duration = "10ep"
    freeze_last_layers: Duration = "1ep"
    lr_batch: PositiveInt | None = 256  # lr is for this batch and scales with it; null: as it is
    # auto: bf16 where the device multiplies it faster, else fp32.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    max_skipped: PositiveInt = 10  # non-finite steps in a row that end the run
    channels_last: bool = True
    # The step recorded, then launched by one call, with sgd and adamw alone; auto: for networks
    # of timm on one GPU, where the rest of the recipe goes with it.
    cuda_graph: Literal["auto", True, False] = False
    # Transformer blocks and searches by torch.compile; auto: where the step is recorded.
    compile: Literal["auto", True, False] = "auto"
    # A ViT's global and local crops in one pass; auto: where networks.packs_crops says faster.
    pack_crops: Literal["auto", True, False] = "auto"
    checkpoint_activations: bool = False  # true: less memory, more time, no packs
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: PositiveInt = 10
    checkpoint_every: Duration = "1ep"
    keep_checkpoints: PositiveInt = 2  # the newest ones; the older are there if one is damaged
    seed: int = Field(0, ge=0, lt=2**64)
    wandb: str | None = None  # a project of Weights & Biases that is told what TensorBoard is

    @model_validator(mode="after")
    def _divides(self) -> "TrainConfig":
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch={self.batch} must be a multiple of accumulate={self.accumulate}"
            )
        if self.pack_crops is True and self.checkpoint_activations:
            raise ValueError(
                "pack_crops and checkpoint_activations exclude each other: set one of them to false"
            )
        return self

    @model_validator(mode="after")
    def _can_be_recorded(self) -> "TrainConfig":
        if self.cuda_graph is not True:
            return self
        if self.accumulate > 1:
            raise ValueError(
                "cuda_graph: a graph's gradients overwrite those before, and micro-batches add "
                "theirs up: set accumulate=1 or cuda_graph=false"
            )
        if self.checkpoint_activations:  # PyTorch's own limit
            raise ValueError(
                "cuda_graph: checkpoint_activations reads the state of the random numbers, which "
                "cannot be recorded: set one of them to false"
            )
        return self


class EvaluateConfig(Config):
    train: str | None = None  # labelled: one folder a class
    test: str | None = None
    every: Duration | None = None  # kNN of the teachers while they train; null: never
    resize: PositiveInt | None = None  # shorter side; null: global size * 256 / 224
    k: Ints = (10, 20)
    train_limit: PositiveInt | None = None  # null: all of them
    test_limit: PositiveInt | None = None

    @field_validator("every")
    @classmethod
    def _never_is_null(cls, every: Duration | None) -> Duration | None:
        if every is not None and float(every.rstrip("epit%")) == 0:
            raise ValueError("0 is no interval; null evaluates never, 1it after every step")
        return every


class Recipe(Config):
    name: str
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    models: Annotated[
        tuple[ModelConfig, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
    ] = Field(min_length=1, max_length=2)
    prototypes: PositiveInt = 65536
    t_head: THeadConfig | None = THeadConfig()
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _pairs_share_a_head(self) -> "Recipe":
        if len(self.models) == 2 and self.t_head is None:
            raise ValueError("t_head: two models need one, the search goes through it")
        return self

    @model_validator(mode="after")
    def _batch_norm_has_rows(self) -> "Recipe":
        rows = self.train.batch // self.train.accumulate * (self.augment.locals or 2)
        if rows < 2 and any(model.mlp_head.batch_norm for model in self.models):
            raise ValueError(
                "train.batch: one picture with one local crop is one row, and BatchNorm in an "
                "MLP-Head needs two: raise train.batch or augment.locals"
            )
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML alone reads 1e-4 as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


def published_recipes() -> list[str]:
    folder = resources.files("mokd_fast") / "recipes"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_recipe(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Recipe:
    """A published recipe's name, a YAML file or a dict, with `key=value` overrides on top.

    Keys are dotted paths (`train.batch=64`, `models.0.name=resnet18`); `pair=A+B` names the two
    models. Raises UserError that names the key and the nearest right one.
    """
    tree = source if isinstance(source, dict) else _read(source)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r} is not key=value")
        try:
            value = yaml.load(text, _Loader) if text else None
        except yaml.YAMLError as error:
            raise UserError(f"override {override!r}: the value is not valid YAML") from error
        tree = _with_pair(tree, str(value)) if key == "pair" else _set(tree, key, value)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, tree)) from error


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        if str(source) not in published_recipes():
            raise UserError(
                f"no recipe {str(source)!r}: give a .yaml file or one of "
                f"{', '.join(published_recipes())}"
            )
        path = Path(str(resources.files("mokd_fast") / "recipes" / f"{source}.yaml"))
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is not a text file in UTF-8: {error}") from error
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} must be a mapping of keys, got {type(tree).__name__}")
    return tree


def _set(tree: Any, key: str, value: Any, done: str = "") -> Any:
    """`tree` with the value at the dotted path replaced; the original is left alone."""
    first, _, rest = key.partition(".")
    if isinstance(tree, list):
        if not (first.isdigit() and int(first) < len(tree)):
            raise UserError(
                f"key {done}{key}: {first!r} must be a number from 0 to {len(tree) - 1}"
            )
        i = int(first)
        new = _set(tree[i], rest, value, f"{done}{first}.") if rest else value
        return [*tree[:i], new, *tree[i + 1 :]]
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"key {done}{key}: {done[:-1]} is a value ({tree!r}), with no keys in it")
    branch = dict(tree or {})
    branch[first] = _set(branch.get(first), rest, value, f"{done}{first}.") if rest else value
    return branch


def _with_pair(tree: dict[str, Any], pair: str) -> dict[str, Any]:
    """Two names in place of the recipe's models; CNNs take the first row, the others the last."""
    names = pair.split("+")
    if len(names) != 2 or not all(names):
        raise UserError(f"pair={pair}: two model names joined by +, as resnet50+vit_small")
    rows = tree.get("models")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"pair={pair}: the recipe has no list of models for it to name")
    data = tree.get("data")
    channels = data.get("channels", 3) if isinstance(data, dict) else 3
    if named := [i for i, row in enumerate(rows) if row.get("weights")]:
        raise UserError(
            f"pair={pair}: models.{named[0]}.weights is of the network named before; write pair= "
            f"in front of it, or models.{named[0]}.weights= first, which takes it away"
        )
    models = [
        {**(rows[0] if is_map_network(name, channels) else rows[-1]), "name": name, "kwargs": {}}
        for name in names
    ]
    return {**tree, "models": models}


def _explain(error: ValidationError, tree: Any) -> str:
    lines = []
    for found in error.errors():
        key = ".".join(str(part) for part in found["loc"]) or "recipe"
        if found["type"] == "extra_forbidden":
            near = _nearest(key, _known_keys(tree))
            hint = f"; did you mean {near}?" if near else ""
            lines.append(f"unknown key {key}{hint}")
        else:
            got = "" if found["type"] == "missing" else f", got {found['input']!r}"
            message = found["msg"].removeprefix("Value error, ")
            if found["type"] == "value_error" and isinstance(found["input"], dict | Config):
                got = ""
            lines.append(f"{key}: {message}{got}")
    return "the recipe has mistakes:\n  " + "\n  ".join(lines)


def _nearest(key: str, known: list[str]) -> str | None:
    """A key beside it with nearly its name, one of its name elsewhere, or the most alike."""
    parent, _, last = key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    if near := difflib.get_close_matches(last, beside, n=1, cutoff=0.6):
        return beside[near[0]]
    same = [k for k in known if k.rpartition(".")[2] == last]
    found = difflib.get_close_matches(key, same or known, n=1, cutoff=0.0 if same else 0.5)
    return found[0] if found else None


def _known_keys(tree: Any) -> list[str]:
    """Every key a recipe can have, dotted, with one row for each model of this one."""
    models = tree.get("models") if isinstance(tree, dict) else None
    rows = len(models) if isinstance(models, list) else 1

    def walk(section: type[BaseModel], prefix: str) -> list[str]:
        keys = []
        for name, field in section.model_fields.items():
            inner = _section(field.annotation)
            keys.append(prefix + name)
            places = [f"{name}.{i}" for i in range(rows)] if name == "models" else [name]
            for place in places:
                if inner is not None:
                    keys.extend(walk(inner, f"{prefix}{place}."))
        return keys

    return walk(Recipe, "")


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for a in get_args(annotation) if (s := _section(a)) is not None), None)


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of the run; UserError when a warm-up or the freeze is longer than it."""
    train = recipe.train
    total = in_steps(train.duration, steps_per_epoch)
    if train.duration.endswith("%") or total < 1:
        raise UserError(f"train.duration={train.duration}: at least one step, as 100ep or 5000it")
    durations = {"train.warmup": train.warmup, "train.freeze_last_layers": train.freeze_last_layers}
    for i, model in enumerate(recipe.models):
        for kind, duration in model.temperature_warmup:
            durations[f"models.{i}.temperature_warmup.{kind}"] = duration
    long = {
        key: f"{key}={duration} is {steps} steps"
        for key, duration in durations.items()
        if (steps := in_steps(duration, steps_per_epoch, total)) > total
    }
    if long:
        raise UserError(
            f"{', '.join(sorted(long.values()))}: longer than the run (train.duration="
            f"{train.duration} is {total} steps). Shorten it, or write it in %: "
            f"{' '.join(f'{key}=10%' for key in sorted(long))}"
        )
    return total
