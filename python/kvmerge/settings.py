"""What a `Llama` is asked for: the options of this package, and those of llama-cpp-python."""

from __future__ import annotations

import inspect
import logging
import os
from dataclasses import dataclass, fields
from typing import Any

from llama_cpp.llama import Llama as StockLlama

from . import options as option_table
from .budget import Budget
from .cache_types import UNQUANTIZED, cache_type
from .cap import Cap
from .errors import (
    ModelError,
    OptionError,
    UnknownOptionError,
    UnsupportedError,
    did_you_mean,
)
from .gguf_file import check_gguf
from .media.access import MediaAccess
from .media.image_merge import ImageMerge
from .policies import Policy, resolve
from .progress import Listener

log = logging.getLogger("kvmerge")

_STOCK = inspect.signature(StockLlama.__init__).parameters
_STOCK_OPTIONS = frozenset(_STOCK) - {"self", "kwargs"}
N_UBATCH = int(_STOCK["n_ubatch"].default)
"""Tokens of a batch, unless told."""

_PROJECTOR_SPELLINGS = ("mmproj", "mmproj_path", "clip_model_path")
_FORGOTTEN_OPTIONS = frozenset(
    {"rpc_servers", "mul_mat_q", "n_parts", "f16_kv", "low_vram", "n_gqa", "rms_norm_eps"}
)
"""What released versions of llama-cpp-python and frameworks on it pass, and none takes any more."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `kvmerge.Llama` that llama-cpp-python does not have, checked.

    Each attribute is an option of that name, in the form that it is used in.

    Raises
    ------
    OptionError
        If one of them is not what it may be.
    BudgetError
        If the budget is none, or none for this policy.
    """

    mmproj: str | os.PathLike[str] | None
    kv_merge: Policy | None
    kv_budget: Budget
    merge_before: int
    kv_max_cells: Cap | None
    keep_last_images: int
    kv_trace: bool
    image_min_tokens: int | None
    image_max_tokens: int | None
    media_access: MediaAccess
    image_cache: int | str | None
    image_cache_dir: str | os.PathLike[str] | None
    image_merge: float | bool | None
    progress: bool | Listener | None

    @classmethod
    def of(cls, **given: Any) -> Settings:
        """Check options as a user writes them."""
        policy, budget = resolve(given["kv_merge"]), Budget(given["kv_budget"])
        if policy is not None:
            policy.check_budget(budget)
        cap, whole = given["kv_max_cells"], option_table.whole(0)
        tokens = option_table.or_none(option_table.whole(1))
        checked = {
            "kv_merge": policy,
            "kv_budget": budget,
            "merge_before": whole("merge_before", given["merge_before"]),
            "kv_max_cells": None if cap is None else Cap(cap),
            "keep_last_images": whole("keep_last_images", given["keep_last_images"]),
            "kv_trace": option_table.switch("kv_trace", given["kv_trace"]),
            "image_min_tokens": tokens("image_min_tokens", given["image_min_tokens"]),
            "image_max_tokens": tokens("image_max_tokens", given["image_max_tokens"]),
            "media_access": _media_access(given["media_access"]),
        }
        return cls(**{**given, **checked})

    def given(self) -> dict[str, Any]:
        """Return them as a user writes them."""
        cap = self.kv_max_cells
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return options | {
            "kv_budget": self.kv_budget.kept,
            "kv_max_cells": None if cap is None else cap.limit,
        }

    @property
    def is_merging(self) -> bool:
        """Whether there is anything to merge, ever."""
        keeps_all = self.kv_budget.keeps_all and self.kv_max_cells is None
        return self.kv_merge is not None and not keeps_all

    @property
    def share(self) -> float:
        """The budget where it is a share of the tokens, else 0."""
        return self.kv_budget.kept if isinstance(self.kv_budget.kept, float) else 0.0

    def check_beside(self, options: dict[str, Any]) -> None:
        """Check that they go together, and with options of llama-cpp-python."""
        handler, has_cap = options.get("chat_handler"), self.kv_max_cells is not None
        if self.kv_merge is None and (has_cap or self.keep_last_images):
            option = "kv_max_cells" if has_cap else "keep_last_images"
            raise OptionError(f"{option}= needs kv_merge=, which is None: say how to merge")
        self._check_projector(options)
        if self.is_merging and hasattr(handler, "clip_model_path"):
            raise UnsupportedError(
                f"{type(handler).__name__} clears the cache in every call and counts positions as "
                "tokens, so it does not go with kv_merge=: pass the file as mmproj= instead"
            )
        if has_cap and options.get("draft_model") is not None:
            raise UnsupportedError(
                "draft_model= does not go with kv_max_cells=: a proposal that is wrong is taken "
                "back from the end of the cache, which a cap may have merged by then"
            )
        if self.is_merging and options.get("embedding"):
            raise UnsupportedError("embedding=True keeps no cache, so there is nothing to merge")

    def _check_projector(self, options: dict[str, Any]) -> None:
        if self.mmproj is None:
            if (self.image_min_tokens, self.image_max_tokens) != (None, None):
                raise OptionError("image_min_tokens= and image_max_tokens= need mmproj=")
            if ImageMerge.of(self.image_merge) is not None:
                raise OptionError("image_merge= needs mmproj=")
            if self.image_cache_dir is not None:
                raise OptionError("image_cache_dir= needs mmproj=")
            return
        if options.get("chat_handler") is not None:
            raise OptionError("mmproj= brings its own chat handler: pass it or chat_handler=")
        if options.get("chat_format") is not None:
            raise OptionError(
                f"chat_format={options['chat_format']!r} is not used beside mmproj=: chats are "
                "written as the model's own chat template says"
            )


