"""Configuration and files of volumes are read again: what can take effect at once does, the rest is named."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import msgspec

from storaged.errors import StoragedError
from storaged.host.blocking import BlockingCalls
from storaged.host.configfiles import load_config
from storaged.model.config import Config, keys
from storaged.supervisor.environment import Environment
from storaged.supervisor.manager import Manager, Reread

#: Seconds that reading the files may take.
_PATIENCE = 20.0

log = logging.getLogger("storaged")
_calls = BlockingCalls("the configuration")


@dataclass(frozen=True)
class Reloaded:
    """Keys whose value differs from what was in force, and what came of the files of volumes."""

    applied: list[str]
    needs_restart: list[str]
    files: Reread = field(default_factory=lambda: Reread([], [], []))


async def reload(manager: Manager) -> Reloaded:
    """Read the configuration again, and then the files of volumes.

    Raises INVALID_ARGUMENT where the configuration is wrong; nothing has changed then. What is wrong with files of
    volumes is in the answer, because the others count. The log says all of it, too.
    """
    changed = await reload_config(manager.environment)
    try:
        files = await manager.reload()
    except StoragedError as error:
        log.error("the files of volumes cannot be read: %s", error)
        files = Reread([], [], [error])
    return replace(changed, files=files)


async def reload_config(environment: Environment) -> Reloaded:
    """Read the files again and use them; the log says what changed. Raises INVALID_ARGUMENT, having changed nothing."""
    try:
        new = await _calls(
            "read the configuration", _PATIENCE, load_config, environment.layout, environment.config_file
        )
    except StoragedError as error:
        log.error("the configuration was not reloaded, and nothing has changed: %s", error)
        raise
    environment.config, changed = combine(environment.config, new)
    logging.getLogger().setLevel(environment.config.log_level.upper())
    log.info("the configuration was reloaded; now in force: %s", ", ".join(changed.applied) or "nothing new")
    if changed.needs_restart:
        log.warning("these keys have another value in the file, and need a restart of the daemon (volumes stay"
                    " attached): %s", ", ".join(changed.needs_restart))
    return changed


def combine(present: Config, new: Config) -> tuple[Config, Reloaded]:
    """Return what is in force after a reload: ``new``, but for the keys that need a restart; and which keys differ."""
    changed = Reloaded([], [])
    values = msgspec.to_builtins(new)
    for key in keys():
        if key.value_in(present) == key.value_in(new):
            continue
        if key.at_once:
            changed.applied.append(str(key))
            continue
        changed.needs_restart.append(str(key))
        table = values
        for name in key.table:
            table = table[name]
        table[key.name] = msgspec.to_builtins(key.value_in(present))
    return msgspec.convert(values, Config), changed
