"""A training run, said in one page of YAML.

A recipe has five sections: `model`, `data`, `tokenizer`, `trainer` and, if the thresholds should come from
somewhere else than the model's own configuration says, `calibration`. Whatever it leaves out has a default;
whatever it says that nobody knows is an error that names the field. `section.field=value` on the command line
changes one field.

Two things are checked here rather than hoped for. A key that YAML would silently let win over an earlier one
of the same name is refused, and a number written `2e-3` is a number (YAML 1.1, and so PyYAML, reads it as
text).
"""

import difflib
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from transformers import LlamaConfig

from chiaroscuro.config import ChiarConfig
from chiaroscuro.errors import UserError

Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """Part of a recipe: no unknown fields, no guessing at types, no change once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ChiarSection(Section):
    """A CHIAR-Former: a preset, and whatever field of [`ChiarConfig`][] shall differ from it."""

    model_config = ConfigDict(extra="allow")

    architecture: Literal["chiar"] = "chiar"
    preset: str | None = None


class LlamaSection(Section):
    """What every new architecture owes a comparison: `LlamaForCausalLM`, embeddings tied, init N(0, 0.02)."""

    architecture: Literal["llama"]
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Count
    max_position_embeddings: Count = 2048


def _architecture(section: Any) -> str:
    """Tell which of the two a `model` section means; one that doesn't say means the CHIAR-Former."""
    named = section.get("architecture") if isinstance(section, Mapping) else getattr(section, "architecture", None)
    return "llama" if named == "llama" else "chiar"


class DataSection(Section):
    """Text to learn from: `python-docs`, a folder or a Hub name; a sequence is so many predictions."""

    source: str = "python-docs"
    sequence_length: Count = 256


class TrainerSection(Section):
    """How long, how fast, in what steps, and how often to look.

    One step takes `batch_size` sequences per device, `gradient_accumulation` times. The run is as long as
    `steps` or `tokens` says, one of them. The learning rate rises linearly for `warmup_steps` and falls by a
    cosine to `min_learning_rate`.
    """

    output_dir: str
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Count | None = None
    tokens: Count | None = None
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-3
    min_learning_rate: Rate = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Rate = 0.01
    # YAML has lists where Python has tuples, which strictness would tell apart.
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: Count = 10
    evaluate_every: Count | None = None
    save_every: Count = 500
    keep_checkpoints: Count = 2
    gradient_checkpointing: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "TrainerSection":
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(f"steps={self.steps} and tokens={self.tokens}: set exactly one of them, the other to null")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: both must lie in [0, 1)")
        return self


class CalibrationSection(Section):
    """Where the routing thresholds come from.

    `running`: they follow the entropies seen, towards the model's `attention_share`. `fixed`: as given in
    `thresholds`. `paper`: the 33rd and 67th percentile of H over a trained `baseline`'s embeddings of the
    first 200 validation rows (SPEC §3, arXiv 2606.08327), and fixed from then on.
    """

    method: Literal["running", "fixed", "paper"] = "running"
    thresholds: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    baseline: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "CalibrationSection":
        for field, method in (("thresholds", "fixed"), ("baseline", "paper")):
            value = getattr(self, field)
            if (value is not None) != (self.method == method):
                raise ValueError(f"method={self.method!r} with {field}={value!r}: {field} goes with method={method!r}")
        return self


