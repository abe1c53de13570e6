"""From a recipe to a trained model in a folder.

    <output_dir>/recipe.yaml      the recipe, with every default filled in
                 metrics.jsonl    the records (see records.py)
                 tensorboard/     the same, for TensorBoard
                 checkpoint-N/    what a resume needs, after step N
                 model/           the trained model and its tokenizer, for from_pretrained

A resumed run ends with the weights of one that was never interrupted, bit for bit on a CPU. So everything that moves
the weights, from the learning rate to the corpus, must be what it was when the run began, or the resume is refused.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from safetensors import safe_open
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import align_special_tokens
from transformers.utils import logging

from chiaroscuro.analysis.facts import count_parameters, refuse_beyond_memory
from chiaroscuro.data import StreamedBlocks, TextStream, default_cache_dir
from chiaroscuro.data.tasks.language_modelling import SHUFFLE, LanguageModelling
from chiaroscuro.errors import UserError
from chiaroscuro.files import alone_in, refuse_file, saying_why, write_text
from chiaroscuro.model import ChiarPreTrainedModel, MoveThresholds
from chiaroscuro.model.calibration import paper_thresholds
from chiaroscuro.model.config import ChiarConfig
from chiaroscuro.model.fitting import fitted_sides
from chiaroscuro.model.loading import load_checkpoint, load_checkpoint_config, load_checkpoint_tokenizer
from chiaroscuro.model.spread import SPREADS
from chiaroscuro.training.adapters import adapted, add_adapters
from chiaroscuro.training.averaging import Averages
from chiaroscuro.training.callbacks import FitScores, Reporter, StopOnSignal, TurnDials
from chiaroscuro.training.checkpoints import (
    GO_ON,
    SCRATCH,
    Checkpoint,
    Facts,
    Interval,
    checkpoints,
    is_sealed,
    named_like_checkpoints,
    newest_complete,
    refuse_foreign_scratch,
    scratch_in,
)
from chiaroscuro.training.initial_weights import FIT_ROWS, fit_batches, fit_scores, load_weights, take_over_spread
from chiaroscuro.training.objectives import Objective, load_objective
from chiaroscuro.training.recipe import LEAST_LEARNING_RATE, Recipe, RetrofitSection
from chiaroscuro.training.records import read_records, write_records
from chiaroscuro.training.sharding import shapes
from chiaroscuro.training.streaming import read_notes
from chiaroscuro.training.trackers import trackers
from chiaroscuro.training.trainer import Clock, Run, RunTrainer

_RECIPE = "recipe.yaml"
_METRICS = "metrics.jsonl"


class TrainingInterrupted(UserError):
    """Ctrl-C, or a SIGTERM. The message says how to go on."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: The run's folder.
        model: The trained model, for `from_pretrained`.
        parameters: Its number of parameters.
        steps: Optimizer steps taken, over all parts of an interrupted run.
        tokens: Tokens read in them, the padding of shorter texts included.
        seconds: Time spent on them, without validation and saving.
        tokens_per_second: tokens / seconds.
        train_loss: Nats per prediction (a token, or the label of a text), mean over the steps of the last record.
        validation_loss: Nats per prediction over the validation rows.
        perplexity: exp(validation_loss); None for a task with labels.
        bits_per_byte: The validation loss in bits per UTF-8 byte of text; None likewise.
        accuracy: Share of right predictions over the validation rows; None for language modelling.
    """

    folder: Path
    model: Path
    parameters: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    train_loss: float
    validation_loss: float
    perplexity: float | None = None
    bits_per_byte: float | None = None
    accuracy: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The result ready for JSON: paths as text, and without the fields that don't apply."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Train the model that `recipe` describes, or go on with a run that was interrupted.

    Args:
        recipe: What to train, on what, and how.
        resume: Go on from the newest complete checkpoint in `trainer.output_dir`.
        console: Where progress goes; by default the terminal. Only the main process prints.

    Raises:
        UserError: if the recipe can't be carried out here, the folder holds a run (or, resuming, holds none) or is in
            use by another one, or the disk is full.
        TrainingDiverged: if loss, gradient or weights stop being finite; earlier checkpoints stay.
        TrainingInterrupted: on Ctrl-C, after saving the step in hand.
    """
    # Unless it is told that this is a CPU, each of several processes on one would think it is alone.
    processes = PartialState(cpu=not torch.accelerator.is_available())
    if not processes.is_main_process:
        console = Console(quiet=True)
    console = console or Console()
    folder = Path(recipe.trainer.output_dir)
    refuse_file(folder, f"trainer.output_dir={folder}")
    following = trackers(recipe.trainer.report_to)  # or an error, before minutes go into the data
    if recipe.trainer.epochs is None:
        # Refuses too long a warm-up or schedule before minutes go into the data.
        recipe.courses(recipe.steps(processes.num_processes))
    if not resume:
        _refuse_idle(recipe)
    if not resume and recipe.trainer.init_from is not None:
        _refuse_no_checkpoint(recipe.trainer.init_from)
    _refuse_data_parallel(processes)
    _refuse_other_sharding()
    with _alone_in(folder, processes):
        return _train(recipe, folder, processes, resume, console, following)


