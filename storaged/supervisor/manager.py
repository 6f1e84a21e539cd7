"""All volumes of the daemon: finds them at the start, makes and forgets their actors, answers for them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec

from storaged.backends import find_backend
from storaged.errors import ErrorCode, StoragedError
from storaged.host.atomic import write_atomic
from storaged.host.blocking import BlockingCalls
from storaged.host.process import boot_id
from storaged.model import backingsources
from storaged.model.names import check_name
from storaged.model.plan import RESCUES, Goal
from storaged.model.qemu_args import QemuArguments
from storaged.model.record import Record
from storaged.model.spec import Desired, VolumeSpec, caches_writes, check_spec, difference, without_defaults
from storaged.observe.journald import about
from storaged.store.base import Damaged
from storaged.store.files import Found
from storaged.store.profiles import with_profile
from storaged.supervisor import fetching, overlay
from storaged.supervisor.environment import Environment
from storaged.supervisor.records import load_record
from storaged.supervisor.secrets import NO_SECRETS, check_secrets, secrets_apart
from storaged.supervisor.volume import Volume
from storaged.transports import check_transport, options_of

#: Seconds after the end of a volume in which others may end, before memory is freed of them.
_TIDY_AFTER = 1.0

log = logging.getLogger("storaged.manager")


@dataclass(frozen=True)
class Reread:
    """What came of reading the files of volumes again, by the names of volumes."""

    attaching: list[str]
    """New ones."""
    differing: list[str]
    """Attached with other wishes than their file has now."""
    failures: list[StoragedError]


class Manager:
    """Knows every volume by its name."""

    def __init__(self, environment: Environment, tasks: asyncio.TaskGroup) -> None:
        self.environment = environment
        self._tasks = tasks
        self._volumes: dict[str, Volume] = {}
        self._actors: dict[str, asyncio.Task[None]] = {}
        self._blocking = BlockingCalls("storaged")
        self._files = Found()
        #: Ended as the host goes down. What is wished for, and what is kept of them, is the next daemon's.
        self._parked: set[str] = set()
        #: They are read, or a mark is made: what is read before a mark and kept after it would undo it.
        self._files_change = asyncio.Lock()
        self._tidying = False

    async def start(self) -> None:
        """Find what is wished and what is left of earlier daemons, and let an actor adopt each.

        A damaged entry is set aside and said; the other volumes come up.
        """
        for desired in await self._blocking("read the stored volumes", 60, self._collect):
            self._begin(Volume(desired, self.environment), adopt=True)
        self._tell_bad_files()

    async def reload(self) -> Reread:
        """Read the files of volumes again, and attach what is new. What is attached stays as it is.

        A file that is of no use keeps none of the others from it. Raises INVALID_ARGUMENT where the files cannot be
        found at all.
        """
        async with self._files_change:
            self._files = await self._blocking("read the files of volumes", 60, self._read_files)
        self._tell_bad_files()
        read = Reread([], [], list(self._files.bad.values()))
        for name, spec in self._files.volumes.items():
            volume = self._volumes.get(name)
            if volume is None and name not in self._files.detached | self._parked:
                desired = Desired(spec=spec)
                try:
                    await self._blocking("store what is wished", 30, self.environment.volatile.put, desired)
                except StoragedError as error:
                    log.error("%s [%s]; %s", error.at(volume=name), error.code, error.hint, extra=about(name))
                    read.failures.append(error)
                    continue
                if name not in self._volumes:
                    self._begin(Volume(desired, self.environment), adopt=True)
                    read.attaching.append(name)
            elif volume is not None and msgspec.structs.replace(volume.spec, persist=False) != spec:
                log.warning(
                    "volume %s: %s wishes for something else than what is attached (%s): detach it, and reload again",
                    name, self.environment.files.path(name), difference(volume.spec, spec), extra=about(name),
                )
                read.differing.append(name)
        log.info("the files of volumes were reloaded, %d volumes", len(self._volumes))
        return read

    def volumes(self) -> list[Volume]:
        """All volumes, sorted by name."""
        return [self._volumes[name] for name in sorted(self._volumes)]

    def actors(self) -> list[asyncio.Task[None]]:
        """The tasks of all volumes."""
        return list(self._actors.values())

    def is_abandoned(self, volume: Volume) -> bool:
        """Whether the task of a volume has ended, though the volume has not."""
        task = self._actors.get(volume.name)
        return task is not None and task.done() and self._volumes.get(volume.name) is volume

    def file_of(self, name: str) -> str | None:
        """The file that wishes for a volume, None where there is none."""
        known = name in self._files.volumes or name in self._files.bad
        return self.environment.files.path(name) if known else None

    def get(self, name: str) -> Volume:
        """Return a volume. Raises NO_SUCH_VOLUME, and of one whose file is of no use what is wrong with that."""
        volume = self._volumes.get(name)
        if volume is None and name in self._parked:
            raise _gone_down(name)
        if volume is None and name in self._files.bad:
            raise self._files.bad[name]
        if volume is None and name in self._files.detached:
            raise StoragedError(
                ErrorCode.NO_SUCH_VOLUME, f"there is no volume {name!r} now", volume=name,
                cause=f"it was detached, and stays so until {self.file_of(name)} goes, or until the next boot",
                hint=f"storaged persist {name} on attaches it again",
            )
        if volume is None:
            raise StoragedError(
                ErrorCode.NO_SUCH_VOLUME, f"there is no volume {name!r}", volume=name,
                hint="storaged list shows what is there",
            )
        return volume

    async def attach(
        self, spec: VolumeSpec, timeout: float | None, secrets: Mapping[str, bytes] = NO_SECRETS
    ) -> Volume:
        """Attach a volume, or wait for the one that was attached with the same wishes.

        ``secrets`` are those that the client handed over, by the option that says ``-`` for them.
        What its profile says is in ``spec`` by now (:meth:`with_profile`).
        Raises VOLUME_EXISTS, with nothing changed, where the wishes differ.
        """
        spec, secrets = secrets_apart(spec, secrets)
        spec = self._checked(spec)
        check_secrets(spec, secrets)
        return await self._attach_checked(spec, timeout, secrets)

    async def with_profile(self, spec: VolumeSpec) -> VolumeSpec:
        """Return the wishes of a client with what the profile that they name has for them. Raises INVALID_ARGUMENT."""
        if spec.profile is None:
            return spec
        return await self._blocking("read the profile", 10, self._with_profile, spec)

    async def _attach_checked(
        self, spec: VolumeSpec, timeout: float | None, secrets: Mapping[str, bytes] = NO_SECRETS
    ) -> Volume:
        patience = timeout or self.environment.config.attach_timeout
        while True:
            volume = self._volumes.get(spec.name)
            if volume is None and spec.name in self._parked:
                # A first attach that fails takes all of the name away: the wish, and the changes of a snapshot.
                raise _gone_down(spec.name)
            if volume is None:
                volume = Volume(Desired(spec=spec), self.environment, fresh=True)
                self._begin(volume, adopt=False)
            try:
                await volume.attach(spec, patience, secrets)
            except StoragedError as error:
                if error.code is not ErrorCode.NO_SUCH_VOLUME:
                    raise
                # It was on its way out, and is gone now: this is a new one.
                await self._forgotten(volume)
            else:
                if spec.name in self._files.detached:
                    await self._mark(spec.name, detached=False)
                return volume

    async def detach(self, name: str, *, force: bool, timeout: float | None) -> list[str]:
        """Take a volume away; return what is left behind by force."""
        volume = self.get(name)
        marked = self.file_of(name) is not None
        if marked:
            # Before anything is done: the next daemon must not attach it again.
            await self._mark(name, detached=True)
        try:
            notes = await volume.detach(force=force, timeout=timeout or self.environment.config.detach_timeout)
        except StoragedError:
            if marked and volume.goal is not Goal.ABSENT:
                await self._mark(name, detached=False)
            raise
        if volume.ended:
            await self._forgotten(volume)
        if marked:
            notes.append(f"it stays detached until {self.file_of(name)} goes, or until the next boot")
        return notes

    async def _mark(self, name: str, *, detached: bool) -> None:
        """Remember whether a volume that has a file is wanted."""
        files = self.environment.files
        async with self._files_change:
            await self._blocking("remember the detach", 30, files.mark_detached if detached else files.unmark, name)
            marks = self._files.detached
            self._files = replace(self._files, detached=marks | {name} if detached else marks - {name})

    def _tell_bad_files(self) -> None:
        for name, wrong in self._files.bad.items():
            log.error(
                "%s [%s]; %s", wrong, wrong.code, wrong.hint, extra=about(name, "failure", code=wrong.code.value)
            )
            self.environment.events.publish(name, "failure", "absent", str(wrong))

    async def persist(self, name: str, *, on: bool) -> Volume:
        """Attach a volume again at each boot, or do not. One that has a file and was detached is attached now.

        Raises INVALID_ARGUMENT where a secret of it was typed, and UNSUPPORTED for one that has a file and shall not
        come back: storaged does not write there.
        """
        path = self.file_of(name)
        if path is not None and not on:
            raise StoragedError(
                ErrorCode.UNSUPPORTED, "the volume has a file, and comes back with each boot", volume=name,
                cause=f"there is {path}", hint="remove that file; storaged reads such files, and writes none",
            )
        if name not in self._volumes and name in self._files.detached:
            await self._mark(name, detached=False)
            # Judged when they were read: to do so again would take what says a default for nothing said.
            return await self._attach_checked(self._files.volumes[name], None)
        volume = self.get(name)
        if on and path is None:
            # A secret that somebody typed is not kept over reboots.
            check_secrets(msgspec.structs.replace(volume.spec, persist=True), NO_SECRETS)
        if path is None:
            await volume.persist(on, self.environment.config.attach_timeout)
        return volume

    async def park(self, timeout: float | None) -> list[str]:
        """The host goes down: flush and end the volumes that nobody uses, all at once. Return what goes on, and why."""
        patience = timeout or self.environment.config.detach_timeout
        volumes = self.volumes()
        outcomes = await asyncio.gather(*(volume.park(patience) for volume in volumes), return_exceptions=True)
        failed = []
        for volume, outcome in zip(volumes, outcomes, strict=True):
            if isinstance(outcome, StoragedError):
                failed.append(str(outcome.at(volume=volume.name)))
            elif isinstance(outcome, BaseException):
                raise outcome
        return failed

    async def _forgotten(self, volume: Volume) -> None:
        """Wait until a volume that is gone has left the books: its actor has only that to do."""
        actor = self._actors.get(volume.spec.name)
        if actor is not None and self._volumes.get(volume.spec.name) is volume:
            await asyncio.wait({actor})

    async def resize(self, name: str, size: int | None, timeout: float | None) -> Volume:
        """Grow a volume to ``size`` bytes, or to all that its source has by now."""
        volume = self.get(name)
        await volume.resize(size, timeout or self.environment.config.attach_timeout)
        return volume

    async def rescue(self, name: str, *, keep: bool, timeout: float | None) -> list[str]:
        """End all I/O of a volume with errors; the volume stays, with its device if ``keep``. Return what to tell."""
        return await self.get(name).rescue(keep=keep, timeout=timeout or self.environment.config.detach_timeout)

    async def resume(self, name: str, timeout: float | None) -> Volume:
        """Put the source of a volume back that was rescued."""
        volume = self.get(name)
        await volume.resume(timeout or self.environment.config.attach_timeout)
        return volume

    async def upgrade(self, name: str, timeout: float | None) -> Volume:
        """Replace a volume's QSD by the program that is installed now."""
        volume = self.get(name)
        await volume.upgrade(timeout or self.environment.config.attach_timeout)
        return volume

    async def qemu_arguments(self, name: str) -> QemuArguments:
        """Return the arguments with which a virtual machine's QEMU uses a volume."""
        try:
            return await self.get(name).attachment.qemu_arguments(self.environment.config.attach_timeout)
        except StoragedError as error:
            raise error.at(volume=name) from error

    def _with_profile(self, spec: VolumeSpec) -> VolumeSpec:
        return with_profile(spec, self.environment.layout.profiles)

    def _checked(self, spec: VolumeSpec) -> VolumeSpec:
        """Refuse what can be refused without touching anything; return the wish as it is stored."""
        check_name(spec.name)
        try:
            backend = find_backend(spec.source)
            check_spec(spec, backend.options.keys() | options_of(spec.transport).keys())
            backend.check_options(spec.options)
            backend.parse(spec.source, spec.options)
            backingsources.check(spec)
            if spec.snapshot:
                overlay.limit_of(spec)
            check_transport(spec)
        except StoragedError as error:
            if spec.profile is not None:
                error.message += f" (with the profile {spec.profile!r})"
            raise error.at(volume=spec.name) from None
        helps = caches_writes(spec.source, direct=False) and not caches_writes(spec.source, direct=True)
        if helps and "cache" not in spec.options:
            # A device that goes on when QSD dies is worth more than a cache in it.
            spec = msgspec.structs.replace(spec, options={**spec.options, "cache": "none"})
        return without_defaults(spec, backend.defaults)

    def _begin(self, volume: Volume, *, adopt: bool) -> None:
        name = volume.spec.name
        self._volumes[name] = volume
        self._actors[name] = self._tasks.create_task(self._live(volume, adopt=adopt), name=f"volume {name}")

    async def _live(self, volume: Volume, *, adopt: bool) -> None:
        name = volume.spec.name
        try:
            await volume.run(adopt=adopt)
        except Exception:
            # The edge of an actor: a bug in one must not end the others. Its QSD and device go on working.
            log.exception("the actor of volume %s ended; restart storaged to adopt it again", name, extra=about(name))
            if not volume.ended:
                return
        if self._volumes.get(name) is volume:
            del self._volumes[name]
            del self._actors[name]
            if volume.parked:
                self._parked.add(name)
            self._tidy_soon()

    def _tidy_soon(self) -> None:
        """Free what gone volumes have left, 40 KiB each: it refers to itself in circles.

        By itself Python looks for circles only where much is new, and so not there.
        """

        def tidy() -> None:
            self._tidying = False
            gc.collect()

        if not self._tidying:
            self._tidying = True
            asyncio.get_running_loop().call_later(_TIDY_AFTER, tidy)

    # At the start ----------------------------------------------------------------------------------------------

    def _collect(self) -> list[Desired]:
        """Return what an actor is needed for: stored wishes, and what has no wish any more but is still there."""
        environment, layout = self.environment, self.environment.layout
        self._forget_former_boot()
        found: dict[str, Desired] = {}
        unknown: set[str] = set()
        for store in dict.fromkeys((environment.persistent, environment.volatile)):
            loaded = store.load()
            for name, desired in loaded.volumes.items():
                if name in found:
                    # A daemon died while it changed its mind about the next boot.
                    store.delete(name)
                    continue
                found[name] = self._after_boot(desired)
                if found[name] != desired:
                    store.put(found[name])
            for damaged in loaded.damaged:
                self._report(damaged)
                unknown.add(damaged.name)
                record = self._record_of(damaged.name)
                if record is not None:
                    log.warning("volume %s goes on from its record", damaged.name, extra=about(damaged.name))
                    found[damaged.name] = Desired(
                        spec=record.spec, wanted="failing" if record.rescue else "attached", boot=boot_id()
                    )
                    environment.store_of(record.spec.persist).put(found[damaged.name])
        try:
            self._files = self._read_files()
        except StoragedError as error:
            # What is stored counts all the same.
            log.error("the files of volumes cannot be read: %s [%s]; %s", error, error.code, error.hint)
        for name, spec in self._files.volumes.items():
            # What cannot be told what it was, and is still there, is not to be guessed at.
            in_doubt = name in unknown and os.path.lexists(layout.volume_dir(name))
            if name not in found and not in_doubt and name not in self._files.detached:
                found[name] = Desired(spec=spec)
                try:
                    environment.volatile.put(found[name])
                except StoragedError as error:
                    log.warning("volume %s: it is known by its file alone: %s", name, error, extra=about(name))
        os.makedirs(layout.volumes_dir, mode=0o700, exist_ok=True)
        left = {*overlay.all_names(layout.snapshots_dir), *fetching.all_names(layout)}
        for name in sorted({*os.listdir(layout.volumes_dir), *left}):
            if name in found:
                continue
            try:
                check_name(name)
            except StoragedError:
                continue
            directory = layout.volume_dir(name)
            if os.path.lexists(directory) and (os.path.islink(directory) or not os.path.isdir(directory)):
                log.warning("%s is not storaged's: it is left alone", directory)
                continue
            record = self._record_of(name)
            spec = record.spec if record else VolumeSpec(name=name, source="unknown")
            if name in unknown:
                # It may well be wanted: nothing of it is thrown away before the user says so.
                found[name] = Desired(spec=spec)
                continue
            log.warning(
                "volume %s: nobody wants what is left of it; it is taken away unless it is used", name,
                extra=about(name),
            )
            found[name] = Desired(spec=spec, wanted="absent")
        return [found[name] for name in sorted(found)]

    def _read_files(self) -> Found:
        """The files of volumes, each judged as an attach with its wishes would be."""
        loaded = self.environment.files.load()
        volumes, bad = {}, dict(loaded.bad)
        for name, spec in loaded.volumes.items():
            try:
                if secrets_apart(spec, NO_SECRETS)[1]:
                    raise StoragedError(
                        ErrorCode.INVALID_ARGUMENT, "the source holds a secret",
                        hint="leave it out; the option for it names a file, or credential:NAME",
                    )
                volumes[name] = self._checked(self._with_profile(spec))
                check_secrets(msgspec.structs.replace(volumes[name], persist=True), NO_SECRETS)
            except StoragedError as error:
                volumes.pop(name, None)
                bad[name] = error.at(volume=name)
        return Found(volumes, bad, loaded.detached)

    def _after_boot(self, desired: Desired) -> Desired:
        """Of what was rescued before the host was rebooted nothing is left that could wait or fail."""
        rescued = Goal(desired.wanted) in RESCUES
        return Desired(spec=desired.spec) if rescued and desired.boot != boot_id() else desired

    def _record_of(self, name: str) -> Record | None:
        with contextlib.suppress(OSError, ValueError):
            record = load_record(self.environment.layout.volume_dir(name))
            return record if record.spec.name == name else None
        return None

    def _report(self, damaged: Damaged) -> None:
        text = f"the stored volume is damaged: {damaged.cause}; set aside as {damaged.set_aside}"
        log.error(
            "volume %s: %s [%s]", damaged.name, text, ErrorCode.STATE_DAMAGED,
            extra=about(damaged.name, "failure", code=ErrorCode.STATE_DAMAGED),
        )
        self.environment.events.publish(damaged.name, "failure", "absent", text)

    def _forget_former_boot(self) -> None:
        """With --root on a disk, "run" survives a reboot: what it holds of another boot means nothing."""
        layout = self.environment.layout
        marker = os.path.join(layout.run_dir, "boot_id")
        now = boot_id()
        try:
            with open(marker, encoding="ascii") as file:
                if file.read() == now:
                    return
            for directory in (layout.volumes_dir, layout.desired_volatile, layout.detached_marks):
                shutil.rmtree(directory, ignore_errors=True)
            with os.scandir(layout.dev_dir) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        os.unlink(entry)
        except FileNotFoundError:
            pass
        write_atomic(marker, now.encode())


def _gone_down(name: str) -> StoragedError:
    return StoragedError(
        ErrorCode.VOLUME_BUSY, "the volume was ended because the host shuts down", volume=name,
        hint="it comes back with the next start of the daemon: systemctl restart storaged",
    )
