"""Why a model could not be loaded: the true reason, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path


def one_line(error: BaseException | str) -> str:
    """An error's message without its line breaks; its kind where the message alone says little."""
    text = " ".join(str(error).split())
    if isinstance(error, BaseException) and not isinstance(error, OSError | ValueError):
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text


def reason(error: Exception, source: str, folder: Path | None) -> str | None:
    """What is wrong with the model's files or name; None where the error is of another kind."""
    if folder is None:
        for cause in _chain(error):
            if (why := _of_the_hub(cause, source)) is not None:
                return why
    text = one_line(error)
    if "ignore_mismatched_sizes" in text:
        return "a tensor of its weights has another shape than its config.json says"
    if "does not recognize this architecture" in text or "Unsupported architecture" in text:
        return text.split(" This could be because")[0] + (
            f" (transformers {version('transformers')},"
            f" transformer_lens {version('transformer_lens')})"
        )
    if "PytorchStreamReader" in text or "UnpicklingError" in text:
        return f"a file of its weights is broken; fetch it again ({text})"
    if "backend tokenizer" in text:
        return "it has no tokenizer files; put its own beside its weights, or pass tokenizer="
    # Memory that runs out, devices that are not there, options that do not exist.
    return None if isinstance(error, RuntimeError | TypeError | MemoryError) else text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _of_the_hub(error: BaseException, source: str) -> str | None:
    from huggingface_hub import constants, errors

    # From the special to the general: a gated repository is a kind of one that is not found.
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{source!r} is gated: ask for access at https://huggingface.co/{source}, then log in"
            f" with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub's {source!r} has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no folder {source!r} here, and no model of that name on the hub, or it is"
            f" private; check the spelling, and log in with `hf auth login` if it is private"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{source!r} is no folder here, and can be no name on the hub"
    offline = isinstance(error, errors.OfflineModeIsEnabled)
    if not offline and not isinstance(error, errors.LocalEntryNotFoundError):
        return None
    nowhere = f"there is no folder {source!r} here, it is not in the hub's cache, and"
    if offline or constants.HF_HUB_OFFLINE:
        return f"{nowhere} HF_HUB_OFFLINE keeps from asking the hub; unset it to download the model"
    return f"{nowhere} the hub cannot be reached"