def _train(
    recipe: Recipe,
    folder: Path,
    processes: PartialState,
    resume: bool,
    console: Console,
    following: Sequence[TrainerCallback],
) -> TrainResult:
    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    world = processes.num_processes
    checkpoint = _find_checkpoint(recipe, folder, resume, say)
    records = []
    if checkpoint is not None:
        records = [record for record in read_records(folder / _METRICS) if record["step"] <= checkpoint.step]
    with processes.main_process_first():  # the others find its caches
        objective = load_objective(recipe, default_cache_dir())
    rows = _rows_of(objective.train, recipe, world)
    steps = recipe.steps(world, len(cast(Sized, rows)))
    every = recipe.trainer.evaluate_every or steps
    if checkpoint is not None and (checkpoint.step % every == 0 or checkpoint.step == steps):
        # What was added since to the texts that are measured is measured where the run stands, if it is due there.
        records = [each for each in records if each["step"] < checkpoint.step or _is_whole(each, objective)]
    facts = Facts(tokens=objective.identity, processes=world, sequences=recipe.sequences_per_step(world), seconds=0.0)
    baseline = _baseline_of(recipe, facts, console)
    if checkpoint is not None:
        _refuse_other_data(checkpoint, facts)
        _refuse_other_steps(checkpoint, facts, recipe)
        if isinstance(rows, StreamedBlocks):
            rows.notes = read_notes(checkpoint.path)
    if isinstance(rows, StreamedBlocks):
        rows.shown = processes.is_main_process

    model = _build_model(recipe, objective, baseline)
    fit, fit_after = (
        _fit_of(recipe, model, objective, world, len(cast(Sized, rows))),
        recipe.fit.step(steps) if recipe.fit is not None else None,
    )
    if checkpoint is None and recipe.trainer.init_from is not None:
        load_weights(model, recipe.trainer.init_from, objective.tokenizer)
        if recipe.fit is not None and fit_after is None:
            say(fit(model))
    finished = checkpoint is not None and checkpoint.step >= steps
    if checkpoint is not None:
        if finished and not adapted(model):  # the checkpoint of a model with adapters has theirs, too
            model = load_checkpoint(str(checkpoint.path))
        else:
            _refuse_other_weights(checkpoint.path, model, recipe.trainer.fsdp)
            if recipe.fit is not None:
                take_over_spread(model, str(checkpoint.path))
    if checkpoint is not None and checkpoint.step > steps:
        raise UserError(
            f"{checkpoint.path} has taken more steps than the {steps:,} of the recipe; ask for as many at least"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    processes.wait_for_everyone()  # all have seen the folder as it was before the main process changes it
    say(
        f"{folder}: {type(model).__name__}, {parameters:,} parameters, on {objective.summary}, "
        f"{steps:,} steps of {recipe.tokens_per_step(world):,} tokens"
    )
    with ExitStack() as running:
        scratch = folder / SCRATCH
        if processes.is_main_process:
            scratch = running.enter_context(_opened(recipe, folder, records))
        processes.wait_for_everyone()
        running.enter_context(_quiet_transformers())
        stop = running.enter_context(StopOnSignal(processes=processes, say=say))
        tokens_per_step = recipe.tokens_per_step(world)
        averages = None if recipe.trainer.ema is None else Averages(model, recipe.trainer.ema)
        if averages is not None and checkpoint is not None:
            averages.load(checkpoint.path)
        reporter = None
        if processes.is_main_process:
            reporter = running.enter_context(Reporter(folder, console, tokens_per_step))
        run = Run(
            folder=folder,
            scratch=scratch,
            keep_checkpoints=recipe.trainer.keep_checkpoints,
            tokens_per_step=tokens_per_step,
            facts=facts,
            clock=Clock(checkpoint.facts.seconds if checkpoint else 0.0),
            interval=_interval_of(checkpoint),
            records=records,
            courses=recipe.courses(steps),
            distill=recipe.distill,
            averages=averages,
            stop=stop,
            reporter=reporter,
            sharded=recipe.trainer.fsdp,
        )
        trainer = RunTrainer(
            run=run,
            objective=objective,
            model=model,
            args=_arguments(recipe, scratch, steps, model.config.use_cache, isinstance(rows, StreamedBlocks)),
            train_dataset=rows,
            processing_class=objective.tokenizer,
            callbacks=[
                *([MoveThresholds()] if isinstance(model, ChiarPreTrainedModel) else []),
                *([FitScores(fit_after, fit, say)] if fit_after is not None else []),
                *([TurnDials(run.courses)] if run.courses else []),
                *([averages] if averages is not None else []),
                *following,
                *([reporter] if reporter is not None else []),
                stop,
            ],
        )
        trainer.remove_callback(PrinterCallback)
        if checkpoint is not None:
            say(f"resuming after step {checkpoint.step:,} of {steps:,}")
            if checkpoint.facts.processes != world:
                say(f"{checkpoint.facts.processes} processes began: steps have the same rows, dropout draws anew")
        try:
            with saying_why(folder, GO_ON):  # a checkpoint says so itself; this is metrics.jsonl or TensorBoard
                if checkpoint is not None and finished:
                    trainer.finish(checkpoint.path)
                else:
                    trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
            stopped = run.last.get("validation", {}).get("step") != steps  # the last validation ends a run
            if not stopped:
                trainer.save_final_model(folder / "model")
        except KeyboardInterrupt:  # a second Ctrl-C
            stopped = True
        if stopped:
            raise TrainingInterrupted(_how_to_go_on(folder, trainer.state.global_step, steps))

    if "train" not in run.last:
        raise UserError(f"{folder / _METRICS} lost its records; the model is complete, in {folder / 'model'}")
    trained, validated = run.last["train"], run.last["validation"]
    return TrainResult(
        folder=folder,
        model=folder / "model",
        parameters=parameters,
        steps=steps,
        tokens=trained["tokens"],
        seconds=trained["seconds"],
        tokens_per_second=trained["tokens"] / trained["seconds"],
        train_loss=trained["loss"],
        validation_loss=validated["loss"],
        **{name: validated.get(name) for name in ("perplexity", "bits_per_byte", "accuracy")},
    )


def _fit_of(
    recipe: Recipe, model: PreTrainedModel, objective: Objective, world: int, there: int
) -> Callable[[Any], str]:
    """What fits the scores that the recipe asks for, at the shares that the model is built with.

    Raises:
        UserError: there are too few rows to fit on, which nobody wants to learn after an hour of training.

    """
    length = recipe.data.sequence_length
    if recipe.fit is not None and min(there, recipe.fit.tokens // length) <= FIT_ROWS:
        raise UserError(
            f"fit.tokens={recipe.fit.tokens}: of the {there:,} rows of {length} tokens they make less than two batches "
            f"of {FIT_ROWS}, of which the last is held out; take more, or a longer text"
        )
    sides = {} if recipe.fit is None else fitted_sides(cast(ChiarConfig, model.config))

    def fit(model: Any) -> str:
        assert recipe.fit is not None
        rows = _rows_of(objective.train, recipe, world)  # its own: a stream notes where its rows are read
        batches = fit_batches(rows, recipe.fit.tokens, recipe.data.sequence_length, objective.collate)
        return fit_scores(model, batches, sides, recipe.fit.spread)

    return fit


# ---- the folder --------------------------------------------------------------------------------------------


@contextmanager
def _alone_in(folder: Path, processes: PartialState) -> Iterator[None]:
    """The main process holds the folder for all; if it can't, all learn why."""
    refusal: list[str | None] = [None]
    with ExitStack() as held:
        if processes.is_main_process:
            try:
                held.enter_context(alone_in(folder))
            except UserError as error:
                refusal = [str(error)]
        if processes.num_processes > 1:
            broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise UserError(refusal[0])
        yield


def _find_checkpoint(recipe: Recipe, folder: Path, resume: bool, say: Callable[[str], None]) -> Checkpoint | None:
    """Find the checkpoint to go on from; None for a new run. Changes nothing."""
    if not resume:
        _refuse_used_folder(folder)
        return None
    if not (folder / _RECIPE).is_file():
        raise UserError(f"trainer.output_dir={folder} holds no run to resume; leave out --resume to start one")
    begun = Recipe.load(folder / _RECIPE)
    recipe.refuse_to_resume(begun)
    refuse_foreign_scratch(folder)
    found = newest_complete(folder, say)
    if found is None and not named_like_checkpoints(folder) and not (folder / "model").exists():
        raise UserError(f"trainer.output_dir={folder} holds no checkpoint yet; leave out --resume to start again")
    if found is None:
        raise UserError(f"trainer.output_dir={folder} holds no complete checkpoint; start anew in another folder")
    if found.facts.sequences is None:
        found.facts.sequences = begun.sequences_per_step(found.facts.processes)
    return found


def _refuse_used_folder(folder: Path) -> None:
    """Refuse a new run where it would meet, or replace, a run or something of the user's."""
    for _, path in named_like_checkpoints(folder):
        if is_sealed(path):
            raise UserError(
                f"trainer.output_dir={folder} holds a run with checkpoints; pass --resume to go on with it, "
                "or name another folder"
            )
        raise UserError(f"{path} is in the way and not a complete checkpoint; name another trainer.output_dir")
    if (folder / "model").exists():
        raise UserError(f"trainer.output_dir={folder} holds a finished model; name another folder, or remove it")
    if (folder / _RECIPE).is_file() and not _was_begun(folder):
        raise UserError(
            f"trainer.output_dir={folder} holds a recipe.yaml that no run wrote and this one would replace; "
            "name another trainer.output_dir"
        )
    try:
        read_records(folder / _METRICS)
    except UserError as error:
        raise UserError(f"{error}, and this run would replace it; name another trainer.output_dir") from None
    refuse_foreign_scratch(folder)


def _was_begun(folder: Path) -> bool:
    """Whether a run, or a sweep for it, wrote the recipe there: its records, or the sweep's log, are written first."""
    if (folder / _METRICS).is_file():
        return True
    try:
        with (folder / "log.txt").open("rb") as log:
            return log.readline().startswith(b"$ chiaroscuro train ")
    except OSError:
        return False


@contextmanager
def _opened(recipe: Recipe, folder: Path, records: Sequence[dict[str, Any]]) -> Iterator[Path]:
    """Write what a run begins with, and give its scratch folder."""
    with saying_why(folder), ExitStack() as stack:
        write_records(folder / _METRICS, records)
        write_text(folder / _RECIPE, recipe.to_yaml())
        scratch = stack.enter_context(scratch_in(folder))
        opened = stack.pop_all()
    with opened:
        yield scratch


def _is_whole(record: Mapping[str, Any], objective: Objective) -> bool:
    """Whether a record of a validation has all that belongs to one now; others are whole."""
    return record["kind"] != "validation" or set(objective.names_beside) <= record.get("tasks", {}).keys()


def _refuse_other_data(checkpoint: Checkpoint, facts: Facts) -> None:
    if checkpoint.facts.tokens != facts.tokens:
        raise UserError(
            f"the text or its tokenizer changed since this run began ({checkpoint.facts.tokens} then, {facts.tokens} "
            "now); put it back to resume, or start anew in another output_dir"
        )


def _refuse_other_steps(checkpoint: Checkpoint, facts: Facts, recipe: Recipe) -> None:
    """Other processes may go on with a run if every step learns from the same rows, in the same batches."""
    then, now = checkpoint.facts, facts
    if then.processes != now.processes and recipe.mixture is not None:
        raise UserError(
            f"{then.processes} processes began this run and {now.processes} would resume it: with a mixture each draws "
            "rows of its own; start as many as then"
        )
    if then.sequences is not None and then.sequences != now.sequences:
        accumulation, rest = divmod(then.sequences, recipe.trainer.batch_size * now.processes)
        what = f"set trainer.gradient_accumulation={accumulation}" if accumulation and not rest else "start as many"
        raise UserError(
            f"a step had {then.sequences} sequences when this run began, on {then.processes} processes, and would have "
            f"{now.sequences} on {now.processes}; {what} to resume"
        )


def _refuse_other_weights(checkpoint: Path, model: PreTrainedModel, sharded: bool) -> None:
    """Refuse a checkpoint whose tensors are not the model's: the Trainer would warn, and train on from random ones."""
    saved: dict[str, tuple[int, ...]] = {}
    if sharded:
        saved = shapes(checkpoint)
    for file in () if sharded else checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            saved |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    for name in sorted(saved.keys() | wanted.keys() - tied):
        if saved.get(name) != wanted.get(name):
            raise UserError(
                f"{checkpoint} does not fit the model: {name} is {saved.get(name, 'missing')} in it and "
                f"{wanted.get(name, 'missing')} in the model; was it written by another version?"
            )


def _interval_of(checkpoint: Checkpoint | None) -> Interval:
    if checkpoint is None:
        return Interval()
    # An older checkpoint doesn't say: the next record is of the steps after it alone.
    return checkpoint.facts.interval or Interval(step=checkpoint.step, seconds=checkpoint.facts.seconds)


def _how_to_go_on(folder: Path, step: int, steps: int) -> str:
    saved = checkpoints(folder)
    if not saved:
        return f"stopped after step {step:,} of {steps:,} with nothing saved; start again without --resume"
    return f"stopped after step {step:,} of {steps:,}; --resume goes on from {saved[-1][1]}"


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """One bar is enough, and one voice: transformers draws a bar at every save, and warns of tied weights on resume."""
    drawn, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if drawn:
            logging.enable_progress_bar()


def _refuse_no_checkpoint(init_from: str) -> None:
    try:
        load_checkpoint_config(init_from)
    except UserError as error:
        raise UserError(f"trainer.init_from: {error}") from None


# ---- the parts ---------------------------------------------------------------------------------------------


def _refuse_idle(recipe: Recipe) -> None:
    """Refuse what a run would not heed. A recipe that lies beside a model is read all the same."""
    task = recipe.data.build_task()
    if isinstance(task, LanguageModelling) and task.shuffle != SHUFFLE and not task.streaming:
        raise UserError(
            f"data.shuffle={task.shuffle} goes with data.streaming: true; blocks that are stored are drawn from all"
        )
    for name, section in recipe.mixture.tasks.items() if recipe.mixture is not None else ():
        if section.options.get("shuffle", SHUFFLE) != SHUFFLE:
            raise UserError(f"mixture.tasks.{name}.shuffle goes with streaming, which the text alone can; remove it")
    least = recipe.trainer.min_learning_rate
    if recipe.trainer.learning_rate_schedule == "constant" and least != LEAST_LEARNING_RATE:
        raise UserError(
            f"trainer.min_learning_rate={least} with learning_rate_schedule: constant, which never falls; remove one"
        )
    config = recipe.build_config(vocab_size=256, thresholds=(0.0, 1.0) if recipe.uses_baseline else None)
    if not isinstance(config, ChiarConfig):
        return
    calibration = recipe.calibration
    if calibration is not None and calibration.method != "running" and not config.routed_layers:
        raise UserError(
            f"calibration.method={calibration.method!r} with operators={config.operators}, no layer of which has a "
            "choice that thresholds could make; set calibration=null"
        )
    for side in fitted_sides(config) if recipe.fit is not None else ():
        _, spread = SPREADS[side]
        if getattr(config, spread) is not None:
            raise UserError(f"fit with model.{spread}, which a fit sets (fit.spread) or removes; leave one out")


def _refuse_data_parallel(processes: PartialState) -> None:
    """Refuse several GPUs in one process: that is torch's DataParallel, whose replicas lose their buffers."""
    if processes.num_processes == 1 and torch.cuda.device_count() > 1:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs and one process: start with torchrun --nproc-per-node "
            f"{torch.cuda.device_count()}, or set CUDA_VISIBLE_DEVICES to one of them"
        )


def _refuse_other_sharding() -> None:
    """Refuse what `accelerate launch` would have the model wrapped in, beside what the recipe says."""
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(name := f"ACCELERATE_USE_{kind}", "false").lower() in ("true", "1"):
            raise UserError(
                f"{name} is set, by accelerate launch or its configuration; a recipe says how a model is spread over "
                "processes: set trainer.fsdp=true and start with torchrun, or with accelerate launch --multi_gpu"
            )


def _rows_of(source: Dataset[Any] | TextStream, recipe: Recipe, world: int) -> Dataset[Any]:
    """The rows that a run reads: of a stream as many as it has steps for, in batches that each have a lane."""
    sequences = recipe.sequences_per_step(world)
    if isinstance(source, TextStream):
        batch_size = recipe.trainer.batch_size
        lanes = sequences // batch_size
        held = 4 * source.shuffle * source.length * lanes // world
        refuse_beyond_memory(held, f"the blocks that data.shuffle={source.shuffle} reads at a time")
        return source.rows(recipe.steps(world) * sequences, batch_size, lanes)
    return _whole_steps(source, sequences)


def _whole_steps(rows: Dataset[Any], sequences: int) -> Subset[Any]:
    """The rows that fill whole steps, so that every step learns from the same number of them."""
    count = len(cast(Sized, rows))
    if count < sequences:
        raise UserError(
            f"one step takes {sequences} sequences and the train split has {count}; "
            "lower trainer.batch_size or trainer.gradient_accumulation, or give more or shorter sequences"
        )
    return Subset(rows, range(count - count % sequences))


def _baseline_of(recipe: Recipe, facts: Facts, console: Console) -> str | None:
    """The folder of the model whose embeddings give the thresholds; trained first if the recipe names none."""
    if not recipe.uses_baseline or recipe.calibration is None:
        return None
    if recipe.calibration.baseline is not None:
        return recipe.calibration.baseline
    its = recipe.baseline()
    folder = Path(its.trainer.output_dir)
    # If it was interrupted, it goes on without being asked: the user resumes the whole run, of which it is a part.
    if (folder / _RECIPE).is_file():
        its.refuse_to_resume(Recipe.load(folder / _RECIPE))
    if not (folder / "model" / "config.json").is_file():
        try:
            train(its, resume=bool(checkpoints(folder)), console=console)
        except TrainingInterrupted as stop:
            where = str(stop).partition(";")[0]
            raise TrainingInterrupted(f"{where}, in the baseline; the same command goes on from there") from None
    elif (done := newest_complete(folder, lambda line: None)) is not None:
        _refuse_other_data(done, facts)
    return str(folder / "model")


def _build_model(recipe: Recipe, objective: Objective, baseline_folder: str | None) -> PreTrainedModel:
    thresholds, tokenizer = None, objective.tokenizer
    if isinstance(recipe.model, RetrofitSection):
        return _build_retrofitted(recipe.model, recipe.trainer.seed, tokenizer)
    if baseline_folder is not None:
        baseline = _load_baseline(baseline_folder, len(tokenizer))
        encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in objective.validation_texts)
        spectrum = recipe.build_config(len(tokenizer), (0.0, 1.0)).spectrum
        thresholds = paper_thresholds(baseline, encoded, spectrum=spectrum)
    config = recipe.build_config(len(tokenizer), thresholds)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    refuse_beyond_memory(4 * (count_parameters(config) or 0), "the model's weights")
    set_seed(recipe.trainer.seed)
    return objective.build_model(config)


