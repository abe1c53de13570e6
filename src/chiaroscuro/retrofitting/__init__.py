"""Routing for models that exist: any decoder of transformers, in place."""

from typing import TYPE_CHECKING

from chiaroscuro.lazy import lazily

if TYPE_CHECKING:
    from chiaroscuro.retrofitting.fitting import fit
    from chiaroscuro.retrofitting.in_place import retrofit, unretrofit
    from chiaroscuro.retrofitting.routed_model import RetrofitConfig, RoutedModel
    from chiaroscuro.retrofitting.whole import without_routing

__all__ = ["RetrofitConfig", "RoutedModel", "fit", "retrofit", "unretrofit", "without_routing"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "fitting": ("fit",),
        "in_place": ("retrofit", "unretrofit"),
        "routed_model": ("RetrofitConfig", "RoutedModel"),
        "whole": ("without_routing",),
    },
)
