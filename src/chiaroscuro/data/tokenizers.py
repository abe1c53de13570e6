"""A tokenizer by name: `bpe:8192` or `words`, which are trained here, a local folder, or a Hugging Face Hub name.

All are of one class, `transformers.PreTrainedTokenizerFast`, so they are saved beside the model's weights, where
`AutoTokenizer` finds them.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from chiaroscuro.data.corpora import Corpus, find_folder
from chiaroscuro.data.progress import patient_bar
from chiaroscuro.data.storage import cached_file, default_cache_dir, fingerprint
from chiaroscuro.errors import UserError, one_line
from chiaroscuro.hub import cache_if_unreachable

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
UNKNOWN_WORD = "<unk>"

# All 256 bytes, the end of text, and one merge: with fewer, some text has no tokens, or there is no BPE.
SMALLEST_VOCABULARY = 256 + 1 + 1

# The trainer reserves memory for as many tokens as it is asked for, and aborts the process where that fails.
LARGEST_VOCABULARY = 2**20

# More than any text has, so that all words get a token.
MANY_WORDS = 2**31

# To be raised when the training below changes, so that an old tokenizer is not taken for a new one.
FORMAT = 1

# Read at import, because `all_cores` sets the variable.
USERS_PARALLELISM = os.environ.get("TOKENIZERS_PARALLELISM")

HUB_NAME = re.compile(r"([\w.-]+/)?[\w.-]+")
WANTED_TOKENIZERS = "a tokenizer is 'bpe:8192' (any size), 'words', a folder with tokenizer files, or a Hub name"


def load_tokenizer(source: str | Path, corpus: Corpus, cache_dir: Path | None = None) -> PreTrainedTokenizerFast:
    """Load a tokenizer, or train one.

    Args:
        source: one of

            - `bpe:N`: a byte-level BPE of N tokens, one of them `<|endoftext|>`, trained on the corpus' train split (if
              that is streamed, on its beginning) and kept. Where the text has too few repetitions for N tokens, a
              warning says how many there are;
            - `words`: every word of the corpus' train split, delimited by white space, is a token. Other words are
              `<unk>`, and the white space is lost. It is meant for tasks with a language of their own, such as ListOps;
            - a folder: what `save_pretrained` writes, or GPT-2's `vocab.json` and `merges.txt`;
            - a name on the Hugging Face Hub.
        corpus: what `bpe:N` and `words` are trained on.
        cache_dir: where these two are kept; [`default_cache_dir`][] by default.

    Returns:
        The tokenizer. If it has no padding token, its end-of-sequence token serves as one.

    Raises:
        UserError: there is no such tokenizer, N is too small or no number, or the tokenizer has no fast version.

    """
    tokenizer: PreTrainedTokenizerBase
    name = str(source)
    if name.partition(":")[0] == "bpe":
        tokenizer = _trained(name, corpus, cache_dir or default_cache_dir())
    elif name == "words":
        tokenizer = _words(corpus, cache_dir or default_cache_dir())
    elif folder := find_folder(name, WANTED_TOKENIZERS):
        tokenizer = load_from_folder(name, folder)
    elif HUB_NAME.fullmatch(name):
        tokenizer = _from_pretrained(name, f"could not load the tokenizer {name!r} from the Hugging Face Hub")
    else:
        raise UserError(f"no such tokenizer: {name!r}; {WANTED_TOKENIZERS}")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer {name!r} has no fast version (tokenizer.json); choose one that has")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_of(name: str) -> int:
    """How many tokens a tokenizer bpe:N is to have.

    Raises:
        UserError: N is no number that it can have.

    """
    size = name.partition(":")[2]
    known = size.isascii() and size.isdecimal() and len(size) < 10
    if not known or not SMALLEST_VOCABULARY <= int(size) <= LARGEST_VOCABULARY:
        raise UserError(
            f"the tokenizer {name!r} needs a whole number from {SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY:,} after "
            "'bpe:'"
        )
    return int(size)


def _trained(name: str, corpus: Corpus, cache_dir: Path) -> PreTrainedTokenizerFast:
    size = vocabulary_of(name)
    key = fingerprint(corpus=corpus.fingerprint, size=size, format=FORMAT, tokenizers=tokenizers.__version__)
    backend = _kept(cache_dir / "tokenizers" / f"bpe-{size}-{key}.json", lambda: _train(size, corpus))
    if backend.get_vocab_size() < size:
        logger.warning(
            "the tokenizer %s has only %s tokens: the text has too few repetitions for more",
            name,
            f"{backend.get_vocab_size():,}",
        )
    return _wrapped(backend)


def _words(corpus: Corpus, cache_dir: Path) -> PreTrainedTokenizerFast:
    key = fingerprint(corpus=corpus.fingerprint, format=FORMAT, tokenizers=tokenizers.__version__)
    backend = _kept(cache_dir / "tokenizers" / f"words-{key}.json", lambda: _train_words(corpus))
    return _wrapped(backend, unk_token=UNKNOWN_WORD)


def _kept(path: Path, train: Callable[[], Tokenizer]) -> Tokenizer:
    backend = _read(path) if path.exists() else None
    if backend is None:
        backend = train()
        with cached_file(path) as temporary:
            temporary.write_text(backend.to_str())
    return backend


def _wrapped(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **special,
    )


def _read(path: Path) -> Tokenizer | None:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        logger.warning("training again: the cached tokenizer %s can't be read (%s)", path, one_line(error))
        return None


def _train(size: int, corpus: Corpus) -> Tokenizer:
    """Train a byte-level BPE like GPT-2's: lossless, without an unknown token, words split by GPT-2's pattern."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # its bar writes empty lines to standard output
    )
    return _trained_on(corpus, f"bpe:{size}", backend, trainer)


