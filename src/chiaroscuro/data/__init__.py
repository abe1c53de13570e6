"""What a model trains on: corpora, tokenizers, token files, blocks; `chiaroscuro.data.tasks` has the tasks."""

import chiaroscuro.lab  # noqa: F401
from chiaroscuro.data.blocks import MixedRows, TokenBlocks
from chiaroscuro.data.corpora import Corpus, StreamedCorpus, check_source, load_corpus, stream_corpus
from chiaroscuro.data.pretrained import smollm2
from chiaroscuro.data.storage import default_cache_dir
from chiaroscuro.data.streams import StreamedBlocks, TextStream
from chiaroscuro.data.tokenizers import load_tokenizer
from chiaroscuro.data.tokens import TokenFile, tokenize_corpus

__all__ = [
    "Corpus",
    "MixedRows",
    "StreamedBlocks",
    "StreamedCorpus",
    "TextStream",
    "TokenBlocks",
    "TokenFile",
    "check_source",
    "default_cache_dir",
    "load_corpus",
    "load_tokenizer",
    "smollm2",
    "stream_corpus",
    "tokenize_corpus",
]
