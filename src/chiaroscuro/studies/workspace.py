"""A trained model together with its tokenizer, its recipe, and the text that it was trained on.

Commands and studies start from it:

    workspace = Workspace("runs/small", share=0.1)
    corpus, blocks = workspace.blocks("validation")
    evaluate_blocks(workspace.model, blocks)
"""

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from chiaroscuro.data import Corpus, StreamedCorpus, TokenBlocks, default_cache_dir, tokenize_corpus
from chiaroscuro.data.tasks import (
    LabelledRows,
    LabelledTexts,
    TextTask,
    TokenRows,
    TokenTargets,
    TokenTask,
    load_task,
    tokenize_targets,
    tokenize_task,
)
from chiaroscuro.data.tasks.language_modelling import LanguageModelling
from chiaroscuro.errors import UserError
from chiaroscuro.model import ChiarForMixedTasks, ChiarForSequenceClassification, ChiarPreTrainedModel
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.model.loading import (
    NO_LIMIT,
    find_checkpoint,
    load_checkpoint,
    load_checkpoint_config,
    load_checkpoint_tokenizer,
    longest_sequence,
)
from chiaroscuro.retrofitting.routed_model import RoutedModel
from chiaroscuro.training import Recipe


class Workspace:
    """A checkpoint and what belongs to it. Each part is loaded when it is first used.

    Args:
        name: a model's folder, a run's folder (its `model/` is taken), or a Hub name `owner/name`.
        device: `"cpu"` or `"cuda"`; by default `"cuda"` if PyTorch sees a GPU.
        share: ρ to set before the model is used; the thresholds follow.
        kv_share: the share that is kept, likewise.
        history: how many tokens of each row its thresholds follow; 0 for thresholds that stand still.
        task: for a run with mixed training, the task to use instead of the text.

    Raises:
        UserError: there is no such checkpoint, or no such device.

    """

    def __init__(
        self,
        name: str,
        *,
        device: str | None = None,
        share: float | None = None,
        kv_share: float | None = None,
        history: int | None = None,
        task: str | None = None,
    ) -> None:
        if device not in (None, "cpu", "cuda"):
            raise UserError(f"--device {device}: choose cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU here; leave it out to run on the CPU")
        self.name = name
        self.path = find_checkpoint(name)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.share = share
        self.kv_share = kv_share
        self.history = history
        self.task = task

    # ---- the model -------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's configuration; no weights are read for it."""
        return load_checkpoint_config(self.name)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on its device, in evaluation mode, with the share that was asked for."""
        model = load_checkpoint(self.name)
        asked = {"--share": self.share, "--kv-share": self.kv_share, "--history": self.history}
        if option := next((option for option, value in asked.items() if value is not None), None):
            if not isinstance(model, ChiarPreTrainedModel | RoutedModel):
                raise UserError(
                    f"{option} needs a CHIAR-Former or a retrofitted model, and {self.name} is a {type(model).__name__}"
                )
            if self.share is not None or self.kv_share is not None:
                model.set_attention_share(self.share, kv_share=self.kv_share)
            if self.history is not None:
                model.set_history(self.history or None)
        return cast(Any, model).to(self.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that was saved with the model."""
        return load_checkpoint_tokenizer(self.name)

    def chiar(self, what: str) -> ChiarPreTrainedModel:
        """The model, which has to be a CHIAR-Former for what is to be done."""
        if not isinstance(self.model, ChiarPreTrainedModel):
            raise UserError(f"{what} needs a CHIAR-Former, and {self.name} is a {type(self.model).__name__}")
        return self.model

    def language_model(self, what: str) -> PreTrainedModel:
        """The model, which has to be a language model for what is to be done."""
        if isinstance(self.model, ChiarForSequenceClassification):
            raise UserError(f"{what} needs a language model, and {self.name} is a classifier of texts")
        return self.model

    @property
    def routes(self) -> bool:
        """Whether the model is a CHIAR-Former, whose routing can be shown."""
        return isinstance(self.model.config, ChiarConfig)

    @property
    def head(self) -> str | None:
        """The head for the chosen task in a model with several heads; None if the task has none."""
        heads: Any = self.model.heads if isinstance(self.model, ChiarForMixedTasks) else {}
        return self.task if self.task is not None and self.task in heads else None

    @property
    def classifies(self) -> bool:
        """Whether the model classifies whole texts, so that accuracy is measured instead of perplexity."""
        return isinstance(self.model, ChiarForSequenceClassification) or self.head is not None

    # ---- how it was trained ----------------------------------------------------------------------------------

    @cached_property
    def run(self) -> Path | None:
        """The folder of the run that the model belongs to; None for a model outside a run."""
        folder = Path(self.path)
        return folder.parent if folder.name == "model" or folder.name.startswith("checkpoint-") else None

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe of the run, or of the run that a calibrated copy is of; None if there is none.

        If a task was chosen, it takes the place of the text.
        """
        # A calibrated copy has the recipe inside; a recipe.yaml beside it would not be its own.
        places = [Path(self.path) / "recipe.yaml", *([self.run / "recipe.yaml"] if self.run else [])]
        found = next((place for place in places if place.is_file()), None)
        try:
            recipe = None if found is None else Recipe.of_run(found)
        except UserError as error:
            line = str(error)
            raise UserError(line if line.startswith(str(found)) else f"{found}: {line}") from None
        if self.task is None:
            return recipe
        tasks = {} if recipe is None or recipe.mixture is None else recipe.mixture.tasks
        if recipe is None or self.task not in tasks:
            known = f"it has {', '.join(tasks)}" if tasks else "no recipe beside it mixes tasks"
            raise UserError(f"--task {self.task}: {self.name} has no such task; {known}")
        return recipe.model_copy(update={"data": tasks[self.task], "mixture": None})

    def length(self, wanted: int | None = None, most: int | None = None) -> int:
        """T: as wanted, or the recipe's; without a recipe the longest that the model reads, at most `most`."""
        longest = longest_sequence(self.config)
        if wanted is not None and wanted > longest:
            raise UserError(
                f"--length {wanted} is more than the model's max_position_embeddings={longest}: take a shorter one"
            )
        if wanted is not None:
            return wanted
        if self.recipe is None and longest == NO_LIMIT and most is None:
            raise UserError(f"{self.name} says no longest sequence: give --length")
        return self.recipe.data.sequence_length if self.recipe else min(longest, most or longest)

    # ---- text and tasks --------------------------------------------------------------------------------------

    def corpus(self, split: str, source: str | None = None) -> Corpus:
        """The text of the recipe, or of another source; it has the split."""
        if source is None:
            if self.recipe is None:
                raise UserError(
                    "no recipe beside this checkpoint says what text it was trained on: name one with --data"
                )
            if not isinstance(self.recipe.data.build_task(), TextTask):
                raise UserError(
                    f"this checkpoint was trained on the task {self.recipe.data.task}: name a text with --data"
                )
        text = self._text(source)

        def load(found: str | None) -> Corpus:
            if not isinstance(text, LanguageModelling):  # a task of the user's, which knows its text
                return cast(Corpus, text.load(default_cache_dir()))
            needed = (split,) if text.streaming else ()  # of a stream no more is loaded than is needed
            read = replace(text, source=found or text.source)
            try:
                return read.load(default_cache_dir(), needed)
            except UserError:
                if source is None or text.column == "text":
                    raise
            return replace(read, column="text").load(default_cache_dir(), needed)  # not all call it as the recipe does

        return self._with_split(split, self._from_source(source, load))

    def _text(self, source: str | None) -> TextTask:
        """How the recipe reads its text, and another source likewise; a running text where it reads none."""
        task = self.recipe.data.build_task() if self.recipe is not None else None
        if source is None:
            return task if isinstance(task, TextTask) else LanguageModelling()
        return replace(task, streaming=False) if type(task) is LanguageModelling else LanguageModelling()

    def blocks(
        self, split: str, *, length: int | None = None, stride: int | None = None, source: str | None = None
    ) -> tuple[Corpus, TokenBlocks]:
        """The text, and a split of it as blocks of `length` tokens: see `TokenBlocks`.

        Raises:
            UserError: the text can't be read, or the model's tokenizer is one of the words of a task.

        """
        corpus, text = self.corpus(split, source), self._text(source)
        learned_a_text = self.recipe is not None and isinstance(self.recipe.data.build_task(), TextTask)
        if self.reads_words and not learned_a_text:
            raise UserError(
                f"the tokenizer of {self.name} is one of words, which loses the spaces of a text and the words that it "
                "has not seen: what is measured or fitted there would not be of the text; take a model that learned one"
            )
        tokens = tokenize_corpus(corpus, self.tokenizer)[split]
        return corpus, text.blocks(tokens, self.tokenizer, self.length(length), stride)

    def labelled_rows(
        self, split: str, *, length: int | None = None, source: str | None = None
    ) -> tuple[LabelledTexts, LabelledRows]:
        """The recipe's task, and a split of it as labelled texts, cut at `length` tokens."""
        task = self._task(split, source)
        return task, tokenize_task(task, self.tokenizer, self.length(length))[split]

    def target_rows(self, split: str, *, length: int | None = None) -> tuple[TokenTargets, TokenRows]:
        """The recipe's task, and a split of it as sequences with a target for some of their tokens."""
        task = self._task(split)
        return task, tokenize_targets(task, self.tokenizer, self.length(length))[split]

    @property
    def reads_words(self) -> bool:
        """Whether the tokenizer knows whole words, and loses the spaces between them and all other words."""
        return type(self.tokenizer.backend_tokenizer.model).__name__ == "WordLevel"

    @property
    def has_targets(self) -> bool:
        """Whether the model was trained to predict targets, which are measured row by row."""
        return self.recipe is not None and isinstance(self.recipe.data.build_task(), TokenTask)

    def _task(self, split: str, source: str | None = None) -> Any:
        if self.recipe is None or isinstance(self.recipe.data.build_task(), TextTask):
            raise UserError("no recipe beside this classifier says what task it was trained on: give a run's folder")
        name, options = self.recipe.data.task, self.recipe.data.options
        load = lambda found: load_task(name, **(options if found is None else options | {"source": found}))  # noqa: E731
        return self._with_split(split, self._from_source(source, load))

    @staticmethod
    def _with_split(split: str, data: Any) -> Any:
        if split not in data.splits:
            if isinstance(data, StreamedCorpus) and split == "train":
                raise UserError(
                    f"--split train: the recipe streams that of {data.name}; name another split, or a text with --data"
                )
            raise UserError(f"--split {split}: {data.name} has {', '.join(data.splits)}")
        return data

    def _from_source(self, source: str | None, load: Any) -> Any:
        """Load a source. One that the recipe names is also looked for where the run was started.

        A relative folder in a recipe is relative to the directory in which the run was started. The run's folder and
        `trainer.output_dir` tell that directory.
        """
        named = self.recipe.data.options.get("source") if self.recipe else None
        if source is not None or not isinstance(named, str):
            return load(source)
        started = self._started_in()
        if started is not None and not os.path.exists(os.path.expanduser(named)) and (started / named).is_dir():
            return load(str(started / named))
        try:
            return load(named)
        except UserError as error:
            if started is None and not Path(named).is_absolute():
                raise UserError(
                    f"{error} (the recipe's data.source={named} is relative to the directory in which the run was "
                    "started; --data names another)"
                ) from None
            raise

    def _started_in(self) -> Path | None:
        """The directory in which the run was started; None if the run's folder doesn't tell."""
        if self.run is None or self.recipe is None:
            return None
        folder, output = self.run.resolve(), Path(self.recipe.trainer.output_dir)
        parts = [part for part in output.parts if part != "."]
        if output.is_absolute() or ".." in parts or folder.parts[-len(parts) :] != tuple(parts):
            return None
        return Path(*folder.parts[: -len(parts)])
