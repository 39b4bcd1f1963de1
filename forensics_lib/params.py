"""Parameters of a run: one validated model, loaded from one YAML file.

Unknown keys, wrong types and contradictions fail with the key, what was found and what is allowed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from forensics_lib.utils.callables import PATTERN
from forensics_lib.utils.files import project_root

PROBABILITY: dict[str, Any] = {"ge": 0.0, "le": 1.0}
ONLY_A: dict[str, Any] = {"json_schema_extra": {"tasks": "A"}}  # a key that only Task A uses
ONLY_B: dict[str, Any] = {"json_schema_extra": {"tasks": "B"}}
NOT_PREDICTING: dict[str, Any] = {"json_schema_extra": {"tasks": ""}}  # a key that predictions do not depend on


class ParamsError(ValueError):
    """The parameters are not valid; the message names each key, what was found and what is allowed."""


# Keys of earlier versions: the value in force now, and the reason why files with them are refused
REMOVED: dict[str, tuple[Any, str]] = {
    "mixup": (0.0, "it did not help (docs/quality.md)"),
    "cutmix": (0.0, "it did not help (docs/quality.md)"),
    "label_smoothing": (0.0, "it did not help (docs/quality.md)"),
    "mask_loss": ("bce_dice", "focal_dice and bce_lovasz did not help (docs/localization.md); cross-entropy and Dice are used"),
    "boundary_weight": (0.0, "nothing showed that it helps"),
    "residual_branch": (True, "the decoder always sees noise residuals, which help (docs/localization.md)"),
    "fr_share": (0.5, "half of an epoch's manipulated images are fully regenerated"),
    "tile_overlap": (64, "tiles overlap by 64 pixels, or half of tile_size where that is less"),
    "aligned.side": (512, "twins are of squares of at most 512 pixels"),
    "aligned.mix": (0.5, "up to half of a photograph is mixed into its twin"),
    "forgeries.side": (512, "forgeries are of squares of at most 512 pixels"),
}
LAYOUTS = (
    "own", "cnndetection", "corvi_ldm", "itw_sm", "genimage", "community_forensics", "folders", "authentic", "table", "parquet",
    "tgif", "task_b_validation", "sagi_d",
)  # fmt: skip


class DataSet(BaseModel):
    """A data set read in place: an entry of the ``data`` parameter."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str = Field(description="folder of the data set, or a CSV file")
    layout: str | None = Field(
        None, description="how it is laid out, or module:function of a reader; null: recognised by what lies in it"
    )
    split: Literal["train", "val", "test"] | None = Field(
        None, description="split of its images; null: as names of folders and files, or a table, tell"
    )
    task: Literal["A", "B"] | None = Field(
        None, description="the task it serves; null: B where it has masks. B without masks: its authentic images alone"
    )
    coco_root: str | None = Field(None, description="corvi_ldm: the folder of COCO's train2017 images")
    lsun_root: str | None = Field(None, description="corvi_ldm: CNNDetection's train folder")

    @model_serializer(mode="wrap")
    def _as_named(self, dump: Callable[[DataSet], dict[str, Any]]) -> dict[str, Any]:
        """Omit ``task`` if it is null, as older runs recorded entries: their trainings are recognised by this."""
        return {key: value for key, value in dump(self).items() if key != "task" or value}

    @field_validator("layout")
    @classmethod
    def _known_layout(cls, value: str | None) -> str | None:
        if value is not None and value not in LAYOUTS and not re.fullmatch(PATTERN, value):
            raise ValueError(
                f"no layout {value!r}; there are {', '.join(LAYOUTS)}, and module:function of a reader of your own"
            )
        return value

    @model_validator(mode="after")
    def _validation_data_stays_validation_data(self) -> DataSet:
        if self.layout == "itw_sm" and self.split == "train":
            raise ValueError("ITW-SM is the validation set and must not be trained on: leave its split out")
        return self


