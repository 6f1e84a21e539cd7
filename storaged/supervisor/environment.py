"""What all volumes of one daemon share."""

from __future__ import annotations

from dataclasses import dataclass, field

from storaged.model.config import Config
from storaged.model.layout import Layout
from storaged.observe.counts import Counts
from storaged.store.base import Store
from storaged.store.files import VolumeFiles
from storaged.supervisor.claims import Claims
from storaged.supervisor.deadlinks import DeadLinks
from storaged.supervisor.events import EventHub
from storaged.supervisor.faults import Fault, no_fault


@dataclass
class Environment:
    """Directories, configuration, stores and the way to the watchers.

    A reload replaces the configuration: look a value up when it is needed.
    """

    layout: Layout
    config: Config
    persistent: Store
    volatile: Store
    events: EventHub
    lock_directory: str
    claims: Claims = field(default_factory=Claims)
    counts: Counts = field(default_factory=Counts)
    dead_links: DeadLinks = field(default_factory=DeadLinks)
    fault: Fault = no_fault
    config_file: str | None = None
    """The file that was named at the start, for a reload; None: the default one."""

    @property
    def files(self) -> VolumeFiles:
        """The volumes that an administrator has written down."""
        return VolumeFiles(self.layout.volume_files, self.layout.detached_marks)

    def store_of(self, persist: bool) -> Store:
        """The store in which a volume's desired state is kept."""
        return self.persistent if persist else self.volatile