def _train_words(corpus: Corpus) -> Tokenizer:
    """Collect the words of the train split, the most frequent first."""
    backend = Tokenizer(models.WordLevel(unk_token=UNKNOWN_WORD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=MANY_WORDS, min_frequency=1, special_tokens=[END_OF_TEXT, UNKNOWN_WORD], show_progress=False
    )
    return _trained_on(corpus, "words", backend, trainer)


def _trained_on(corpus: Corpus, name: str, backend: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    pieces, size = corpus.sample()
    with all_cores(), patient_bar(f"training {name}", size) as advance:
        backend.train_from_iterator(_counted(pieces, advance), trainer)
    return backend


def _counted(pieces: Iterator[str], advance: Callable[[int], None]) -> Iterator[str]:
    for piece in pieces:
        yield piece
        advance(len(piece))


def load_from_folder(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder that the user called by that name; a UserError if there is none, or a damaged one."""
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return _from_pretrained(str(folder), f"the tokenizer in {name!r} can't be read")
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if vocabulary.is_file() and merges.is_file():
        try:
            return GPT2Tokenizer(vocab=str(vocabulary), merges=str(merges))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise UserError(
                f"the tokenizer in {name!r} can't be read ({one_line(error)}); "
                "vocab.json and merges.txt must be GPT-2's or shaped like them"
            ) from error
    raise UserError(f"the folder {name!r} holds no tokenizer: wanted tokenizer.json, or vocab.json and merges.txt")


def _from_pretrained(name: str, failure: str) -> PreTrainedTokenizerBase:
    with cache_if_unreachable(name) as unreachable:
        try:
            return AutoTokenizer.from_pretrained(name)
        except Exception as error:  # the network, the Hub and the files raise errors of many kinds
            raise UserError(f"{failure} ({unreachable or one_line(error)}); {WANTED_TOKENIZERS}") from error


def bare_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's core that neither pads nor truncates, whatever calls of the tokenizer have set."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


@contextmanager
def all_cores() -> Iterator[None]:
    """Let `tokenizers` use one thread for each core inside the block.

    A process that has used these threads and then forks, as a DataLoader with workers does, prints a warning about
    deadlocks unless TOKENIZERS_PARALLELISM is set. After the block it is "false", which is safe in forked processes. A
    value that the user has set is left alone.
    """
    if USERS_PARALLELISM is not None:
        yield
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
