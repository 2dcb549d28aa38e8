"""What transformers calls the cache of keys and values: `past_key_values` up to 5.23, `cache` from 5.24 on.

The models take it under that name and return it under that name. Their forward passes what it doesn't know on to
attention, which drops it; so a model of our own refuses, with `refuse_unknown`, what nothing below it reads.
"""

from __future__ import annotations

import inspect
from dataclasses import fields

import transformers
from transformers import Cache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import TransformersKwargs

from ...versions import warn_if_untested

warn_if_untested("transformers", transformers.__version__)

CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# Read below the forward of a decoder: by masks and attention, by continuous batching's attention, by flex_attention,
# and by the loss, which is given the same keywords.
_READ = (
    frozenset(TransformersKwargs.__annotations__)
    | frozenset(PagedAttentionArgs.__annotations__)
    | frozenset(inspect.signature(ForCausalLMLoss).parameters)
    | {"kernel_options"}
)


def refuse_unknown(model: str, keywords: dict[str, object]) -> None:
    """Raise TypeError for keywords that nothing reads, so that none changes nothing without a word.

    Up to 5.23 continuous batching gives its pages as `cache`; any other cache under that name would be dropped.

    Args:
        model: what the error calls the model. keywords: those that it doesn't take itself, name -> value.
    """
    unknown = keywords.keys() - _READ
    if CACHE != "cache" and isinstance(keywords.get("cache"), Cache):
        unknown |= {"cache"}
    if unknown:
        named = ", ".join(sorted(unknown))
        raise TypeError(f"{model} got keywords that it does not read: {named}; its cache is called {CACHE} here")
