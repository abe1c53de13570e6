"""The operators, the routers, the MetaRouter and the routed block as modules that work alone, tensors in and out."""

from chiaroscuro.layers.block import RoutedBlock, Routing
from chiaroscuro.layers.feed_forward import FeedForward, GatedFeedForward
from chiaroscuro.layers.learned_router import LearnedRouter
from chiaroscuro.layers.meta_router import MetaRouter
from chiaroscuro.layers.packed_tokens import PackedTokens
from chiaroscuro.layers.permuted_router import PermutedRouter
from chiaroscuro.layers.random_router import RandomRouter
from chiaroscuro.layers.rbf_mixing import RBFMixing
from chiaroscuro.layers.registry import find_operator, find_router, register_operator, register_router
from chiaroscuro.layers.router import HardRouter, ScoreRouter, SoftRouter, ThresholdRouter, pick_thresholds
from chiaroscuro.layers.self_attention import SelfAttention
from chiaroscuro.layers.spectral_mixing import SpectralMixing
from chiaroscuro.layers.thresholds import Thresholds

__all__ = [
    "FeedForward",
    "GatedFeedForward",
    "HardRouter",
    "LearnedRouter",
    "MetaRouter",
    "PackedTokens",
    "PermutedRouter",
    "RBFMixing",
    "RandomRouter",
    "RoutedBlock",
    "Routing",
    "ScoreRouter",
    "SelfAttention",
    "SoftRouter",
    "SpectralMixing",
    "ThresholdRouter",
    "Thresholds",
    "find_operator",
    "find_router",
    "pick_thresholds",
    "register_operator",
    "register_router",
]
