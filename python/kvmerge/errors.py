"""The exceptions of this package.

Every one is a `KVMergeError` and also the builtin that fits, so ``except ValueError`` written for
llama-cpp-python keeps working.  Messages name the cause and what is accepted instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class KVMergeError(Exception):
    """Base of all exceptions that this package raises."""


class LibraryError(KVMergeError, ImportError):
    """The native library is missing, of another version, or was not the one loaded."""


class PolicyError(KVMergeError, ValueError):
    """An unknown ``kv_merge`` name, or a policy field out of its range."""


class BudgetError(KVMergeError, ValueError):
    """A ``kv_budget`` that is neither a fraction in (0, 1] nor a number of cells."""


class OptionError(KVMergeError, ValueError):
    """An option that is out of its range or does not go with another one."""


class UnknownOptionError(KVMergeError, TypeError):
    """A keyword that `kvmerge.Llama` does not have."""


class ModelError(KVMergeError, ValueError):
    """A model file that is missing, not a GGUF, damaged, or not supported."""


class ProjectorError(KVMergeError, ValueError):
    """An mmproj file that is missing, not a GGUF, damaged, or made for another model."""


class MediaError(KVMergeError, ValueError):
    """A picture or sound that cannot be had or read."""


class ContextLengthError(KVMergeError, ValueError):
    """More tokens than the context (``n_ctx``) takes."""


class UnsupportedError(KVMergeError, NotImplementedError):
    """Something that does not work with merging, or with this model."""


class StateError(KVMergeError, RuntimeError):
    """A call that does not fit the present state."""


class ClosedError(StateError):
    """The object was used after ``close()``."""


class ForkedError(StateError):
    """The object was made before the process forked, and is used in the new process."""


class DecodeError(KVMergeError, RuntimeError):
    """llama.cpp could not run the model."""


class StoppedError(KVMergeError, RuntimeError):
    """Reading was stopped by ``progress=``; what was read is in the cache."""


class MergeError(KVMergeError, RuntimeError):
    """A merge failed; the cache is as it was before."""


class CacheClearedError(MergeError):
    """A merge failed while the cache changed; the cache was cleared."""


class OutOfMemoryError(KVMergeError, MemoryError):
    """An allocation of the engine failed."""


def did_you_mean(word: object, accepted: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for a near miss, else an empty string."""
    close = get_close_matches(str(word), list(accepted), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
