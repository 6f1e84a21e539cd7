"""Which sources on the network an image may stand on, by the name that its header has for them."""

from __future__ import annotations

import pytest

from storaged.backends.base import NO_REQUIREMENTS, Requirements
from storaged.errors import ErrorCode, StoragedError
from storaged.model import backingsources
from storaged.model.backingsources import beside, check, find
from storaged.model.spec import VolumeSpec


def spec(allowed: str, source: str = "/a", **options: str) -> VolumeSpec:
    """A volume; ``_`` in the name of an option is a dash."""
    said = {key.replace("_", "-"): value for key, value in options.items()}
    return VolumeSpec(name="a", source=source, options={"backing-sources": allowed, **said})


def place(name: str, allowed: str, source: str = "/a", **options: str) -> str | None:
    """The location of what is found."""
    found = find(name, spec(allowed, source, **options))
    return None if found is None else found.location


@pytest.mark.parametrize(("name", "allowed"), [
    ("nbd://Host/x", "nbd://host:10809/x"),
    ("nbd:host:10809:exportname=x", "rbd:p/i nbd://host/x"),
    ("nbd://host/x", "nbd://host/"),
    ("ssh://root@host/srv/a/b", "ssh://host/srv/"),
    ("nfs://host//srv/b", "nfs://host/srv/"),
    ("rbd:pool/base", "rbd:pool/"),
    ("rbd:pool/base@snap:id=me", "rbd:pool/base@snap:id=me"),
    ("gluster://h/v/a", "gluster://h/v/"),
    ('json:{"driver":"nbd","server":{"type":"inet","host":"host","port":"10809"},"export":"x"}', "nbd://host/x"),
])
def test_a_name_is_found_in_each_spelling_of_what_is_allowed(name: str, allowed: str) -> None:
    assert place(name, allowed) is not None


@pytest.mark.parametrize(("name", "allowed"), [
    ("nbd://host/x", ""),
    ("nbd://other/x", "nbd://host/"),
    ("nbd://host/xy", "nbd://host/x"),
    ("nbd://host:1/x", "nbd://host/"),
    ("nbds://host/x", "nbd://host/"),
    ("nbd+unix:///x?socket=/run/s", "nbd://host/"),
    ("ssh://host/srv2/a", "ssh://host/srv/"),
    ("ssh://host/srv/../etc/a", "ssh://host/srv/"),
    ("ssh://me@host/srv/a", "ssh://host/srv/"),
    ("rbd:pool/base:conf=/tmp/evil.conf", "rbd:pool/"),
    ("rbd:pool/base:id=me", "rbd:pool/"),
    ("rbd:pool2/base", "rbd:pool/"),
    ("http://host/a?x=y", "http://host/"),
    ("nfs://host/srv/a?uid=1", "nfs://host/srv/"),
    ("/srv/a", "nbd://host/"),
    ("file:/srv/a", "nbd://host/"),
    ("nosuch:x", "nbd://host/"),
    ("", "nbd://host/"),
    ('json:{"driver":"nbd","host":"host","reconnect-delay":1}', "nbd://host/"),
    ('json:{"driver":"raw","file.driver":"nbd","file.host":"host"}', "nbd://host/"),
    ('json:{"driver":"file","filename":"/srv/a"}', "nbd://host/"),
    ("json:{", "nbd://host/"),
])
def test_what_is_not_allowed_is_not_found(name: str, allowed: str) -> None:
    assert place(name, allowed) is None


def test_the_server_is_reached_as_that_of_the_volume_is() -> None:
    own = spec("rbd:p/base", "rbd:p/top", user="me", conf="/c", image="top", cephx_key_file="/k", cache="none")
    found = find("rbd:p/base", own)
    assert found is not None
    assert found.location == "rbd:p/base:id=me:conf=/c"
    assert found.options == {"user": "me", "conf": "/c", "cephx-key-file": "/k", "cache": "none"}
    other = find("rbd:p/base", spec("rbd:p/base", "nbd://h/x", reconnect_delay="1"))
    assert other is not None
    assert other.options == {}


def test_tls_of_the_volume_is_not_for_a_source_without() -> None:
    own = spec("nbd://h/x nbds://h/x", "nbds://h/top", tls_certificates="/pki")
    assert place("nbd://h/x", "nbd://h/x", "nbds://h/top", tls_certificates="/pki") == "nbd://h:10809/x"
    found = find("nbds://h/x", own)
    assert found is not None
    assert found.options == {"tls-certificates": "/pki"}


def test_what_qsd_must_be_given_is_that_of_all() -> None:
    own = Requirements(environment={"X": "y"})
    whole = backingsources.requirements(spec("rbd:p/base"), own)
    assert whole.environment.keys() == {"X", "CEPH_ARGS"}
    assert backingsources.requirements(spec("nbd://h/x"), NO_REQUIREMENTS) == NO_REQUIREMENTS
    assert backingsources.requirements(spec("rbd:p/ nbd://h/"), NO_REQUIREMENTS).environment.keys() == {"CEPH_ARGS"}


@pytest.mark.parametrize("allowed", [
    "", " ", "/srv", "file:/srv", "nosuch:x", "nbd://", "tftp://h/a", "tftp://h/", "nbd+unix:///x?socket=/run/",
    "sheepdog:x", "rbd:p/a:conf=/etc/", "iscsi://h/iqn.2026-01.test:t/",
    "rbd:p/a rbd:p/b:rados_osd_op_timeout=7",
])
def test_what_no_image_can_stand_on_is_refused(allowed: str) -> None:
    with pytest.raises(StoragedError) as caught:
        check(spec(allowed))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint


@pytest.mark.parametrize(("location", "name", "source"), [
    ("ssh://root@h:22/srv/a.qcow2", "b.qcow2", "ssh://root@h:22/srv/b.qcow2"),
    ("nfs://h/srv/a?uid=1", "x/b", "nfs://h/srv/x/b?uid=1"),
    ("https://h/a", "b", "https://h/b"),
    ("nbd://h:1/a", "b", None),
    ("rbd:p/a", "b", None),
    ("gluster+unix:///v/a?socket=/s", "b", None),
    ("ssh://root@h:22/srv/a", "b c", None),
    ("ssh://root@h:22/srv/a", "b?c", None),
])
def test_a_relative_name_is_beside_the_image_where_sources_are_paths(location: str, name: str, source: str) -> None:
    assert beside(location, name) == source


def test_a_name_is_no_leave_by_itself() -> None:
    volume = VolumeSpec(name="a", source="nbd://h/x")
    assert find("nbd://h/x", volume) is None
    check(volume)
    assert backingsources.places(volume) == []
