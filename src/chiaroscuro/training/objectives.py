"""What a model is trained for: every token of a text, its label, targets at some positions, or a mix of these.

All that differs between these is here, one class for each kind of task, and the trainer knows nothing of it: which rows
there are, how they become a batch, which model learns from them, and what is measured on the validation rows.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from chiaroscuro.analysis.classification import (
    ClassificationEvaluation,
    TargetEvaluation,
    evaluate_rows,
    evaluate_targets,
)
from chiaroscuro.analysis.perplexity import Evaluation, evaluate_blocks
from chiaroscuro.analysis.routing_summary import mean_gate
from chiaroscuro.data import (
    Corpus,
    MixedRows,
    StreamedCorpus,
    TextStream,
    TokenBlocks,
    TokenFile,
    check_source,
    load_tokenizer,
    tokenize_corpus,
)
from chiaroscuro.data.tasks import (
    ClassificationTask,
    LabelledRows,
    LabelledTexts,
    PadToLongest,
    TextTask,
    TokenRows,
    TokenTask,
    tokenize_targets,
    tokenize_task,
)
from chiaroscuro.data.tasks.language_modelling import LanguageModelling as TextToModel
from chiaroscuro.data.tokenizers import bare_backend
from chiaroscuro.errors import UserError
from chiaroscuro.model import ChiarForCausalLM, ChiarForMixedTasks, ChiarForSequenceClassification
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.training.mixture import Mixture
from chiaroscuro.training.recipe import Recipe
from chiaroscuro.training.records import perplexity

Rows = TypeVar("Rows", LabelledRows, TokenRows)
Look = tuple[Any, Any]
"""`outputs.routing` and `outputs.meta_gate` of a batch."""


@dataclass(frozen=True)
class Objective(ABC):
    """What to learn, and from what.

    Attributes:
        tokenizer: of the texts.
        train: the rows to learn from, or the stream that they are made of.
        validation: the rows to measure on.
        identity: changes with the texts, their labels and the tokenizer; a resumed run must have the same.
        summary: the data in a few words, for the terminal.
        validation_texts: the texts of the validation rows.

    """

    tokenizer: PreTrainedTokenizerFast
    train: Dataset[Any] | TextStream
    validation: Any
    identity: str
    summary: str
    validation_texts: Iterable[str]

    measured: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    """The figures of a validation."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of the forward beside a batch. No KV cache: the config's `use_cache` is meant for generation."""
        return {"use_cache": False}

    @property
    def collate(self) -> Callable[[Any], dict[str, Any]]:
        """Makes a batch of a list of rows: padded to the longest of them."""
        return PadToLongest(self.tokenizer.pad_token_id)

    def build_model(self, config: Any) -> PreTrainedModel:
        """An untrained model: a causal language model, a CHIAR-Former or the Llama that it is compared with."""
        return _llama(config) if isinstance(config, LlamaConfig) else ChiarForCausalLM(config)

    def figures_of(self, loss: float) -> dict[str, float]:
        """The figures of a training step's record, from its loss: the accuracy of so few rows says little."""
        return {"loss": loss}

    @abstractmethod
    def measure(self, model: PreTrainedModel, **how: Any) -> Any:
        """Measure a model on the validation rows: the `evaluate_…` function of this kind of rows, given `how`."""

    def evaluate(
        self,
        model: PreTrainedModel,
        *,
        batch_size: int,
        output_routing: bool,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[dict[str, Any], list[Look]]:
        """The figures of the validation rows, and how they were routed; `progress` is told the rows of each batch.

        Under `tasks` are the figures of what is measured beside them, with the gate.
        """
        how: dict[str, Any] = {"batch_size": batch_size, "output_routing": output_routing, "progress": progress}
        seen = self.measure(model, **how)
        figures = {name: getattr(seen, name) for name in self.measured}
        others = {name: own | mean_gate(looks) for name, (own, looks) in self.measure_beside(model, **how).items()}
        return figures | ({"tasks": others} if others else {}), seen.routings

    def measure_beside(self, model: PreTrainedModel, **how: Any) -> dict[str, tuple[dict[str, Any], list[Look]]]:
        """By name, the figures of other rows that belong to a validation, and how they were routed; none by default."""
        return {}

    @property
    def names_beside(self) -> tuple[str, ...]:
        """Those of `measure_beside`."""
        return ()

    @property
    def validation_rows(self) -> int:
        """How many rows `evaluate` reads."""
        return len(self.validation)

    def beside(self, step: int, rank: int) -> tuple[str, dict[str, Any]] | None:
        """A second forward of a step: the name of its task, and its arguments; None by default."""
        return None


@dataclass(frozen=True)
class LanguageModelling(Objective):
    """Predict every token of a text from those before it.

    Attributes:
        texts: others that are measured beside its validation split, by name.

    """

    validation: TokenBlocks
    texts: Mapping[str, TokenBlocks] = field(default_factory=dict, kw_only=True)
    measured = ("loss", "perplexity", "bits_per_byte")

    @classmethod
    def load(
        cls, recipe: Recipe, cache_dir: Path, tokenizer: PreTrainedTokenizerFast | None = None
    ) -> "LanguageModelling":
        """The recipe's text in blocks, tokenised by its tokenizer or the given one."""
        task = cast(TextTask, recipe.data.build_task())
        # Before minutes go into the text itself.
        for name, source in recipe.trainer.validation_texts.items():
            with _naming("validation_texts", name):
                check_source(source)
        for source in recipe.trainer.training_texts:
            with _naming("training_texts", source):
                check_source(source)
        corpus = task.load(cache_dir)
        tokenizer = tokenizer or load_tokenizer(recipe.tokenizer, corpus, cache_dir)
        splits = tokenize_corpus(corpus, tokenizer, cache_dir)
        length = recipe.data.sequence_length
        texts = {}
        for name, source in recipe.trainer.validation_texts.items():
            # It is read as the text itself is.
            own = task if isinstance(task, TextToModel) else TextToModel()
            beside = replace(own, source=source, streaming=False)
            with _naming("validation_texts", name):
                other = beside.load(cache_dir, ("validation",))
            tokens = tokenize_corpus(other, tokenizer, cache_dir)["validation"]
            texts[name] = beside.blocks(_beginning(tokens, recipe), tokenizer, length)
        sources: dict[str, tuple[TextTask, Corpus]] = {"": (task, corpus)}
        for number, source in enumerate(recipe.trainer.training_texts, 1):
            reader = (task if isinstance(task, TextToModel) else TextToModel()).of(source, number)
            with _naming("training_texts", source):
                sources[source] = reader, reader.load(cache_dir, ("train",))
        learn_from = _streamed if isinstance(corpus, StreamedCorpus) else _stored
        train, identity, sizes = learn_from(sources, recipe, tokenizer, cache_dir)
        names = [corpus.name, *recipe.trainer.training_texts]
        return cls(
            tokenizer=tokenizer,
            train=train,
            validation=task.blocks(_beginning(splits["validation"], recipe), tokenizer, length),
            texts=texts,
            identity=identity,
            summary=" and ".join(f"{name} ({size})" for name, size in zip(names, sizes, strict=True)),
            validation_texts=corpus.splits["validation"]["text"],
        )

    @property
    def collate(self) -> Callable[[Any], dict[str, Any]]:
        """All blocks have the same length."""
        return default_data_collator

    def figures_of(self, loss: float) -> dict[str, float]:
        """Loss and perplexity."""
        return {"loss": loss, "perplexity": perplexity(loss)}

    def measure(self, model: PreTrainedModel, **how: Any) -> Evaluation:
        """Over all tokens."""
        return evaluate_blocks(model, self.validation, **how)

    def measure_beside(self, model: PreTrainedModel, **how: Any) -> dict[str, tuple[dict[str, Any], list[Look]]]:
        """The other texts."""
        seen = {name: evaluate_blocks(model, blocks, **how) for name, blocks in self.texts.items()}
        return {name: ({f: getattr(one, f) for f in self.measured}, one.routings or []) for name, one in seen.items()}

    @property
    def names_beside(self) -> tuple[str, ...]:
        """Those of the other texts."""
        return tuple(self.texts)

    @property
    def validation_rows(self) -> int:
        """Those of all texts."""
        return super().validation_rows + sum(len(blocks) for blocks in self.texts.values())


def _llama(config: LlamaConfig) -> LlamaForCausalLM:
    """A Llama that learns the token that pads as any other: in a text it is the one that ends documents."""
    pad, config.pad_token_id = config.pad_token_id, None  # or its embedding is 0, and has no gradient
    model = LlamaForCausalLM(config)
    model.config.pad_token_id = pad
    if model.generation_config is not None:
        model.generation_config.pad_token_id = pad
    return model


@contextmanager
def _naming(field: str, source: str) -> Iterator[None]:
    """Say of an error which of the other texts it is about; the recipe's own has no name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"trainer.{field}.{source}: {error}" if source else str(error)) from None


def _stored(
    sources: Mapping[str, tuple[TextTask, Corpus]], recipe: Recipe, tokenizer: Any, cache_dir: Path
) -> tuple[Dataset[Any], str, list[str]]:
    """Rows of tokens that are kept on the disk; what identifies them; and in words how much each source has."""
    rows, files = [], []
    for source, (task, corpus) in sources.items():
        with _naming("training_texts", source):
            files.append(tokenize_corpus(corpus, tokenizer, cache_dir)["train"])
            rows.append(task.train_rows(files[-1], tokenizer, recipe.data.sequence_length))
    others = list(zip(rows[1:], recipe.trainer.training_texts.values(), strict=True))
    train: Dataset[Any] = MixedRows(rows[0], others) if others else rows[0]
    identity = "+".join(file.path.stem for file in files)  # fingerprints of text and tokenizer
    return train, identity, [f"{file.count:,} tokens" for file in files]


def _streamed(
    sources: Mapping[str, tuple[TextTask, Corpus]], recipe: Recipe, tokenizer: Any, cache_dir: Path
) -> tuple[TextStream, str, list[str]]:
    """The same of text that is read on the way."""
    task = sources[""][0]
    own = type(task)
    if not isinstance(task, TextToModel) or (own.train_rows, own.blocks) != (
        TextToModel.train_rows,
        TextToModel.blocks,
    ):
        raise UserError(f"data.task={own.name}: it makes rows of its own, which can't be streamed")
    corpora = [cast(StreamedCorpus, corpus) for _, corpus in sources.values()]
    parts = list(recipe.trainer.training_texts.values())
    stream = TextStream(corpora, parts, tokenizer, recipe.data.sequence_length, task.shuffle, recipe.trainer.seed)
    words = f"{bare_backend(tokenizer).to_str()} {tokenizer.eos_token_id}"
    digest = hashlib.sha256(words.encode()).hexdigest()[:24]
    return stream, "+".join([*(corpus.fingerprint for corpus in corpora), digest]), ["streamed"] * len(corpora)


@dataclass(frozen=True)
class Classification(Objective):
    """Predict the label of a text.

    Attributes:
        task: the texts and their labels.
        head: the name of the head, if the model has several.

    """

    validation: LabelledRows
    task: LabelledTexts
    head: str | None = None

    @classmethod
    def load(
        cls, recipe: Recipe, cache_dir: Path, tokenizer: PreTrainedTokenizerFast | None = None
    ) -> "Classification":
        """The recipe's task, truncated to its sequence length, tokenised by its tokenizer or the given one."""
        task, data = _load_rows(recipe, cache_dir, tokenizer, tokenize_task)
        train = data["train"]
        summary = f"{task.name} ({len(train):,} texts, {train.share_cut:.0%} of them cut at {train.length} tokens)"
        return cls(**data, task=task, summary=summary)

    @property
    def inputs(self) -> dict[str, Any]:
        """The head, if there is a choice."""
        return {} if self.head is None else {"task": self.head}

    def build_model(self, config: ChiarConfig) -> PreTrainedModel:
        """A classifier, with its labels' names in the config."""
        config.id2label = dict(enumerate(self.task.labels))
        config.label2id = {name: label for label, name in config.id2label.items()}
        return ChiarForSequenceClassification(config)

    def measure(self, model: PreTrainedModel, **how: Any) -> ClassificationEvaluation:
        """Over all texts."""
        return evaluate_rows(model, self.validation, self.collate, inputs=self.inputs, **how)


@dataclass(frozen=True)
class TargetPrediction(Objective):
    """Predict the target of every position that has one."""

    validation: TokenRows

    @classmethod
    def load(
        cls, recipe: Recipe, cache_dir: Path, tokenizer: PreTrainedTokenizerFast | None = None
    ) -> "TargetPrediction":
        """The recipe's task, tokenised by its tokenizer or the given one."""
        task, data = _load_rows(recipe, cache_dir, tokenizer, tokenize_targets)
        train = data["train"]
        return cls(**data, summary=f"{task.name} ({len(train):,} sequences, {train.predictions:,} targets)")

    def measure(self, model: PreTrainedModel, **how: Any) -> TargetEvaluation:
        """Over all targets."""
        return evaluate_targets(model, self.validation, self.collate, **how)


@dataclass(frozen=True)
class MixedTraining(LanguageModelling):
    """Model a text, and in some steps one of several tasks beside it, all with one tokenizer and one trunk.

    Attributes:
        tasks: the tasks beside the text, by the recipe's names.
        mixture: which step learns from which task.

    """

    tasks: Mapping[str, Objective]
    mixture: Mixture

    @classmethod
    def load(cls, recipe: Recipe, cache_dir: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> "MixedTraining":
        """The recipe's text, and the tasks of its mixture."""
        assert recipe.mixture is not None  # the caller's choice
        text = LanguageModelling.load(recipe, cache_dir, tokenizer)
        tasks = {}
        for name, data in recipe.mixture.tasks.items():
            trainer = recipe.trainer.model_copy(update={"validation_texts": {}, "training_texts": {}})
            alone = recipe.model_copy(update={"data": data, "mixture": None, "trainer": trainer})
            task = load_objective(alone, cache_dir, text.tokenizer)
            tasks[name] = replace(task, head=name) if isinstance(task, Classification) else task
        sizes = {name: len(cast(Sized, task.train)) for name, task in tasks.items()}
        return cls(
            **{field.name: getattr(text, field.name) for field in fields(LanguageModelling)}
            | {
                "identity": "+".join([text.identity, *(task.identity for task in tasks.values())]),
                "summary": f"{text.summary}, and with a probability of {recipe.mixture.ratio:g} "
                + ", ".join(f"{name}: {task.summary}" for name, task in tasks.items()),
                "tasks": tasks,
                "mixture": Mixture(sizes, recipe.mixture.ratio, recipe.trainer.batch_size, recipe.trainer.seed),
            }
        )

    def build_model(self, config: ChiarConfig) -> PreTrainedModel:
        """A language model with a head for each classification task."""
        labelled = {name: task for name, task in self.tasks.items() if isinstance(task, Classification)}
        config.task_labels = {name: len(task.task.labels) for name, task in labelled.items()}
        return ChiarForMixedTasks(config)

    def beside(self, step: int, rank: int) -> tuple[str, dict[str, Any]] | None:
        """A batch of one of the tasks, in the steps that have one."""
        drawn = self.mixture.at(step, rank)
        if drawn is None:
            return None
        name, rows = drawn
        task = self.tasks[name]
        return name, {**task.collate([cast(Any, task.train)[row] for row in rows]), **task.inputs}

    def measure_beside(self, model: PreTrainedModel, **how: Any) -> dict[str, tuple[dict[str, Any], list[Look]]]:
        """The other texts, and every task."""
        tasks = {name: task.evaluate(model, **how) for name, task in self.tasks.items()}
        return super().measure_beside(model, **how) | tasks

    @property
    def names_beside(self) -> tuple[str, ...]:
        """Those of the other texts and of every task."""
        return (*super().names_beside, *self.tasks)

    @property
    def validation_rows(self) -> int:
        """Those of the text and of every task."""
        return super().validation_rows + sum(task.validation_rows for task in self.tasks.values())


def _beginning(tokens: TokenFile, recipe: Recipe) -> TokenFile:
    """So much of a split as is validated on."""
    rows = _rows_to_validate(recipe)
    kept = tokens.count if rows is None else rows * recipe.data.sequence_length + 1
    if kept >= tokens.count:
        return tokens
    return replace(tokens, count=kept, bytes=tokens.bytes * kept / tokens.count)  # as many a token as in all of it


def _rows_to_validate(recipe: Recipe) -> int | None:
    """How many rows hold `trainer.validation_tokens`; None for all."""
    tokens = recipe.trainer.validation_tokens
    return None if tokens is None else math.ceil(tokens / recipe.data.sequence_length)


def _load_rows(
    recipe: Recipe,
    cache_dir: Path,
    tokenizer: PreTrainedTokenizerFast | None,
    tokenize: Callable[[Any, PreTrainedTokenizerFast, int, Path], Mapping[str, Any]],
) -> tuple[Any, dict[str, Any]]:
    """The data of a recipe's task, and the fields of an objective that come of its tokenised rows."""
    task = recipe.data.build_task().load(cache_dir)
    corpus = task.corpus
    tokenizer = tokenizer or load_tokenizer(recipe.tokenizer, corpus, cache_dir)
    rows = tokenize(task, tokenizer, recipe.data.sequence_length, cache_dir)
    return task, {
        "tokenizer": tokenizer,
        "train": rows["train"],
        "validation": _first_rows(rows["validation"], recipe),
        "identity": rows["train"].identity,
        "validation_texts": corpus.splits["validation"]["text"],
    }


def _first_rows(rows: Rows, recipe: Recipe) -> Rows:
    """The rows that are to be validated on."""
    count = _rows_to_validate(recipe)
    if count is None or count >= len(rows):
        return rows
    return rows.first(count)


def load_objective(recipe: Recipe, cache_dir: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Objective:
    """The objective of a recipe, with its data loaded, tokenised and kept in the cache.

    Args:
        recipe: what to learn.
        cache_dir: where prepared data is kept.
        tokenizer: used instead of the recipe's.

    Raises:
        UserError: the data or the tokenizer can't be loaded.
    """
    if recipe.mixture is not None:
        return MixedTraining.load(recipe, cache_dir, tokenizer)
    task = recipe.data.build_task()
    return next(objective for kind, objective in OBJECTIVES if isinstance(task, kind)).load(
        recipe, cache_dir, tokenizer
    )


OBJECTIVES: tuple[tuple[Any, type[LanguageModelling | Classification | TargetPrediction]], ...] = (
    (TextTask, LanguageModelling),
    (ClassificationTask, Classification),
    (TokenTask, TargetPrediction),
)
"""Of each kind of task."""