def _build_retrofitted(section: RetrofitSection, seed: int, tokenizer: Any) -> PreTrainedModel:
    model = load_checkpoint(section.checkpoint)
    if load_checkpoint_tokenizer(section.checkpoint).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"tokenizer is another one than that of model.checkpoint={section.checkpoint}; remove it")
    _refuse_other_logits(model, section.checkpoint)
    if model.dtype in (torch.bfloat16, torch.float16):
        model = model.float()  # a step of training is lost in the rounding of bfloat16; the saved model is float32 too
    align_special_tokens(model, tokenizer)  # now, and not when the Trainer begins, which a finished run never does
    set_seed(seed)
    if section.lora is not None:
        add_adapters(model, section.lora)
    return model


@torch.no_grad()
def _refuse_other_logits(model: PreTrainedModel, name: str) -> None:
    """The divergence is of hidden states times the head's weights, which some models scale, cap or shift."""
    ids = torch.arange(4)[None] % model.config.vocab_size
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(hidden @ cast(Any, model.get_output_embeddings()).weight.T, logits, atol=1e-3, rtol=1e-3):
        raise UserError(
            f"model.checkpoint={name}: a {type(model).__name__} scales, caps or shifts its logits: it can't be healed"
        )


def _load_baseline(path: str, vocab_size: int) -> PreTrainedModel:
    try:
        baseline = load_checkpoint(path)
    except UserError as error:
        raise UserError(f"calibration.baseline: {error}") from None
    if baseline.config.vocab_size != vocab_size:
        raise UserError(
            f"calibration.baseline={path}: {baseline.config.vocab_size} tokens, the tokenizer {vocab_size}; "
            "train both with the same tokenizer and data"
        )
    return baseline


