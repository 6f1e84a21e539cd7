"""What each command on images does: which images it opens in which way, and the words for qemu-img."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from storaged.errors import ErrorCode, StoragedError
from storaged.images import arguments, operand, remoteheader
from storaged.images.operand import Operand, Wish
from storaged.images.process import Outcome, run
from storaged.images.provide import Provided, provided
from storaged.images.timing import trials
from storaged.images.workspace import Workspace, workspace
from storaged.model.config import Config
from storaged.model.formats import Format
from storaged.model.layout import Layout
from storaged.model.sizes import parse_size


@dataclass(frozen=True)
class Task:
    """What all commands have in common."""

    layout: Layout
    config: Config
    command: str
    progress: Callable[[float], None]
    """Told the percentage of what has one."""
    doing: Callable[[str], None]
    """Told what is being done that has none."""
    spoilt: Callable[[str], None]
    """Told of what was there before, and was left half-written."""

    @property
    def owner(self) -> str:
        """What the lock of an image calls its holder."""
        return f"storaged image {self.command} (pid {os.getpid()})"


@contextlib.contextmanager
def opened(
    task: Task, operands: list[Operand], *, place: Workspace | None = None, shares: bool = False, commits: bool = False,
    pinned: bool = True,
) -> Iterator[Provided]:
    """Lock the images, and yield what qemu-img needs for them; of images behind servers the header was looked at."""
    with contextlib.ExitStack() as stack:
        place = place or stack.enter_context(workspace(task.layout))
        given = stack.enter_context(provided(
            operands, place, task.layout, task.config, owner=task.owner, shares=shares, commits=commits,
            pinned=pinned, progress=task.doing,
        ))
        task.doing(f"opening {operands[0].shown()}")
        for one in operands:
            remoteheader.check(one, given)
        yield given


def info(task: Task, wish: Wish, *, backing_chain: bool, force_share: bool, as_json: bool) -> str:
    """Return what qemu-img tells of an image (or of each of its chain).

    ``force_share`` takes no lock: it is then told what stands in a header that may change meanwhile. QEMU allows that
    for reading, and says that results may be inconsistent (-U in docs/tools/qemu-img.rst).
    """
    one = _checked(operand.look(wish, writable=False, alone=not backing_chain))
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    # By their paths: a relative name of a backing file is told with the directory that it is in.
    with opened(task, [one], shares=force_share, pinned=False) as given:
        for node in _layers(given.nodes[one.spec.name]):
            words = ["--force-share"] if force_share else []
            name = arguments.filename(node)
            shown = one.shown() if not found and not texts else str(node["file"].get("filename", ""))
            if as_json:
                found.append(
                    {**_json(run("info", [*words, "--output=json", name], given), dict), "filename": shown}
                )
            else:
                texts.append(_with_image(run("info", [*words, name], given).text, shown))
    if as_json:
        return json.dumps(found if backing_chain else found[0], indent=4)
    return "\n\n".join(text.rstrip("\n") for text in texts)


def _layers(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each image of a chain by itself."""
    yield _top(node)
    if node.get("backing") is not None:
        yield from _layers(node["backing"])


def _top(node: dict[str, Any]) -> dict[str, Any]:
    """An image without those below it: ``qemu-img info`` takes no others (BDRV_O_NO_BACKING)."""
    return {**node, "backing": None} if "backing" in node else node


def _with_image(text: str, shown: str) -> str:
    first, newline, rest = text.partition("\n")
    return (f"image: {shown}" if first.startswith("image: ") else first) + newline + rest


def check(task: Task, wish: Wish, *, repair: str | None, as_json: bool) -> tuple[str, bool]:
    """Return what qemu-img finds, and whether all is well (after the repair, if one was asked for)."""
    one = _checked(operand.look(wish, writable=repair is not None, alone=repair is None))
    words = [*(["-r", repair] if repair else []), *(["--output=json"] if as_json else [])]
    with opened(task, [one]) as given:
        task.doing(f"checking {one.shown()}")
        # 2: it is corrupt; 3: it has leaks (docs/tools/qemu-img.rst).
        outcome = run("check", [*words, given.names[one.spec.name]], given, accept=(0, 2, 3))
    # What is wrong stands on stderr, a line each, and how much it is on stdout.
    text = outcome.talk + outcome.text
    if as_json:
        text = json.dumps({**_json(outcome, dict), "filename": one.shown()}, indent=4)
    return text.rstrip("\n"), outcome.status == 0


def map(task: Task, wish: Wish, *, as_json: bool) -> str:
    """Return where in which file of the chain the data of an image is."""
    one = _checked(operand.look(wish, writable=False))
    with opened(task, [one]) as given:
        task.doing(f"mapping {one.shown()}")
        words = ["--output=json"] if as_json else []
        return run("map", [*words, given.names[one.spec.name]], given).text.rstrip("\n")


