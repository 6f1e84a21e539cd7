"""What threads decode had its types looked for before: two that begin that at once kill the process (msgspec 0.22)."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Decodes one, in a process in which nobody did so before, where the types cannot be looked for any more.
_PROGRAM = """
import msgspec, msgspec._utils
from storaged.host import download, sshagent
from storaged.model import history, record, spec
from storaged.supervisor import overlay

def looked_for(*_):
    raise AssertionError("the types are looked for only now")

msgspec._utils._eval_type = looked_for
identity = record.ProcessIdentity(pid=1, start_time=2, exe_device=3, exe_inode=4)
wish = spec.VolumeSpec(name="a", source="/x")
found = {}
found["record"] = record.Record(
    spec=wish, transport="fuse", transport_reason="", binary="", process=identity,
    layers=[record.Layer(source="/x", format="raw", virtual_size=1)],
)
found["wish"] = spec.Desired(spec=wish)
found["process"] = identity
found["overlay"] = overlay.Mark(path="/x", fingerprint=[[1]])
found["copy"] = download.Mark(url="http://h/x", size=1)
found["journal"] = history._Stored(entries=[], counts={})
value = found[%r]
assert msgspec.json.decode(msgspec.json.encode(value), type=type(value)) == value
"""


@pytest.mark.parametrize("what", ["record", "wish", "process", "overlay", "copy", "journal"])
def test_the_types_of_what_threads_decode_are_looked_for_at_the_import(what: str) -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM % what], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