def _learning_rates(recipe: Recipe, steps: int) -> dict[str, Any]:
    """The Trainer's own name for how the learning rate goes."""
    trainer = recipe.trainer
    if trainer.learning_rate_schedule == "constant":
        return {"lr_scheduler_type": "constant_with_warmup"}
    if trainer.learning_rate_schedule == "wsd":
        ratio = trainer.min_learning_rate / trainer.learning_rate
        own = {"num_decay_steps": recipe.decay_steps(steps), "decay_type": "linear", "min_lr_ratio": ratio}
        return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": own}
    return {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": trainer.min_learning_rate},
    }


def _arguments(recipe: Recipe, scratch: Path, steps: int, use_cache: bool, streamed: bool) -> TrainingArguments:
    trainer = recipe.trainer
    try:
        arguments = TrainingArguments(
            output_dir=str(scratch),
            seed=trainer.seed,
            max_steps=steps,
            per_device_train_batch_size=trainer.batch_size,
            per_device_eval_batch_size=trainer.batch_size,
            gradient_accumulation_steps=trainer.gradient_accumulation,
            learning_rate=trainer.learning_rate,
            **_learning_rates(recipe, steps),
            warmup_steps=trainer.warmup_steps,
            weight_decay=trainer.weight_decay,
            adam_beta1=trainer.betas[0],
            adam_beta2=trainer.betas[1],
            max_grad_norm=trainer.clip,
            use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused where there is no GPU
            bf16=trainer.precision == "bf16",
            activation_checkpointing=trainer.gradient_checkpointing,
            torch_compile=trainer.compile,
            logging_steps=trainer.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it would put the mean of the losses before in a NaN's place
            eval_strategy="steps",
            eval_steps=trainer.evaluate_every or steps,
            save_steps=trainer.save_every,
            use_cache=use_cache,  # the Trainer writes it into the model's configuration, by default as False
            remove_unused_columns=False,
            train_sampling_strategy="sequential" if streamed else "random",  # a stream has shuffled its rows itself
            ddp_find_unused_parameters=True if recipe.mixture else None,  # a step has one head at most
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            run_name=Path(trainer.output_dir).name,
            report_to="none",  # what the recipe names is given as callbacks
        )
    except ValueError as error:
        raise UserError(f"this machine can't carry out the recipe: {' '.join(str(error).split())}") from None
    arguments.mixed_precision = "bf16" if trainer.precision == "bf16" else "no"  # or accelerate's settings would decide
    return arguments