Scales = tuple[Annotated[float, Field(gt=0, le=4)], Annotated[float, Field(gt=0, le=4)]]
Shrinking = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]
Qualities = tuple[Annotated[int, Field(ge=1, le=100)], Annotated[int, Field(ge=1, le=100)]]
Sigmas = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]


class Degradations(BaseModel):
    """Probabilities and ranges of the degradations of training crops, both classes alike; ranges are [lowest, highest]."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    own: str | None = Field(None, pattern=f"^{PATTERN}$", description="module:function that changes crops first; null: none")
    resize: float = Field(0.3, **PROBABILITY, description="probability of scaling, by a random kernel")
    resize_scale: Scales = Field((0.5, 1.5), description="range of the scale")
    blur: float = Field(0.1, **PROBABILITY, description="probability of Gaussian blur")
    blur_sigma: Sigmas = Field((0.3, 1.5), description="range of the blur's sigma, pixels")
    noise: float = Field(0.1, **PROBABILITY, description="probability of Gaussian noise")
    noise_sigma: Sigmas = Field((1.0, 6.0), description="range of the noise's sigma, grey levels")
    double_jpeg: float = Field(0.1, **PROBABILITY, description="probability of a JPEG compression before the next")
    jpeg: float = Field(0.4, **PROBABILITY, description="probability of JPEG")
    jpeg_quality: Qualities = Field((55, 97), description="range of JPEG's quality")
    webp: float = Field(0.15, **PROBABILITY, description="probability of WebP where JPEG did not happen")
    webp_quality: Qualities = Field((55, 97), description="range of WebP's quality")
    social: float = Field(0.7, **PROBABILITY, description="probability of an upload: shrinking, then JPEG 4:2:0")
    social_scale: Shrinking = Field((0.5, 1.0), description="range of an upload's scale")
    social_quality: Qualities = Field((60, 92), description="range of an upload's JPEG quality")

    @field_validator("*")
    @classmethod
    def _lowest_first(cls, value: Any) -> Any:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError("a range is [lowest, highest]")
        return value


class Generated(BaseModel):
    """Training images made of photographs by an autoencoder."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    autoencoder: str = Field("own", pattern=rf"own|{PATTERN}", description="own, or module:function that returns a callable")
    count: int = Field(10_000, ge=1, description="photographs to use, at most")


class Aligned(Generated):
    """Synthetic twins of the training photographs."""


class Forgeries(Generated):
    """Forgeries made from the authentic training images, in addition to the given manipulated ones."""


