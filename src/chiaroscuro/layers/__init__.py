"""The operators, the routers, the MetaRouter and the routed block as modules that work alone, tensors in and out."""

from chiaroscuro.layers.block import RoutedBlock, Routing
from chiaroscuro.layers.build import build_block
from chiaroscuro.layers.context import Context, Spectra
from chiaroscuro.layers.exact_buffers import ExactBuffers, exact_modules
from chiaroscuro.layers.feed_forward import FeedForward, GatedFeedForward
from chiaroscuro.layers.fitted_router import FittedRouter
from chiaroscuro.layers.learned_router import LearnedRouter
from chiaroscuro.layers.local_attention import LocalAttention
from chiaroscuro.layers.meta_router import MetaRouter
from chiaroscuro.layers.norm_router import NormRouter
from chiaroscuro.layers.operator import Count, Operator, Work
from chiaroscuro.layers.packed_tokens import PackedTokens
from chiaroscuro.layers.permuted_router import PermutedRouter
from chiaroscuro.layers.random_router import RandomRouter
from chiaroscuro.layers.rbf_mixing import RBFMixing
from chiaroscuro.layers.reach_state import ReachState
from chiaroscuro.layers.registry import (
    build_operator,
    build_router,
    find_operator,
    find_router,
    register_operator,
    register_router,
)
from chiaroscuro.layers.router import (
    Decision,
    Router,
    ScoreOptions,
    ScoreRouter,
    SeededOptions,
    ThresholdRouter,
    check_seed,
    pick_thresholds,
)
from chiaroscuro.layers.self_attention import SelfAttention
from chiaroscuro.layers.short_convolution import NeighbourMixing, ShortConvolution
from chiaroscuro.layers.soft_router import HardRouter, SoftRouter
from chiaroscuro.layers.spectral_mixing import SpectralMixing
from chiaroscuro.layers.state import KeptTokens, LayerStates, OperatorState
from chiaroscuro.layers.thresholds import Thresholds

__all__ = [
    "Context",
    "Count",
    "Decision",
    "ExactBuffers",
    "FeedForward",
    "FittedRouter",
    "GatedFeedForward",
    "HardRouter",
    "KeptTokens",
    "LayerStates",
    "LearnedRouter",
    "LocalAttention",
    "MetaRouter",
    "NeighbourMixing",
    "NormRouter",
    "Operator",
    "OperatorState",
    "PackedTokens",
    "PermutedRouter",
    "RBFMixing",
    "RandomRouter",
    "ReachState",
    "RoutedBlock",
    "Router",
    "Routing",
    "ScoreOptions",
    "ScoreRouter",
    "SeededOptions",
    "SelfAttention",
    "ShortConvolution",
    "SoftRouter",
    "Spectra",
    "SpectralMixing",
    "ThresholdRouter",
    "Thresholds",
    "Work",
    "build_block",
    "build_operator",
    "build_router",
    "check_seed",
    "exact_modules",
    "find_operator",
    "find_router",
    "pick_thresholds",
    "register_operator",
    "register_router",
]