class Recipe(Section):
    """Everything a training run needs to know. Read one with [`Recipe.load`][]."""

    model: Annotated[
        Annotated[ChiarSection, Tag("chiar")] | Annotated[LlamaSection, Tag("llama")],
        Discriminator(_architecture),
    ]
    data: DataSection = DataSection()
    tokenizer: Annotated[str, Field(min_length=1)] = "bpe:8192"
    trainer: TrainerSection
    calibration: CalibrationSection | None = None

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
        content = _read_yaml(Path(path))
        for override in overrides:
            _override(content, override)
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Recipe":
        """Check `content`, and make it a recipe.

        Raises:
            UserError: one line with the dotted name of the field, its value, and what it should be.
        """
        try:
            recipe = cls.model_validate(content)
        except ValidationError as error:
            raise UserError(_one_line(error, content)) from None
        # An impossible model should be said before minutes go into a tokenizer: any vocabulary does for the
        # check.
        recipe.build_config(vocab_size=256, thresholds=(0.0, 1.0) if recipe.uses_baseline else None)
        return recipe

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
        if isinstance(self.model, LlamaSection):
            config: ChiarConfig | LlamaConfig = self._llama_config(self.model, vocab_size)
        else:
            config = self._chiar_config(self.model, vocab_size, thresholds)
        if self.data.sequence_length > config.max_position_embeddings:
            raise UserError(
                f"data.sequence_length={self.data.sequence_length} is longer than the model's "
                f"max_position_embeddings={config.max_position_embeddings}"
            )
        return config

    def _llama_config(self, section: LlamaSection, vocab_size: int) -> LlamaConfig:
        if self.calibration is not None:
            raise UserError("calibration sets routing thresholds, which model.architecture: llama lacks; remove it")
        if section.hidden_size % (2 * section.num_attention_heads):
            raise UserError(
                f"model.hidden_size={section.hidden_size} must be an even multiple of "
                f"model.num_attention_heads={section.num_attention_heads}"
            )
        fields = section.model_dump(exclude={"architecture"})
        return LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=True, **fields)

    def _chiar_config(
        self, section: ChiarSection, vocab_size: int, thresholds: tuple[float, float] | None
    ) -> ChiarConfig:
        changes = {**(section.model_extra or {})}
        if "vocab_size" in changes:
            raise UserError(
                f"model.vocab_size={changes['vocab_size']}: the tokenizer sets it; choose another tokenizer"
            )
        changes |= self._calibration_fields(changes, thresholds)
        try:
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
        measured_or_given = thresholds if self.uses_baseline else self.calibration.thresholds
        assert measured_or_given is not None  # the section's own check, or the caller's measurement
        return {"calibration": "fixed", "entropy_thresholds": list(measured_or_given)}

    def steps(self, world_size: int = 1) -> int:
        """Optimizer steps of the run on `world_size` processes; `tokens` is rounded up to whole steps.

        Raises:
            UserError: if the warm-up would not end before the run.
        """
        wanted = self.trainer.tokens or 0
        steps = self.trainer.steps or math.ceil(wanted / self.tokens_per_step(world_size))
        if self.trainer.warmup_steps >= steps:
            raise UserError(
                f"trainer.warmup_steps={self.trainer.warmup_steps} is not shorter than the {steps} steps of "
                "the run; lower it or train longer"
            )
        return steps

    def sequences_per_step(self, world_size: int = 1) -> int:
        """Sequences that one optimizer step learns from, over all processes."""
        return self.trainer.batch_size * self.trainer.gradient_accumulation * world_size

    def tokens_per_step(self, world_size: int = 1) -> int:
        """Predictions that one optimizer step learns from, over all processes."""
        return self.sequences_per_step(world_size) * self.data.sequence_length

    def to_yaml(self) -> str:
        """Write the recipe with every default filled in, as YAML that `load` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)

    # What may change when a run is resumed: how often one looks, what is kept, and where. All else moves the
    # weights.
    _FREE_ON_RESUME = frozenset(
        f"trainer.{name}" for name in ("output_dir", "log_every", "evaluate_every", "save_every", "keep_checkpoints")
    )

    def refuse_to_resume(self, begun: "Recipe") -> None:
        """Raise if this recipe would end with other weights than the one that the run began with.

        Raises:
            UserError: naming the first field that differs, and both values.
        """
        now, then = _flat(self.model_dump(mode="json")), _flat(begun.model_dump(mode="json"))
        for name in dict.fromkeys([*now, *then]):
            if name not in self._FREE_ON_RESUME and now.get(name) != then.get(name):
                raise UserError(
                    f"{name} was {then.get(name)!r} when this run began and is {now.get(name)!r} now; "
                    "put it back to resume, or start anew in another trainer.output_dir"
                )


# ---- YAML --------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, that knows 2e-3 for a number and refuses a key said twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is said more than once", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds nothing but plain data
    except yaml.YAMLError as error:
        raise UserError(f"{what} is no valid YAML: {' '.join(str(error).split())}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"recipe {path} can't be read: {reason}") from None
    content = _parse(text, f"recipe {path}")
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} has no sections; it needs at least model: and trainer:")
    return content


def _override(content: dict[str, Any], override: str) -> None:
    """Put `section.field=value` into `content`."""
    name, equals, value = override.partition("=")
    *sections, field = name.split(".")
    if not equals or not all([*sections, field]):
        raise UserError(f"override {override!r} has not the form section.field=value")
    inner = content
    for section in sections:
        inner = inner.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {section!r} holds {inner!r} and has no fields")
    inner[field] = _parse(value, f"override {override!r}")


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
    "trainer": TrainerSection,
    "calibration": CalibrationSection,
}


def _one_line(error: ValidationError, content: Mapping[str, Any]) -> str:
    """Put the first of pydantic's findings as `section.field=value: what is wrong`."""
    first = error.errors(include_url=False)[0]
    # The tag of a union member stands in pydantic's path, but not in the user's file.
    path = [str(part) for i, part in enumerate(first["loc"]) if not (i == 1 and part in ("chiar", "llama"))]
    name, given = ".".join(path), first["input"]
    if not isinstance(content, Mapping):
        return "a recipe is a mapping of sections: model, data, tokenizer, trainer, calibration"
    if first["type"] == "extra_forbidden":
        known = list(_SECTIONS[path[0] if len(path) > 1 else ""].model_fields)
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        return f"{name}={given!r}: unknown field; {hint}"
    if first["type"] == "missing":
        return f"{name} is missing from the recipe; set it"
    if first["type"] == "value_error":
        return f"{name}: {first['ctx']['error']}" if name else str(first["ctx"]["error"])
    if isinstance(given, Mapping) or first["type"] == "model_type":
        return f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return f"{name}={given!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