class Keys(BaseModel):
    """A group of parameters; group and mark say what a key affects."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: Any) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true and false are not allowed here")
        return value


class RunKeys(Keys):
    """What the run is."""

    run_name: str = Field("constrained", description="name of the run; its files in outputs/ begin with it")
    run_type: Literal["constrained", "open"] = Field(
        "constrained", description="constrained: official data only; open: dataset_open as well"
    )
    tasks: list[Literal["A", "B"]] = Field(["A", "B"], description="A: real or synthetic; B: manipulated regions")
    detector: str | None = Field(
        None, pattern=f"^{PATTERN}$", description="module:function to use instead of a trained model; null: a model is trained"
    )
    ensemble: list[str] | None = Field(
        None, min_length=2, description="runs whose models are averaged instead of training one; null: none"
    )
    team: str = Field("teamname", description="team name, first part of the archive names")
    edition: Literal[2025, 2026] = Field(2025, description="challenge year; 2026: Task A as plain CSV, Task B of fr alone")
    seed: int = Field(0, ge=0, lt=2**64, description="seed of every random choice")


class DataKeys(Keys):
    """Where the images are.  Changed data is recognised by the files found, not by these keys."""

    data_root: str = Field("data", description="folder with dataset, dataset_open, dataset_taskB and test")
    data: list[DataSet] | None = Field(None, description="data sets where they lie; null: data_root's folders")
    sample: bool = Field(False, description="use the built-in sample instead of data_root")
    aligned: Aligned | None = Field(
        None, **ONLY_A, description="open runs, Task A: synthetic twins of the photographs; null: none"
    )
    forgeries: Forgeries | None = Field(
        None, **ONLY_B, description="open runs, Task B: forgeries of the photographs; null: none"
    )
    kind: Literal["sp", "fr", "both"] | None = Field(
        None, **ONLY_B, description="Task B: manipulated images that train and decide; null: both, in edition 2026 fr"
    )
    test_folder_a: str | None = Field(None, **ONLY_A, description="Task A test images; null: <data_root>/test/taskA")
    test_folder_b: str | None = Field(None, **ONLY_B, description="Task B test images; null: <data_root>/test/taskB")


class ModelKeys(Keys):
    """The network and its loss; they affect training."""

    backbone: str = Field("convnext_base", description="any timm model name")
    pretrained: bool = Field(True, description="start from pretrained weights")
    pretrained_file: str | None = Field(None, description="local weight file to use instead of timm's download")
    frontend: Literal["rgb", "srm"] = Field("rgb", description="what the network sees: RGB, or RGB and SRM noise residuals")
    decoder_channels: int = Field(128, ge=16, multiple_of=16, **ONLY_B, description="Task B decoder width, channels")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth rate of the backbone, probability")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout of the backbone's features in the classifier, probability")
    mask_weight: float = Field(1.0, ge=0, **ONLY_B, description="Task B loss = cross-entropy + mask_weight x mask loss")
    authentic_weight: float = Field(
        4.0, ge=0, **ONLY_B, description="how many times the pixels of authentic images count in the mask loss"
    )


class TrainingKeys(Keys):
    """Optimisation, sampling and augmentation; they affect training."""

    crop_size: int = Field(224, ge=32, description="side of the training crops at native resolution, pixels")
    batch_size: int = Field(64, ge=1, description="crops in a batch")
    epochs_head: int = Field(2, ge=0, description="step 1, backbone frozen, epochs")
    epochs_finetune: int = Field(6, ge=0, description="step 2, last backbone stages trained too, epochs")
    finetune_stages: int | Literal["all"] = Field(1, description="how many of the last backbone stages step 2 trains, or all")
    lr_head: float = Field(1e-3, gt=0, description="peak learning rate of step 1")
    lr_finetune: float = Field(1e-4, gt=0, description="peak learning rate of step 2")
    warmup: float = Field(0.0, **PROBABILITY, description="share of each step's updates in which the rate rises")
    weight_decay: float = Field(0.05, ge=0, description="AdamW weight decay, not applied to biases and norms")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the weights' moving average per update; 0: none")
    layer_decay: float = Field(1.0, gt=0, le=1, description="factor of the rate from each backbone layer to the one below")
    lora_rank: int = Field(0, ge=0, description="rank of adapters that step 2 trains instead of backbone weights; 0: none")
    balance: Literal["class", "source"] = Field(
        "class", description="what an epoch draws equally often: the classes, or within each the sources too"
    )
    paste: float = Field(
        0.4,
        **PROBABILITY,
        **ONLY_B,
        description="Task B: share of authentic crops that get a region from elsewhere, and count as spliced",
    )
    degrade: Degradations = Field(
        Degradations(), **ONLY_A, description="Task A: what happens to training crops: JPEG, scaling, ..."
    )
    degrade_b: Degradations = Field(
        Degradations(social=0.0), **ONLY_B, description="Task B: the same for its crops; keys left out have their defaults"
    )
    equalize: Literal["auto", "always", "never"] = Field(
        "always", description="recompress every training crop alike; auto: where format or quality tell the class"
    )
    val_limit: int = Field(2000, ge=2, description="validation images scored after each epoch (all at the end)")


class InferenceKeys(Keys):
    """Inference: they affect predictions, not training."""

    crops_per_image: int = Field(
        5, ge=1, **ONLY_A, description="Task A: native crops scored per image: centre, then most textured"
    )
    robustness_images: int = Field(300, ge=2, **NOT_PREDICTING, description="validation images of the robustness sweep")
    tile_size: int = Field(512, ge=32, **ONLY_B, description="Task B: side of the tiles, pixels")
    mask_scales: Literal["pyramid"] | list[float] = Field(
        "pyramid", **ONLY_B, description="Task B: scales at which an image is looked at, a list, or pyramid: 1, 1/2, ..."
    )
    mask_flips: bool = Field(False, **ONLY_B, description="Task B: whether the mirrored image is looked at too")
    copy_move: bool = Field(False, **ONLY_B, description="Task B: whether parts that an image holds twice count as manipulated")


class MachineKeys(Keys):
    """Hardware and processes; they affect rounding only."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: a CUDA GPU where there is one")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 or else fp16 where the machine computes it fast, else fp32"
    )
    deterministic: bool = Field(False, description="GPU: the same results each time, more slowly; a CPU gives them always")
    processes: int = Field(1, ge=1, description="processes on this machine that train and infer together, one for each GPU")
    workers: int | Literal["auto"] = Field("auto", description="processes that load images; auto: one per core, at most 16")