def _media_access(value: object) -> MediaAccess:
    if value is None:
        return MediaAccess.everything()
    if isinstance(value, MediaAccess):
        return value
    raise OptionError(f"media_access={value!r}: it must be a kvmerge.MediaAccess, or None for all")


def take_projector(
    mmproj: str | os.PathLike[str] | None, options: dict[str, Any]
) -> str | os.PathLike[str] | None:
    """Return the vision part by whichever of its names it is given, and take those from options."""
    given = {"mmproj": mmproj}
    given |= {name: options.pop(name) for name in _PROJECTOR_SPELLINGS if name in options}
    given = {name: value for name, value in given.items() if value is not None}
    if len(set(map(str, given.values()))) > 1:
        raise OptionError(f"{' and '.join(given)} name different files: pass mmproj= only")
    return next(iter(given.values()), None)


def check_stock(options: dict[str, Any]) -> None:
    """Check options of llama-cpp-python, and put each in the form that it takes.

    Raises
    ------
    UnknownOptionError
        If there is none of that name.
    OptionError
        If one of them is not what it may be.
    """
    for name in _FORGOTTEN_OPTIONS & options.keys():
        log.warning("Llama no longer has the option %s: it changes nothing", name)
        del options[name]
    for name in options:
        if name not in _STOCK_OPTIONS:
            ours = {*_PROJECTOR_SPELLINGS, *(field.name for field in fields(Settings))}
            hint = did_you_mean(name, _STOCK_OPTIONS | ours)
            raise UnknownOptionError(f"Llama has no option {name!r}.{hint}")
    for name in ("lora_base", "lora_path"):
        if isinstance(options.get(name), os.PathLike):
            options[name] = os.fspath(options[name])
    options |= option_table.checked(option_table.LLAMA, options)
    if options.get("lora_path") is not None:
        check_gguf(options["lora_path"], "LoRA", ModelError)
    for name in ("type_k", "type_v"):
        if name in options:
            options[name] = cache_type(name, options[name])
    if options.get("n_ctx"):
        # The parent makes an array of as many rows, however few are ever used.
        options["n_batch"] = min(options.get("n_batch", N_UBATCH), options["n_ctx"])
    type_v = options.get("type_v")
    if type_v is not None and type_v not in UNQUANTIZED and not options.get("flash_attn"):
        raise OptionError("a quantized type_v needs flash_attn=True")