def compare(task: Task, wish: Wish, other: Wish, *, strict: bool) -> tuple[bool, str]:
    """Return whether two images have the same content, and qemu-img's words about it."""
    both = [_checked(operand.look(one, writable=False)) for one in (wish, other)]
    with opened(task, both) as given:
        words = [*(["-s"] if strict else []), *(given.names[one.spec.name] for one in both)]
        # 1: they differ; above: it could not be found out.
        outcome = run("compare", words, given, progress=task.progress, accept=(0, 1))
    said = [line for line in outcome.text.splitlines() if line]
    return outcome.status == 0, said[-1] if said else ""


def resize(task: Task, wish: Wish, size: str, *, shrink: bool, preallocation: str | None) -> None:
    """Give an image another size. What a smaller one cuts off is lost."""
    one = _checked(operand.look(wish, writable=True))
    words = ["-q", *(["--shrink"] if shrink else []), *([f"--preallocation={preallocation}"] if preallocation else [])]
    with opened(task, [one]) as given:
        task.doing(f"resizing {one.shown()}")
        run("resize", [*words, given.names[one.spec.name], arguments.new_size(size)], given)
        flush(given.nodes[one.spec.name])


def snapshot(task: Task, wish: Wish, *, action: str, name: str | None) -> str:
    """List (``-l``), create (``-c``), apply (``-a``) or delete (``-d``) a snapshot within an image."""
    one = _checked(operand.look(wish, writable=action != "-l"))
    words = [action, *([name] if name is not None else [])]
    with opened(task, [one]) as given:
        task.doing(f"snapshots of {one.shown()}")
        text = run("snapshot", [*words, given.names[one.spec.name]], given).text.rstrip("\n")
        flush(given.nodes[one.spec.name])
    return text


def amend(task: Task, wish: Wish) -> None:
    """Change options of an image's format."""
    one = operand.look(wish, writable=True)
    if not one.creation:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, "nothing is to be amended", hint="say -o compat=1.1, or what shall change"
        )
    with opened(task, [one]) as given:
        words = arguments.creation_words(one.creation)
        for trial in trials():
            with trial:
                run("amend", [*words, given.names[one.spec.name]], given, progress=task.progress)
        flush(given.nodes[one.spec.name])


def rebase(task: Task, wish: Wish, backing: str, backing_format: Format | None, *, unsafe: bool) -> None:
    """Give an image another backing file, or none (an empty name).

    ``unsafe``: only the name in its header changes; no backing file is opened, the old one or the new one.
    """
    one = _checked(operand.look(wish, writable=True, alone=unsafe))
    operands, words = [one], ["-u"] if unsafe else []
    if backing:
        base = _base(wish, backing, backing_format)
        if not unsafe:
            operands.append(operand.look(base, writable=False))
        words += ["-b", backing, "-F", str(base.format)]
    else:
        words += ["-b", ""]
    with opened(task, operands) as given:
        run("rebase", [*words, given.names[one.spec.name]], given, progress=task.progress)
        flush(given.nodes[one.spec.name])


def _base(wish: Wish, backing: str, format: Format | None) -> Wish:
    """A backing file as a wish: of the files that it names itself, those that were allowed may be opened."""
    allowed = {"backing": wish.options["backing"]} if "backing" in wish.options else {}
    return Wish(backing, format or arguments.format_of_name(backing), allowed, name="backing")


def commit(task: Task, wish: Wish, *, keep: bool, rate: str | None) -> None:
    """Write what an image has over its backing file into that. ``keep``: the image is not emptied then."""
    one = _checked(operand.look(wish, writable=True, commits=True))
    if not one.opened.node.get("backing"):
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"{one.shown()} has no backing file", hint="there is nothing to commit to"
        )
    words = [*(["-d"] if keep else []), *(["-r", str(parse_size(rate))] if rate else [])]
    with opened(task, [one], commits=True) as given:
        run("commit", [*words, given.names[one.spec.name]], given, progress=task.progress)
        flush(given.nodes[one.spec.name])


def _checked(one: Operand) -> Operand:
    operand.refuse_creation_options(one)
    return one


def flush(node: Mapping[str, Any]) -> None:
    """Flush the files of this host in a tree: qemu-img does not tell when its last flush fails. Raises FLUSH_FAILED."""
    for key, value in node.items():
        if isinstance(value, dict):
            flush(value)
        elif key == "filename" and node["driver"] in ("file", "host_device"):
            try:
                fd = os.open(value, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                raise StoragedError(
                    ErrorCode.FLUSH_FAILED, f"{value} cannot be flushed", cause=error.strerror or "",
                    hint="make room, or repair the storage below; what was written may not be there",
                ) from error


def _json(outcome: Outcome, kind: type[Any]) -> Any:
    try:
        value = json.loads(outcome.text)
    except ValueError as error:
        raise StoragedError(
            ErrorCode.IMAGE_FAILED, "qemu-img's answer cannot be understood", cause=str(error)
        ) from error
    assert isinstance(value, kind)
    return value


def virtual_size(one: Operand, given: Provided) -> int:
    """The size of the disk in an image that is open, in bytes."""
    name = arguments.filename(_top(given.nodes[one.spec.name]))
    return int(_json(run("info", ["--output=json", name], given), dict)["virtual-size"])