class Params(MachineKeys, InferenceKeys, TrainingKeys, ModelKeys, DataKeys, RunKeys):  # keys of the last group come first
    """Every parameter of a run.  The defaults are the real constrained run on a GPU."""

    @field_validator("run_name", "team")
    @classmethod
    def _file_name(cls, value: str) -> str:
        if not value or not all(c.isalnum() or c in "-_." for c in value) or value.startswith((".", "-")):
            raise ValueError("must be a file name part: letters, digits, '-', '_' and '.', not starting with '.' or '-'")
        if value.endswith("_taskB"):
            raise ValueError("must not end with _taskB, as the files of Task B of another run do")
        return value

    @field_validator("mask_scales", mode="before")
    @classmethod
    def _scales(cls, value: Any) -> Any:
        scales = value if isinstance(value, list | tuple) and value else [None]
        if value != "pyramid" and not all(isinstance(scale, int | float) and 0.25 <= scale <= 4 for scale in scales):
            raise ValueError("must be pyramid, or a list of numbers from 0.25 to 4")
        return value

    @field_validator("tasks")
    @classmethod
    def _distinct_tasks(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError("must be [A], [B] or [A, B]")
        return sorted(value)

    @field_validator("finetune_stages", "workers")
    @classmethod
    def _not_negative(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError("must be 0 or more")
        return value

    @model_validator(mode="after")
    def _no_contradictions(self) -> Params:
        if self.pretrained_file and not self.pretrained:
            raise ValueError("pretrained_file is given but pretrained is false: set pretrained: true, or remove the file")
        if self.detector and self.ensemble:
            raise ValueError("detector and ensemble are both given: leave one of them out")
        if self.aligned and self.run_type == "constrained":
            raise ValueError("aligned twins are for open runs: set run_type: open, or aligned: null")
        if self.forgeries and self.official_only("B"):
            raise ValueError("forgeries are for open runs and edition 2026: set run_type: open, or forgeries: null")
        if self.lora_rank and self.finetune_stages == 0:
            raise ValueError("lora_rank adapts the last finetune_stages, and there are none: set lora_rank: 0, or more stages")
        if self.epochs_head + self.epochs_finetune == 0:
            raise ValueError("epochs_head and epochs_finetune are both 0: nothing would be trained")
        return self

    @field_validator("frontend", mode="before")
    @classmethod
    def _removed_frontend(cls, value: Any) -> Any:
        if value in ("npr", "bayar"):
            raise ValueError("removed in 0.2: it found no more than srm does (docs/quality.md); set srm or rgb")
        return value

    def seed_for(self, *numbers: int) -> int:
        """A seed in [0, 2**32), the range of NumPy's and pandas' legacy interfaces, that differs for other ``numbers``."""
        return int(np.random.SeedSequence(self.seed, spawn_key=numbers).generate_state(1)[0])

    def official_only(self, task: str) -> bool:
        """Whether a task may train on official data alone: in constrained runs, but Task B of edition 2026 on any."""
        return self.run_type == "constrained" and not (task == "B" and self.edition >= 2026)

    @property
    def trains(self) -> bool:
        """Whether the run trains a model of its own."""
        return not (self.detector or self.ensemble)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of manipulated images of Task B that train and decide: sp, fr."""
        kind = self.kind or ("fr" if self.edition >= 2026 else "both")
        return ("sp", "fr") if kind == "both" else (kind,)

    @property
    def tile_overlap(self) -> int:
        """Overlap of neighbouring tiles, pixels."""
        return min(64, self.tile_size // 2)

    def of_training(self, task: str) -> dict[str, Any]:
        """The parameters that affect a task's training, apart from its data, as plain values."""
        keys = {"seed", "run_type", *keys_of(ModelKeys, task), *keys_of(TrainingKeys, task)}
        return self.model_dump(mode="json", include=keys)

    def of_prediction(self, task: str) -> dict[str, Any]:
        """The parameters that affect the predictions of a trained model of a task, as plain values."""
        return self.model_dump(mode="json", include={*keys_of(InferenceKeys, task), "crop_size"})


TEXT = {name for name, field in Params.model_fields.items() if field.annotation in (str, str | None)}


def keys_of(group: type[Keys], task: str) -> list[str]:
    """The keys of a group that a task uses."""
    return [name for name, field in group.model_fields.items() if task in _tasks_of(field)]


def _tasks_of(field: FieldInfo) -> str:
    mark = field.json_schema_extra
    return str(mark.get("tasks", "AB")) if isinstance(mark, dict) else "AB"


def without_removed(values: dict[str, Any]) -> dict[str, Any]:
    """Parameters recorded by an earlier version, without removed keys that have the values in force now."""
    kept = {key: value for key, value in values.items() if key not in REMOVED or value != REMOVED[key][0]}
    for group in ("aligned", "forgeries"):
        if isinstance(kept.get(group), dict):
            inner = {f"{group}.{key}": value for key, value in kept[group].items()}
            kept[group] = {key.partition(".")[2]: value for key, value in without_removed(inner).items()}
    return kept


def load_params(path: str | Path, overrides: dict[str, Any] | None = None) -> Params:
    """Load a YAML file, found as by ``find_params``, and validate its parameters, of which ``overrides`` replaces some.

    Raises ``ParamsError``, which lists every problem, and ``FileNotFoundError``.
    """
    file = find_params(path)
    try:
        text = file.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{file} is not a YAML file: {error}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{file} must hold lines 'key: value'; found {type(values).__name__}")
    return make_params(values | _as_written(text) | (overrides or {}), origin=str(path))


def _as_written(text: str) -> dict[str, str]:
    """Text parameters that YAML parses as numbers, dates or booleans, as written: ``team: 007`` is a name."""
    node = yaml.compose(text, yaml.SafeLoader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    taken = ("int", "float", "bool", "timestamp")
    return {key.value: value.value for key, value in pairs if key.value in TEXT and value.tag.rpartition(":")[2] in taken}


def find_params(path: str | Path) -> Path:
    """Find a file of parameters, from the project's folder or the working directory."""
    places = [project_root() / Path(path).expanduser(), Path.cwd() / path]
    for place in places:
        if place.is_file():
            return place
    shipped = ", ".join(f"params/{p.name}" for p in sorted((project_root() / "params").glob("*.yaml")))
    raise FileNotFoundError(f"no parameter file {path} (looked at {places[0]}); shipped: {shipped}")


def make_params(values: dict[str, Any], origin: str) -> Params:
    """Validate ``values``; ``origin`` names their source in the error."""
    try:
        return Params(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors()]
        raise ParamsError(f"{origin}: {len(problems)} problem(s)\n  " + "\n  ".join(dict.fromkeys(problems))) from None


_NESTED: dict[str, type[BaseModel]] = {"data": DataSet, "aligned": Aligned, "forgeries": Forgeries}
_NESTED |= {"degrade": Degradations, "degrade_b": Degradations}


def _problem(item: ErrorDetails) -> str:
    """One of pydantic's errors as a line: key, value found, and what is allowed."""
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        owner = _NESTED.get(str(item["loc"][0]), Params) if len(item["loc"]) > 1 else Params
        known = list(owner.model_fields)
        if key in REMOVED:
            return f"{key}: removed in 0.2: {REMOVED[key][1]}. Delete this line"
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key (value {item['input']!r}); {hint}"
    message = item["msg"].removeprefix("Value error, ")
    if not key:
        return message
    meaning = Params.model_fields[str(item["loc"][0])].description
    return f"{key}: found {item['input']!r}; {message[0].lower() + message[1:]} ({meaning})"


KEY = re.compile(r"(?:^|\s)([A-Za-z_]\w*)=")
QUOTED = re.compile(r""""(?:\\.|[^"\\])*"|'(?:''|[^'])*'""")
PLAIN = re.compile(r"[\w./@%+:,~-]+")
NOTHING = ("", "null", "~")  # values that set an optional text parameter to null
OPTIONAL = {name for name in TEXT if Params.model_fields[name].annotation is not str}


class SettingError(ValueError):
    """A setting cannot be read, or a parameter is set twice; the message says what to write."""


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Parse ``["batch_size=8", "tasks=[A] team=007"]`` to a dict; values are YAML, those of text parameters stay text.

    An entry may hold several settings: each begins at ``KEY=`` outside of quotes and brackets, so values may hold spaces.
    Raises ``SettingError``.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        for key, text in _pairs(setting):
            value = _value(key, text)
            if key in found:
                raise SettingError(f"{key} is set twice, to {found[key]!r} and to {value!r}; leave one of them out")
            found[key] = value
    return found


def settings_text(values: dict[str, Any]) -> str:
    """Values as one string that ``parse_settings`` parses to the same values."""
    return " ".join(f"{key}={_written(value)}" for key, value in values.items())


def _written(value: Any) -> str:
    if isinstance(value, str) and PLAIN.fullmatch(value) and value not in NOTHING:
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _pairs(setting: str) -> Iterator[tuple[str, str]]:
    setting = setting.strip()
    starts = list(KEY.finditer(setting))
    if not starts or starts[0].start():
        raise SettingError(
            f"a setting is KEY=VALUE, such as batch_size=8; found {setting!r} (quote a value with blanks: --set 'tasks=[A, B]')"
        )
    current = starts[0]
    for following in starts[1:]:
        if _complete(setting[current.end() : following.start()]):
            yield current[1], setting[current.end() : following.start()]
            current = following
    yield current[1], setting[current.end() :]


def _complete(text: str) -> bool:
    """Whether a value is complete: its quotes and brackets are closed."""
    text = text.strip()
    if text.startswith(('"', "'")):
        return QUOTED.fullmatch(text) is not None
    if text.startswith(("[", "{")):
        bare = QUOTED.sub("", text)
        return sum(map(bare.count, "[{")) <= sum(map(bare.count, "]}"))
    return True


def _value(key: str, text: str) -> Any:
    text = text.strip()
    try:
        quoted = QUOTED.fullmatch(text) is not None
        if quoted:
            text = str(yaml.safe_load(text))
        if key not in TEXT:
            return yaml.safe_load(text)
        if not quoted and text.startswith(('"', "'")):
            raise SettingError(f"{key}={text}: the quote is not closed")
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or "not YAML"
        raise SettingError(
            f"{key}={text}: the value cannot be read ({why}); lists are [A, B], mappings {{name: value}}, true and false "
            f"are truth values; in a shell, quote all of it: --set '{key}=...'"
        ) from None
    return None if key in OPTIONAL and not quoted and text in NOTHING else text
