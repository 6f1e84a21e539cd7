"""A volume whose source is a json: tree becomes one with an ordinary source, which is stored and shown. Pure."""

from __future__ import annotations

import msgspec

from storaged.backends.jsontree import is_tree, read_tree
from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.spec import VolumeSpec, check_length


def spelled_out(spec: VolumeSpec, said: Format | None) -> VolumeSpec:
    """Return the wishes with the tree of its source taken apart; ``said`` is the format beside the tree, if one is.

    Raises what ``read_tree`` raises, INVALID_ARGUMENT where tree and wishes contradict, or are too long.
    """
    check_length(spec)
    if not is_tree(spec.source):
        return spec
    try:
        tree = read_tree(spec.source, spec.options)
        if tree.format is not None and said not in (None, tree.format):
            _contradict(f"the image is {tree.format} in the tree, and --format {said}")
        if tree.read_only is False and spec.read_only:
            _contradict("the tree says that it is not read-only, and --read-only is said")
    except StoragedError as error:
        raise error.at(volume=spec.name) from None
    return msgspec.structs.replace(
        spec, source=tree.source, format=tree.format or spec.format, options={**tree.options, **spec.options},
        # Below --snapshot the source is only read anyway, and the disk is written to.
        read_only=spec.read_only or (tree.read_only is True and not spec.snapshot),
    )


def _contradict(message: str) -> None:
    raise StoragedError(ErrorCode.INVALID_ARGUMENT, message, hint="leave one of them out")
