"""A training run, described by one page of YAML.

A recipe has the sections `model`, `data`, `tokenizer` and `trainer`; `mixture` if other tasks are learned beside a
text; `calibration` if the thresholds are not to come from where the model's configuration says; `fit` if scores are to
be fitted before the first step; `schedule` if the share of attention is to change while the model trains; and `distill`
if it is to learn from its full-attention self. A field that is left out has its default, and an unknown field is an
error that names it. `section.field=value` on the command line changes one field.

Two of YAML's traps are closed here. A key that is given twice is refused, where YAML would let the later one win; and a
number written `2e-3` is a number, where YAML 1.1, and so PyYAML, reads a string.
"""

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from torch import nn
from transformers import LlamaConfig

from chiaroscuro.analysis.gates import TEXT
from chiaroscuro.data.tasks import ClassificationTask, Task, TextTask, make_task, task_options
from chiaroscuro.errors import UserError, suggest
from chiaroscuro.layers import ScoreRouter
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.model.fitting import fitted_sides
from chiaroscuro.model.loading import load_checkpoint_config, near_of
from chiaroscuro.retrofitting.routed_model import FIELD, RoutedConfig
from chiaroscuro.training.schedule import Course, Draws, Ramp

Count = Annotated[int, Field(gt=0, lt=2**63)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Part of a recipe: unknown fields are refused, types are not guessed, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ChiarSection(Section):
    """A CHIAR-Former: a preset, and the fields of [`ChiarConfig`][] that differ from it."""

    model_config = ConfigDict(extra="allow")

    architecture: Literal["chiar"] = "chiar"
    preset: str | None = None


class LlamaSection(Section):
    """The baseline that people know: `LlamaForCausalLM`, embeddings tied, initialised from N(0, 0.02)."""

    architecture: Literal["llama"]
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Count
    max_position_embeddings: Count = 2048


Folder = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A folder to write to; `~` is the user's home."""

LEAST_LEARNING_RATE = 1e-6
"""What a learning rate falls to, unless its recipe says otherwise."""

LORA = 16
"""The rank with which a retrofitted model is healed, unless its recipe says otherwise."""


class RetrofitSection(Section):
    """A retrofitted model that is to be healed: a folder, and the rank of LoRA on its attention; null trains all."""

    architecture: Literal["retrofit"]
    checkpoint: Annotated[str, Field(min_length=1)]
    lora: Count | None = LORA


ARCHITECTURES = ("chiar", "llama", "retrofit")


def _architecture(section: Any) -> str:
    """Which of the three a `model` section means; the CHIAR-Former unless it says otherwise."""
    named = section.get("architecture") if isinstance(section, Mapping) else getattr(section, "architecture", None)
    return named if named in ARCHITECTURES else ARCHITECTURES[0]


class DataSection(Section):
    """What to learn, and from what: the name of a task (`chiaroscuro.data.tasks`) and the options of this task.

    A sequence has `sequence_length` tokens. A text to be modelled is cut into blocks of this length; of a text to be
    classified, the first `sequence_length` tokens are read. Options that are not given get the task's defaults.
    """

    model_config = ConfigDict(extra="allow")

    task: str = "language-modelling"
    sequence_length: Count = 256

    @model_validator(mode="before")
    @classmethod
    def _with_the_options_of_the_task(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or not isinstance(content.get("task", ""), str):
            return content
        name = content.get("task", cls.model_fields["task"].default)
        known = [*cls.model_fields, *task_options(name)]
        for field, value in content.items():
            if field not in known:
                raise ValueError(f"{field}={value!r}: the task {name} has no such option; {suggest(field, known)}")
        own = {field: value for field, value in content.items() if field in cls.model_fields}
        return own | asdict(make_task(name, {field: content[field] for field in content.keys() - own.keys()}))

    @property
    def options(self) -> dict[str, Any]:
        """The task's options."""
        return dict(self.model_extra or {})

    def build_task(self) -> Task:
        """The task, with its options; nothing is loaded."""
        return make_task(self.task, self.options)


class MixtureSection(Section):
    """Mixed training: with probability `ratio`, a step also learns from a batch of one of `tasks`.

    Every task is a data section under a name of the recipe's choice; its `sequence_length` is the text's unless it says
    otherwise. All losses train the whole model. Source: arXiv 2606.08327, v2.
    """

    ratio: Annotated[float, Field(gt=0, le=1)] = 0.25
    tasks: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")], DataSection], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> "MixtureSection":
        for name in self.tasks:
            if name == TEXT or name == "training" or hasattr(nn.ModuleDict, name):
                raise ValueError(f"the name {name!r} is taken: call the task something else")
        return self


DECAYED = 0.2
"""The part of a run in which the learning rate falls, by `wsd`, unless `decay_steps` says it."""


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _two_numbers(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{value!r} needs two numbers, such as [0.9, 0.95]")
    return value


def _count_or_part(value: Any) -> Any:
    if value is None:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63
    if not whole and not (isinstance(value, float) and 0 < value <= 1):
        raise ValueError(f"{value!r} needs a number of steps, such as 1000, or a part of the run, such as 0.33")
    return value


def _in_steps(given: int | float, steps: int) -> int:
    """A number of steps, or a part of the run's, one at least."""
    return given if isinstance(given, int) else max(1, round(given * steps))


class TrainerSection(Section):
    """How long to train, how fast, and how often to look and save.

    A run begins with random weights, or with those of the checkpoint `init_from`, whose routing may be another: its
    menus, its routers and their shares. One step takes `batch_size` sequences per device, `gradient_accumulation`
    times. Exactly one of `steps`, `tokens` and `epochs` sets the length of the run; an epoch is as many whole steps as
    the data fill. The learning rate rises linearly for `warmup_steps`. Then it falls by a cosine to
    `min_learning_rate`, stays (`constant`), or stays and falls linearly in the last `decay_steps` (`wsd`). With `ema`
    the model that is validated, and that the run ends with, has the mean of the weights by `Averages`. Validation reads
    the whole split, or with `validation_tokens` the first rows that hold so many tokens, padding included; it happens
    after the checkpoint of its step. So many are read of each of `validation_texts`, too: names of your choice, each of
    a source whose validation split a language model is measured on beside its own. `training_texts` are other sources
    to learn from, each with the part of all rows that it gives; the rest are those of `data.source`, which an epoch
    reads once. With `fsdp` several processes hold a part each of the weights, their gradients and the optimizer's state
    (FSDP2), instead of all of them (DDP).
    """

    output_dir: Folder
    init_from: Annotated[str | None, Field(min_length=1)] = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # what NumPy takes
    steps: Count | None = None
    tokens: Count | None = None
    epochs: Count | None = None
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-3
    min_learning_rate: Rate = LEAST_LEARNING_RATE
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    learning_rate_schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    decay_steps: Annotated[int | float | None, BeforeValidator(_count_or_part)] = None
    ema: Annotated[float | None, Field(gt=0, lt=1)] = None
    weight_decay: Rate = 0.01
    # YAML has lists where Python has tuples, which strictness would tell apart.
    betas: Annotated[tuple[float, float], Field(strict=False), BeforeValidator(_two_numbers)] = (0.9, 0.95)
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: Count = 10
    evaluate_every: Count | None = None
    validation_tokens: Count | None = None
    validation_texts: dict[Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")], Annotated[str, Field(min_length=1)]] = {}
    training_texts: dict[Annotated[str, Field(min_length=1)], Annotated[float, Field(gt=0, lt=1)]] = {}
    save_every: Count = 500
    keep_checkpoints: Count = 2
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    report_to: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_one_or_several)] = []

    @model_validator(mode="after")
    def _consistent(self) -> "TrainerSection":
        if [self.steps, self.tokens, self.epochs].count(None) != 2:
            raise ValueError(
                f"steps={self.steps}, tokens={self.tokens} and epochs={self.epochs}: set exactly one of them, the "
                "others to null"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}")
        if self.decay_steps is not None and self.learning_rate_schedule != "wsd":
            raise ValueError(
                f"decay_steps={self.decay_steps} with learning_rate_schedule={self.learning_rate_schedule!r}: it goes "
                "with wsd; remove one"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: both must lie in [0, 1)")
        return self


class CalibrationSection(Section):
    """Where the routing thresholds come from.

    `running`: they follow the entropies of the data, towards the model's `attention_share`. `fixed`: as given in
    `thresholds`. `paper`: the 33rd and 67th percentile of H over a trained baseline's embeddings of the first 200
    validation rows (arXiv 2606.08327), fixed from then on. The baseline is the model in the folder `baseline`; if none
    is named, it is trained first, by this recipe with attention alone in every layer, in `output_dir`/baseline.
    """

    method: Literal["running", "fixed", "paper"] = "running"
    thresholds: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    baseline: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "CalibrationSection":
        for field, method in (("thresholds", "fixed"), ("baseline", "paper")):
            value = getattr(self, field)
            if value is not None and self.method != method:
                raise ValueError(f"method={self.method!r} with {field}={value!r}: {field} goes with method={method!r}")
        if self.method == "fixed" and self.thresholds is None:
            raise ValueError("method='fixed' with thresholds=None: give thresholds: [low, high]")
        return self


def _looks_by_score(config: ChiarConfig) -> bool:
    """Whether a layer picks by a score which tokens go to attention, so that there is a share of them."""
    return bool(config.routed_layers) and issubclass(config.router_class, ScoreRouter)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _range_of_shares(value: Any) -> Any:
    pair = value if isinstance(value, list | tuple) else []
    if len(pair) != 2 or not all(map(_is_share, pair)) or pair[0] > pair[1]:
        raise ValueError(f"{value!r} needs two numbers from 0 to 1, the smaller one first, such as [0.1, 1.0]")
    return value


class ShareSection(Section):
    """How one share changes from step to step.

    Either it moves linearly, `from` a share `to` another one in the first `steps` steps (a whole number, or a part of
    the run: 0.33), or in as many that come `after` some others, and stays there. Or it is drawn `between` two shares
    anew for each step; `[low, high]` in the place of this section says the same.
    """

    from_: Share | None = Field(None, alias="from")
    to: Share | None = None
    steps: Annotated[int | float | None, BeforeValidator(_count_or_part)] = None
    after: Annotated[int | float | None, BeforeValidator(_count_or_part)] = None
    between: Annotated[tuple[float, float] | None, Field(strict=False), BeforeValidator(_range_of_shares)] = None

    @model_validator(mode="before")
    @classmethod
    def _a_range_alone(cls, content: Any) -> Any:
        return {"between": content} if isinstance(content, list | tuple) else content

    @model_validator(mode="after")
    def _consistent(self) -> "ShareSection":
        if self.between is not None and {self.from_, self.to, self.steps, self.after} != {None}:
            raise ValueError("give either between, or from, to, steps and after, and not both")
        if self.between is None and None in (self.from_, self.steps):
            raise ValueError("give {from: 1.0, to: 0.25, steps: 0.33}, or a range to draw from, [0.1, 1.0]")
        return self

    def course(self, at_rest: float, steps: int, seed: str) -> Course:
        """The share through a run.

        Args:
            at_rest: Where a ramp ends, and what a drawn share is outside the steps: the model's own share.
            steps: Of the run.
            seed: Of the draws.

        Raises:
            ValueError: if the ramp is longer than the run.
        """
        if self.between is not None:
            return Draws(*self.between, at_rest, seed)
        assert self.from_ is not None and self.steps is not None  # `_consistent` has seen to it
        length, wait = _in_steps(self.steps, steps), 0 if self.after is None else _in_steps(self.after, steps)
        if wait + length > steps:
            late = f"after={wait} and steps={length} are" if wait else f"steps={length} is"
            raise ValueError(f"{late} more than the {steps} steps of the run; lower it or train longer")
        return Ramp(self.from_, at_rest, length, wait)


class ScheduleSection(Section):
    """Shares that change while the model trains. A share that is not named stays where the model's field says."""

    attention_share: ShareSection | None = None
    kv_share: ShareSection | None = None


class DistillSection(Section):
    """Learn from the model's full-attention self: what it says is predicted, too.

    The loss gets weight · T² · KL(p ‖ q), mean over the predictions: q is what the model predicts, p what the same
    weights predict with every token at attention, all of them kept and without dropout, both at temperature T. No
    gradient goes through p. The factor T² keeps the size of the gradient (arXiv 1503.02531). With `by_row` it is the
    mean over the rows of each row's own mean: a row of which little is predicted, such as a needle's answer, counts as
    much as one of which everything is. The text's own cross-entropy counts `cross_entropy` times.
    """

    cross_entropy: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    by_row: bool = False
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @property
    def factor(self) -> float:
        """What the mean divergence counts in the loss."""
        return self.weight * self.temperature**2


class FitSection(Section):
    """Fit the scores before the first step, with the weights of `trainer.init_from`, or `after` some steps.

    Those of each side whose router is `fitted`, at the model's own share of it, on the first `tokens` tokens of the
    training split. With `spread`, the shares are means over the layers, each of which gets its part by the harm that
    routing it does; see `chiaroscuro.fit`.
    """

    tokens: Count = 65536
    spread: bool = False
    after: Annotated[int | float | None, BeforeValidator(_count_or_part)] = None

    def step(self, steps: int) -> int | None:
        """Of a run of so many steps, those after which the scores are fitted; None for before the first one."""
        return None if self.after is None else _in_steps(self.after, steps)


class Recipe(Section):
    """Everything a training run needs to know. Read one with [`Recipe.load`][]."""

    model: Annotated[
        Annotated[ChiarSection, Tag("chiar")]
        | Annotated[LlamaSection, Tag("llama")]
        | Annotated[RetrofitSection, Tag("retrofit")],
        Discriminator(_architecture),
    ]
    data: DataSection = DataSection()
    mixture: MixtureSection | None = None
    tokenizer: Annotated[str, Field(min_length=1)] = "bpe:8192"
    trainer: TrainerSection
    calibration: CalibrationSection | None = None
    schedule: ScheduleSection | None = None
    distill: DistillSection | None = None
    fit: FitSection | None = None

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a recipe file, apply the overrides in order, and check the whole.

        Args:
            path: The YAML file.
            overrides: `"section.field=value"`, the value read as YAML (`model.attention_share=0.25`).

        Raises:
            UserError: if the file can't be read, is no YAML, or says something unknown, missing or
                impossible.
        """
        content = read_yaml(Path(path), "recipe", "model: and trainer:")
        for override in overrides:
            override_field(content, override)
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Recipe":
        """Check `content`, and make it a recipe.

        Raises:
            UserError: one line with the dotted name of the field, its value, and what it should be.
        """
        recipe = cls._validated(content)
        # An impossible model should be refused before minutes go into a tokenizer. Any vocabulary does for the check.
        recipe.build_config(vocab_size=256, thresholds=(0.0, 1.0) if recipe.uses_baseline else None)
        return recipe

    @classmethod
    def of_run(cls, path: str | Path) -> "Recipe":
        """Read the recipe of a run that has a model: what that began with need not be there any more.

        Raises:
            UserError: as `load`, but for what is wrong with the model.
        """
        return cls._validated(read_yaml(Path(path), "recipe", "model: and trainer:"))

    @classmethod
    def _validated(cls, content: Mapping[str, Any]) -> "Recipe":
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(one_line(error, content)) from None

    @property
    def uses_baseline(self) -> bool:
        """Whether the thresholds are measured on a trained baseline before the run."""
        return self.calibration is not None and self.calibration.method == "paper"

    def build_config(self, vocab_size: int, thresholds: tuple[float, float] | None = None) -> ChiarConfig | LlamaConfig:
        """Make the model's configuration.

        Args:
            vocab_size: The tokenizer's number of tokens.
            thresholds: The measured (low, high), for `calibration.method: paper`.

        Raises:
            UserError: if the model section contradicts itself, the calibration section or the data section.
        """
        config: Any
        if isinstance(self.model, LlamaSection):
            config = self._llama_config(self.model, vocab_size)
        elif isinstance(self.model, RetrofitSection):
            config = self._retrofit_config(self.model)
        else:
            config = self._chiar_config(self.model, vocab_size, thresholds)
            self._refuse_impossible_schedule(config)
            self._refuse_impossible_distillation(config)
            self._refuse_impossible_fit(config)
        read = {"data": self.data}
        if self.mixture is not None:
            read |= {f"mixture.tasks.{name}": data for name, data in self.mixture.tasks.items()}
        for name, data in read.items():
            if data.sequence_length > config.max_position_embeddings:
                raise UserError(
                    f"{name}.sequence_length={data.sequence_length} is longer than the model's "
                    f"max_position_embeddings={config.max_position_embeddings}"
                )
        return config

    @model_validator(mode="before")
    @classmethod
    def _ranges_to_the_schedule(cls, content: Any) -> Any:
        """Let a share of the model be a range: `attention_share: [0.1, 1.0]` is `schedule.attention_share`."""
        model = content.get("model") if isinstance(content, Mapping) else None
        if not isinstance(model, Mapping):
            return content
        ranges = {name: model[name] for name in ScheduleSection.model_fields if isinstance(model.get(name), list)}
        schedule = content.get("schedule") or {}
        if not ranges or not isinstance(schedule, Mapping):
            return content
        for name, value in ranges.items():
            if schedule.get(name) is not None:
                raise ValueError(
                    f"model.{name}={value!r} and schedule.{name}={schedule[name]!r} both change the share; keep one"
                )
            try:
                _range_of_shares(value)
            except ValueError as error:
                raise ValueError(f"model.{name}: {error}") from None
        model = {name: value for name, value in model.items() if name not in ranges}
        return {**content, "model": model, "schedule": {**schedule, **ranges}}

    @model_validator(mode="before")
    @classmethod
    def _as_healing_is(cls, content: Any) -> Any:
        """Of a retrofitted model: its own tokenizer, rows with needles, and its full-attention self as teacher."""
        if not isinstance(content, Mapping) or _architecture(content.get("model")) != "retrofit":
            return content
        data = content.get("data")
        data = {"task": "retrieval", **data} if isinstance(data, Mapping) else data or {"task": "retrieval"}
        model = content["model"] if isinstance(content["model"], Mapping) else {}
        # With LoRA the teacher stays as it was. Without, it learns along, and the text alone holds it.
        distill = {"cross_entropy": 1.0 if model.get("lora", LORA) is None else 0.0, "by_row": True}
        given = content.get("distill", {})
        distill = {**distill, **given} if isinstance(given, Mapping) else given
        return {"tokenizer": model.get("checkpoint"), **content, "data": data, "distill": distill}

    @model_validator(mode="before")
    @classmethod
    def _as_long_as_the_text(cls, content: Any) -> Any:
        """Give the tasks of a mixture the sequence length of the text, unless they have their own."""
        try:
            length, tasks = content["data"]["sequence_length"], content["mixture"]["tasks"]
            tasks = {name: {"sequence_length": length, **data} for name, data in tasks.items()}
        except (TypeError, KeyError, AttributeError):  # nothing to fill in, or nothing that the checks will let pass
            return content
        return {**content, "mixture": {**content["mixture"], "tasks": tasks}}

    @model_validator(mode="after")
    def _of_several_texts(self) -> "Recipe":
        names = self.trainer.validation_texts.keys()
        for field in ("validation_texts", "training_texts"):
            if getattr(self.trainer, field) and not isinstance(self.data.build_task(), TextTask):
                raise ValueError(f"trainer.{field} with data.task={self.data.task!r}: give them to a language model")
        if (parts := sum(self.trainer.training_texts.values())) >= 1:
            raise ValueError(f"trainer.training_texts are {parts:g} of the rows in all: leave some to data.source")
        if names & (self.mixture.tasks.keys() if self.mixture else set()):
            raise ValueError(
                "trainer.validation_texts has the name of a task of the mixture: call the text something else"
            )
        return self

    @model_validator(mode="after")
    def _mixed(self) -> "Recipe":
        if self.mixture is not None:
            if not isinstance(self.data.build_task(), TextTask):
                raise ValueError(f"mixture with data.task={self.data.task!r}: tasks are mixed into language modelling")
            if not isinstance(self.model, ChiarSection):
                named = self.model.architecture
                raise ValueError(f"mixture with model.architecture: {named}, which has no heads for tasks; remove one")
        return self

    @model_validator(mode="after")
    def _streamable(self) -> "Recipe":
        if self.data.options.get("streaming") and self.trainer.epochs is not None:
            raise ValueError(
                f"trainer.epochs={self.trainer.epochs} with data.streaming=true, whose length is not known; give "
                "trainer.steps or trainer.tokens"
            )
        for name, data in (self.mixture.tasks if self.mixture else {}).items():
            if data.options.get("streaming"):
                raise ValueError(f"mixture.tasks.{name}.streaming=true: the text alone can be streamed; remove it")
        return self

    @model_validator(mode="after")
    def _shardable(self) -> "Recipe":
        beside: dict[str, Any] = {
            "trainer.ema": self.trainer.ema,
            "fit": self.fit,
            "distill": self.distill,
            "mixture": self.mixture,
        }
        if isinstance(self.model, RetrofitSection):
            beside = {"model.architecture: retrofit": self.model}
        for name, given in beside.items() if self.trainer.fsdp else ():
            if given is not None:
                raise ValueError(f"trainer.fsdp=true with {name}, which needs whole weights; remove one")
        return self

    @model_validator(mode="after")
    def _suitable_tokenizer(self) -> "Recipe":
        self.data.build_task().refuse_tokenizer(self.tokenizer)
        for name, data in (self.mixture.tasks if self.mixture else {}).items():
            try:
                data.build_task().refuse_tokenizer(self.tokenizer)
            except UserError as error:
                raise UserError(
                    f"mixture.tasks.{name}: {error}; or remove the task, if the text can't be read by such a one"
                ) from None
        return self

    def _llama_config(self, section: LlamaSection, vocab_size: int) -> LlamaConfig:
        if self.calibration is not None:
            raise UserError("calibration sets routing thresholds, which model.architecture: llama lacks; remove it")
        if self.schedule is not None:
            raise UserError("schedule changes a share of routed tokens, of which model.architecture: llama has none")
        if self.distill is not None:
            raise UserError("distill learns from what routing leaves out, and model.architecture: llama routes nothing")
        if self.fit is not None:
            raise UserError("fit learns who is to be routed, and model.architecture: llama routes nothing; remove it")
        if isinstance(self.data.build_task(), ClassificationTask):
            raise UserError(
                f"data.task={self.data.task!r} with model.architecture: llama, which is here a language model alone; "
                "for full attention give a CHIAR-Former model.operators=[[attention], …]"
            )
        if section.hidden_size % (2 * section.num_attention_heads):
            raise UserError(
                f"model.hidden_size={section.hidden_size} must be an even multiple of "
                f"model.num_attention_heads={section.num_attention_heads}"
            )
        fields = section.model_dump(exclude={"architecture"})
        return LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=True, **fields)

    def _retrofit_config(self, section: RetrofitSection) -> Any:
        """The configuration of the checkpoint, which has been retrofitted and fitted."""
        for name in ("calibration", "fit"):
            if getattr(self, name) is not None:
                raise UserError(f"{name} with model.architecture: retrofit, whose scores are fitted already; remove it")
        if self.trainer.init_from is not None:
            raise UserError("trainer.init_from with model.architecture: retrofit: model.checkpoint says it; remove one")
        if not isinstance(self.data.build_task(), TextTask):
            raise UserError(f"data.task={self.data.task!r} with model.architecture: retrofit: give a text")
        try:
            config = load_checkpoint_config(section.checkpoint)
        except UserError as error:
            raise UserError(f"model.checkpoint: {error}") from None
        if not isinstance(config, RoutedConfig):
            raise UserError(
                f"model.checkpoint={section.checkpoint} was not retrofitted: run chiaroscuro retrofit, name its copy"
            )
        for name, share in self._scheduled().items():
            own = getattr(config, FIELD)[name]
            if share.to is not None and share.to != own:
                raise UserError(
                    f"schedule.{name}.to={share.to} and the checkpoint's {name}={own}: a healed model ends where it "
                    "was fitted; leave out to, or retrofit with another share"
                )
            if share.between is not None and not share.between[0] <= own <= share.between[1]:
                raise UserError(
                    f"schedule.{name}={list(share.between)} does not hold the checkpoint's {name}={own}, which a "
                    "healed model is validated and saved with: give a range that does"
                )
        return config

    def _chiar_config(
        self, section: ChiarSection, vocab_size: int, thresholds: tuple[float, float] | None
    ) -> ChiarConfig:
        changes = {**(section.model_extra or {})}
        if "vocab_size" in changes:
            raise UserError(
                f"model.vocab_size={changes['vocab_size']}: the tokenizer sets it; choose another tokenizer"
            )
        changes |= self._calibration_fields(changes, thresholds)
        changes |= self._shares_at_the_end(changes)
        # Another seed is another draw of everything, or an interval over seeds would be of one draw of the router's.
        changes.setdefault("router_seed", self.trainer.seed)
        try:
            # What transformers has for every model (num_labels, dtype, …), task and trainer set here, not the user.
            ChiarConfig.refuse_unknown(changes)
            if section.preset is None:
                return ChiarConfig(vocab_size=vocab_size, **changes)
            return ChiarConfig.preset(section.preset, vocab_size=vocab_size, **changes)
        except UserError as error:
            raise UserError(f"model: {error}") from None

    def _calibration_fields(self, changes: Mapping[str, Any], thresholds: tuple[float, float] | None) -> dict[str, Any]:
        if self.calibration is None:
            return {}
        for field in ("calibration", "entropy_thresholds"):
            if field in changes:
                raise UserError(
                    f"model.{field}={changes[field]!r} and calibration.method={self.calibration.method!r} "
                    "both say where the thresholds come from; keep one of them"
                )
        if self.calibration.method == "running":
            return {"calibration": "running"}
        if "attention_share" in changes and getattr(self.model, "preset", None) is not None:
            raise UserError(
                f"model.attention_share={changes['attention_share']!r} with calibration.method="
                f"{self.calibration.method!r}, whose thresholds are fixed and follow no share; remove one of them"
            )
        measured_or_given = thresholds if self.uses_baseline else self.calibration.thresholds
        assert measured_or_given is not None  # the section's own check, or the caller's measurement
        return {"calibration": "fixed", "entropy_thresholds": list(measured_or_given)}

    def _shares_at_the_end(self, changes: Mapping[str, Any]) -> dict[str, float]:
        """The model's own shares where the schedule names them: those that it ends with."""
        ends = {name: share.to for name, share in self._scheduled().items() if share.to is not None}
        for name, end in ends.items():
            if name in changes and changes[name] != end:
                raise UserError(
                    f"{name}={changes[name]!r} and schedule.{name}.to={end!r} both say where the share ends; keep one "
                    "of them"
                )
        return ends

    def _scheduled(self) -> dict[str, ShareSection]:
        """The shares that change, by the model's field."""
        fields = ScheduleSection.model_fields if self.schedule is not None else ()
        return {name: share for name in fields if (share := getattr(self.schedule, name)) is not None}

    def _refuse_impossible_schedule(self, config: ChiarConfig) -> None:
        for name, share in self._scheduled().items():
            place = f"schedule.{name}"
            if name == "kv_share" and not config.keeping_layers:
                raise UserError(
                    f"{place} with attention_context={config.attention_context!r}: no layer decides which tokens are "
                    "kept, so there is no share to change; set model.attention_context: kept, or remove it"
                )
            if name == "attention_share" and config.calibration == "fixed":
                raise UserError(
                    f"{place} with calibration='fixed': fixed thresholds follow no share; let them run "
                    "(calibration.method: running), or remove it"
                )
            if name == "attention_share" and not _looks_by_score(config):
                raise UserError(
                    f"{place} with router={config.router!r} and operators={config.operators}: no layer chooses between "
                    "operators by a score, so there is no share to change; remove it"
                )
            stated = getattr(config, name)
            if share.between is not None and not share.between[0] <= stated <= share.between[1]:
                raise UserError(
                    f"{place}={list(share.between)} does not hold model.{name}={stated}, which the model is validated "
                    f"and saved with: write the range there, and in model.{name} a share within it"
                )

    def _refuse_impossible_distillation(self, config: ChiarConfig) -> None:
        if self.distill is None:
            return
        if not _looks_by_score(config) and not config.keeping_layers:
            raise UserError(
                f"distill with router={config.router!r} and operators={config.operators}: no layer chooses between "
                "operators by a score, so there is no full attention to learn from; remove it"
            )
        if isinstance(self.data.build_task(), ClassificationTask):
            raise UserError(f"distill with data.task={self.data.task!r}: only predictions of tokens are distilled")

    def _refuse_impossible_fit(self, config: ChiarConfig) -> None:
        if self.fit is None:
            return
        if self.trainer.init_from is None and self.fit.after is None:
            raise UserError(
                "fit without trainer.init_from: scores are fitted on a trained model; name it, or set fit.after, the "
                "steps to train before, or remove fit"
            )
        if not (sides := fitted_sides(config)):
            raise UserError(
                f"fit with router={config.router!r} and kv_router={config.kv_router!r}: no layer decides by a fitted "
                "score; set model.router or model.kv_router to fitted, or remove fit"
            )
        if isinstance(self.data.build_task(), ClassificationTask):
            raise UserError(f"fit with data.task={self.data.task!r}: only the scores of a language model are fitted")
        for side in sides.values():
            if not 0 < side.share < 1:
                raise UserError(f"fit with {side.field}={side.share}: must be more than 0 and less than 1; change it")
            if self.fit.after is not None:
                self._refuse_routing_before_the_fit(side.field)
        if self.data.sequence_length <= (near := near_of(config)):
            raise UserError(
                f"fit with data.sequence_length={self.data.sequence_length}: all of a row is within the window and the "
                f"sinks, {near} tokens; take several times as many, or remove fit"
            )

    def _refuse_routing_before_the_fit(self, field: str) -> None:
        """A score that is not fitted yet must not decide: until then the share is 1."""
        course = self._scheduled().get(field)
        assert self.fit is not None
        if course is None or course.from_ != 1 or course.after is None:
            raise UserError(
                f"fit.after={self.fit.after} while {field} is less than 1 from the start, by a score not yet fitted; "
                f"set schedule.{field}: {{from: 1.0, after: {self.fit.after}, steps: 0.3}}"
            )

    def courses(self, steps: int) -> dict[str, Course]:
        """The shares that change in a run, by the model's field.

        Args:
            steps: Of the run.

        Raises:
            UserError: if one would not be where it ends when the run does.
        """
        courses: dict[str, Course] = {}
        if not (scheduled := self._scheduled()):
            return courses
        config: Any = self.build_config(vocab_size=256)
        shares = getattr(config, FIELD) if isinstance(config, RoutedConfig) else vars(config)
        for name, share in scheduled.items():
            try:
                courses[name] = share.course(shares[name], steps, f"{name} {self.trainer.seed}")
            except ValueError as error:
                raise UserError(f"schedule.{name}.{error}") from None
        if self.fit is not None and (fitted := self.fit.step(steps)) is not None:
            for field in (side.field for side in fitted_sides(cast(ChiarConfig, config)).values()):
                if courses[field].after(fitted) < 1:
                    raise UserError(
                        f"fit.after={self.fit.after} is later than schedule.{field}.after: until the scores are fitted "
                        "the share has to be 1; change one of them"
                    )
        return courses

    def steps(self, world_size: int = 1, rows: int | None = None) -> int:
        """Optimizer steps of the run on `world_size` processes; `tokens` is rounded up to whole steps.

        Args:
            world_size: The processes.
            rows: Sequences of the train split, which a length in epochs depends on.

        Raises:
            UserError: if the warm-up would not end before the run, or the length is in epochs and `rows` is not given.
        """
        if self.trainer.epochs is not None:
            if rows is None:
                raise UserError(
                    f"trainer.epochs={self.trainer.epochs}: the steps of an epoch are not known before the data are "
                    "loaded; set trainer.steps or trainer.tokens instead"
                )
            steps = self.trainer.epochs * (rows // self.sequences_per_step(world_size))
        else:
            wanted = self.trainer.tokens or 0
            steps = self.trainer.steps or -(-wanted // self.tokens_per_step(world_size))
        if self.trainer.warmup_steps >= steps:
            raise UserError(
                f"trainer.warmup_steps={self.trainer.warmup_steps} is not shorter than the {steps} steps of "
                "the run; lower it or train longer"
            )
        if self.trainer.warmup_steps + self.decay_steps(steps) > steps:
            raise UserError(
                f"trainer.warmup_steps={self.trainer.warmup_steps} and decay_steps={self.decay_steps(steps)} are more "
                f"than the {steps} steps of the run; lower one or train longer"
            )
        return steps

    def decay_steps(self, steps: int) -> int:
        """Of a run of so many steps, the last in which the learning rate falls, where it stayed before."""
        if self.trainer.learning_rate_schedule != "wsd":
            return 0
        return _in_steps(DECAYED if self.trainer.decay_steps is None else self.trainer.decay_steps, steps)

    def baseline(self) -> "Recipe":
        """The recipe that trains the baseline of `calibration.method: paper`."""
        config = self.build_config(vocab_size=256, thresholds=(0.0, 1.0))
        content = self._content()
        for section in ("calibration", "distill", "fit", "schedule"):
            content.pop(section, None)
        content["model"] |= {
            "operators": [["attention"]] * len(config.menus),
            "meta_router": "none",
            "calibration": "running",
        }
        whole = {"window": None, "sinks": 0, "attention_context": "all", "attention_spread": None, "kv_spread": None}
        content["model"] |= {name: value for name, value in whole.items() if getattr(config, name) != value}
        content["trainer"].pop("init_from", None)
        content["trainer"]["output_dir"] = str(Path(self.trainer.output_dir) / "baseline")
        return Recipe.from_dict(content)

    def sequences_per_step(self, world_size: int = 1) -> int:
        """Sequences that one optimizer step learns from, over all processes."""
        return self.trainer.batch_size * self.trainer.gradient_accumulation * world_size

    def tokens_per_step(self, world_size: int = 1) -> int:
        """Tokens that one optimizer step reads, over all processes, the padding of shorter texts included."""
        return self.sequences_per_step(world_size) * self.data.sequence_length

    def to_yaml(self) -> str:
        """The recipe with every default filled in, as YAML that `load` reads back."""
        return yaml.safe_dump(self._content(), sort_keys=False)

    def _content(self) -> dict[str, Any]:
        """All fields that are not null, and those of the model that are null in place of a preset's or a default."""
        content = self.model_dump(mode="json", exclude_none=True, by_alias=True)
        given = dict(self.model.model_extra or {})
        given |= {name: getattr(self.model, name) for name, i in type(self.model).model_fields.items() if i.default}
        content["model"] |= {name: None for name, value in given.items() if value is None}
        if isinstance(self.model, RetrofitSection) and self.distill is None:
            content["distill"] = None  # where nothing stands, `_as_healing_is` puts the teacher
        return content

    # What may change when a run is resumed: how often it looks, what it keeps, and where; and, as the run sees to, over
    # how many batches a step of the same rows is spread. All else moves the weights.
    _FREE_ON_RESUME = frozenset(
        f"trainer.{name}"
        for name in (
            *("output_dir", "log_every", "evaluate_every", "validation_tokens", "save_every", "keep_checkpoints"),
            *("report_to", "validation_texts", "gradient_accumulation"),
        )
    )

    _LENGTH = frozenset(f"trainer.{name}" for name in ("steps", "tokens", "epochs"))

    def _may_be_longer(self) -> bool:
        """Whether no step would have been another one in a longer run, so that a finished run can be extended."""
        parts = [self.fit.after] if self.fit is not None else []
        parts += [part for share in self._scheduled().values() for part in (share.steps, share.after)]
        if self.trainer.learning_rate_schedule != "constant" or any(isinstance(p, float) for p in parts):
            return False
        # A baseline is trained as long, and of a stream so many rows are fitted on as the run has.
        own_baseline = self.uses_baseline and self.calibration is not None and self.calibration.baseline is None
        return not own_baseline and (self.fit is None or not self.data.options.get("streaming"))

    def refuse_to_resume(self, begun: "Recipe") -> None:
        """Raise if this recipe would end with other weights than the one that the run began with.

        Raises:
            UserError: naming the first field that differs, and both values.
        """
        longer = self._may_be_longer()
        now, then = (_flat(recipe.model_dump(mode="json", by_alias=True)) for recipe in (self, begun))
        for name in dict.fromkeys([*now, *then]):
            # In the model section null overrides a preset, which is not the same as leaving the field out.
            unsaid = "not said" if name.startswith("model.") else None
            was, is_now = then.get(name, unsaid), now.get(name, unsaid)
            free = ".".join(name.split(".")[:2]) in self._FREE_ON_RESUME or (longer and name in self._LENGTH)
            if was != is_now and not free:
                raise UserError(
                    f"{name} was {was!r} when this run began and is {is_now!r} now; "
                    "put it back to resume, or start anew in another output_dir"
                )


# ---- YAML --------------------------------------------------------------------------------------------------


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes 2e-3 for a number and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # A merge key, `<<: *common`, may come to give a field again: what stands beside it is to win.
        names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} is given more than once", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds nothing but plain data
    # Beside its own errors PyYAML lets through those of a date such as 2001-99-99, a number of 5000 digits, and depth.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path, what: str, needs: str) -> dict[str, Any]:
    """Read a YAML file that holds sections.

    Args:
        path: The file.
        what: What it is, for messages: "recipe".
        needs: The sections that it must have, for messages too.

    Raises:
        UserError: if it can't be read, is not valid YAML, has a key twice, or has no sections.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{what} {path} can't be read: {reason}") from None
    content = _parse(text, f"{what} {path}")
    if not isinstance(content, dict):
        raise UserError(f"{what} {path} has no sections; it needs at least {needs}")
    return content


def override_field(content: dict[str, Any], override: str) -> None:
    """Put `section.field=value` into `content`, the value read as YAML.

    Raises:
        UserError: if it has another form, or the value is not valid YAML.
    """
    name, equals, value = override.partition("=")
    if not equals or not all(name.split(".")):
        raise UserError(f"override {override!r} is not of the form section.field=value")
    set_field(content, name, _parse(value, f"override {override!r}"))


def set_field(content: dict[str, Any], name: str, value: Any) -> None:
    """Put a value into nested sections, by its dotted name.

    Raises:
        UserError: if a section on the way there holds a value instead of fields.
    """
    *sections, field = name.split(".")
    inner = content
    for section in sections:
        below = inner.get(section, {})
        if not isinstance(below, dict):
            raise UserError(f"{name}={value!r}: {section!r} holds {below!r} and has no fields")
        inner[section] = inner = {**below}  # a copy: another section may be an alias of the same one
    inner[field] = value


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as {dotted name: value}."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


# ---- one line for a mistake --------------------------------------------------------------------------------

_SECTIONS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "model": LlamaSection,  # a chiar section passes unknown fields on to ChiarConfig, which names its own
    "data": DataSection,
    "mixture": MixtureSection,
    "mixture.tasks.*": DataSection,
    "trainer": TrainerSection,
    "calibration": CalibrationSection,
    "schedule": ScheduleSection,
    "schedule.*": ShareSection,
    "distill": DistillSection,
    "fit": FitSection,
}


def one_line(
    error: ValidationError,
    content: Mapping[str, Any],
    *,
    sections: Mapping[str, type[BaseModel]] = _SECTIONS,
    what: str = "recipe",
) -> str:
    """The first of pydantic's findings as `section.field=value: what is wrong`.

    Args:
        error: What pydantic found.
        content: What it was given.
        sections: The class of every section, by its dotted name; the whole file is "", and `*` stands for any name.
        what: What the file is.
    """
    first = error.errors(include_url=False)[0]
    # The tag of a union member stands in pydantic's path, but not in the user's file.
    path = [str(part) for i, part in enumerate(first["loc"]) if not (i == 1 and part in ARCHITECTURES)]
    name, given = ".".join(path), first["input"]
    if not isinstance(content, Mapping):
        return f"a {what} is a mapping of sections: {', '.join(sections[''].model_fields)}"
    if first["type"] == "extra_forbidden":
        place = ".".join(path[:-1])
        section = sections[place if place in sections else ".".join([*path[:-2], "*"])]
        if section is LlamaSection and _architecture(content.get("model")) == "retrofit":
            section = RetrofitSection
        fields = section.model_fields
        known = [info.alias or field for field, info in fields.items()]
        return f"{name}={given!r}: unknown field; {suggest(path[-1], known)}"
    if first["type"] == "missing":
        return f"{name} is missing from the {what}; set it"
    if first["type"] == "value_error":
        return f"{name}: {first['ctx']['error']}" if name else str(first["ctx"]["error"])
    if name == "model.architecture":  # pydantic knows the one section that it took this for
        return f"{name}={given!r}: {suggest(str(given), ARCHITECTURES)}"
    if first["type"] in ("model_type", "model_attributes_type", "dict_type") and not isinstance(given, Mapping):
        return f"{name}={given!r}: give fields, as in {path[-1]}: {{name: value}}"
    if first["type"] in ("too_short", "string_too_short") and not given:
        return f"{name}={given!r}: is empty; give at least {first['ctx'].get('min_length', 1)}"
    if isinstance(given, Mapping):
        return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return f"{name}={given!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
