"""What the nodes of a json: tree say that reach data, as a source in its backend's spelling and options. Pure.

They have the members of BlockdevOptions (qapi/block-core.json in QEMU), and older ones that QEMU still takes.

What is checked of a source is its backend's business; here it is only spelled. Members that have no option, and whose
values are those that the backend gives them anyway, are taken where they are said so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from storaged.backends import nfs
from storaged.backends.jsonmembers import Members, refuse, refuse_secret
from storaged.backends.uri import escaped
from storaged.errors import ErrorCode

Options = dict[str, str]
Reader = Callable[[Members, Mapping[str, str]], tuple[str, Options]]

#: Characters of host names and addresses; with others it may be anything, a password, too.
_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,300}")
_TLS = ("tls-certificates", "tls-psk-file")


def _taken(pairs: Mapping[str, str | None]) -> Options:
    return {key: value for key, value in pairs.items() if value is not None}


def _host(text: str, path: str) -> str:
    """A host as URIs have it: an IPv6 address in brackets, its zone escaped."""
    if not _HOST.fullmatch(text):
        refuse(f"{path} is no host", "write a name or an address")
    return f"[{text.replace('%', '%25')}]" if ":" in text else text


def _authority(server: Members, *, default_port: int | None = None) -> str:
    """HOST:PORT of an InetSocketAddress."""
    host = _host(server.needed("host"), server.path_of("host"))
    port = server.number("port")
    if server.switch("keep-alive") is False:
        refuse(f"{server.path_of('keep-alive')} is off", "leave it out", ErrorCode.UNSUPPORTED)
    server.end()
    if port is None and default_port is None:
        refuse(f"{server.path_of('port')} is missing", "write the number of the port")
    return f"{host}:{default_port if port is None else port}"


def _kind(server: Members, default: str | None, known: tuple[str, ...]) -> str:
    kind = server.text("type") or default
    if kind not in known:
        refuse(f"{server.path_of('type')} is not {' or '.join(known)}", "write one of them", ErrorCode.UNSUPPORTED)
    return kind


def _local(name: str) -> Reader:
    def read(node: Members, options: Mapping[str, str]) -> tuple[str, Options]:
        path = node.needed("filename")
        if not path.startswith("/"):
            refuse(f"{node.path_of('filename')} is not an absolute path", "write the whole path")
        if node.text("locking") not in (None, "auto"):
            refuse(f"{node.path_of('locking')} is not auto", "leave it out: images are always locked",
                   ErrorCode.UNSUPPORTED)
        return path if name == "file" else f"{name}:{path}", _taken({"aio": node.text("aio")})

    return read


def _nbd(node: Members, options: Mapping[str, str]) -> tuple[str, Options]:
    refuse_secret(node, {"tls-creds": f"{_TLS[0]}=DIRECTORY or -o {_TLS[1]}"})
    server = node.child("server")
    # Flat members of their own, as "host" and "path", are those of QEMU before 2.9 (nbd_config in block/nbd.c).
    kind = _kind(server, None, ("inet", "unix")) if server is not None else "unix" if "path" in node else "inet"
    place = server or node
    if kind == "unix":
        socket = place.needed("path")
        end = f"+unix:///{escaped(node.text('export') or '')}?socket={escaped(socket)}"
        if server is not None:
            server.end()
    else:
        if server is not None:
            authority = _authority(server)
        else:
            host = _host(node.needed("host"), node.path_of("host"))
            authority = f"{host}:{node.number('port') or 10809}"
        end = f"://{authority}/{escaped(node.text('export') or '')}"
    scheme = "nbds" if any(option in options for option in _TLS) else "nbd"
    return scheme + end, _taken({
        "reconnect-delay": node.number("reconnect-delay"), "open-timeout": node.number("open-timeout"),
        "tls-hostname": node.text("tls-hostname"),
    })


def _iscsi(node: Members, options: Mapping[str, str]) -> tuple[str, Options]:
    refuse_secret(node, {"password-secret": "password-file", "password": "password-file"})
    scheme = "iser" if _choice(node, "transport", ("tcp", "iser")) == "iser" else "iscsi"
    portal, target, lun = node.needed("portal"), node.needed("target"), node.number("lun")
    if lun is None:
        refuse(
            f"{node.path_of('lun')} is missing", "say it: QEMU would take LUN 0, which on many targets holds no data"
        )
    if not re.fullmatch(r"[A-Za-z0-9._:\[\]%-]{1,300}", portal) or "/" in target or "?" in target:
        refuse(f"{node.path_of('portal')} or {node.path_of('target')} is none", "write HOST:PORT, and iqn.…")
    user = node.text("user")
    query = f"?user={escaped(user, safe='')}" if user else ""
    return f"{scheme}://{portal.replace('%', '%25')}/{escaped(target, safe=':')}/{lun}{query}", _taken({
        "initiator-name": node.text("initiator-name"),
        "header-digest": node.text("header-digest"), "request-timeout": node.number("timeout"),
    })


def _choice(node: Members, key: str, known: tuple[str, ...]) -> str | None:
    return node.choice(key, {word: word for word in known})


def _nfs(node: Members, options: Mapping[str, str]) -> tuple[str, Options]:
    server = node.needed_child("server")
    _kind(server, "inet", ("inet",))
    host = _host(server.needed("host"), server.path_of("host"))
    server.end()
    names = {
        "uid": "user", "gid": "group", "tcp-syncnt": "tcp-syn-count", "readahead": "readahead-size",
        "pagecache": "page-cache-size", "debug": "debug",
    }
    said = _taken({key: node.number(member) for key, member in names.items()})
    if said.get("tcp-syncnt") == str(nfs.SYN_COUNT):
        del said["tcp-syncnt"]  # the default, which a source is compared without
    said = {key: value for key, value in said.items() if key not in ("uid", "gid") or value != "0"}  # so are these
    query = "&".join(f"{key}={value}" for key, value in said.items())
    return f"nfs://{host}{_path(node)}{f'?{query}' if query else ''}", {}


def _path(node: Members) -> str:
    path = node.needed("path")
    if not path.startswith("/"):
        refuse(f"{node.path_of('path')} is not an absolute path", "write the whole path of the file there")
    return escaped(path)


def _ssh(node: Members, options: Mapping[str, str]) -> tuple[str, Options]:
    refuse_secret(node, {"password": "ssh-key", "password-secret": "ssh-key"})
    server = node.child("server")
    authority = _authority(server or node, default_port=22) if server is not None else None
    if authority is None:
        authority = f"{_host(node.needed('host'), node.path_of('host'))}:{node.number('port') or 22}"
    user = node.text("user")
    found: Options = {}
    check = node.child("host-key-check")
    if check is not None:
        mode = _choice(check, "mode", ("none", "hash", "known_hosts"))
        kind, text = _choice(check, "type", ("sha256", "sha1", "md5")), check.text("hash")
        check.end()
        if mode == "hash":
            if kind != "sha256" or text is None:
                refuse(f"{check.path}: the hash is no SHA256", "MD5 and SHA1 are not safe any more")
            found["host-key"] = f"SHA256:{text}"
        else:
            found["host-key"] = "none" if mode == "none" else "known-hosts"
    before = f"{escaped(user, safe='')}@" if user else ""
    return f"ssh://{before}{authority}{_path(node)}", found


def _curl(scheme: str) -> Reader:
    def read(node: Members, options: Mapping[str, str]) -> tuple[str, Options]:
        refuse_secret(node, {
            "password-secret": "password-file", "password": "password-file", "cookie": "cookie-file",
            "cookie-secret": "cookie-file", "proxy-password-secret": "proxy-password-file",
        })
        url = node.needed("url")
        if not url.startswith(f"{scheme}://"):
            refuse(f"{node.path_of('url')} does not begin with {scheme}://", "driver and URL must be of one scheme")
        verify, user = node.switch("sslverify"), node.text("username")
        if user and "@" not in url:
            url = url.replace("://", f"://{escaped(user, safe='')}@", 1)
            user = None
        return url, _taken({
            "user": user, "proxy-user": node.text("proxy-username"),
            "request-timeout": node.number("timeout"), "read-ahead": node.number("readahead"),
            "tls-verify": None if verify is None else "on" if verify else "off",
        })

    return read


def _rbd(node: Members, options: Mapping[str, str]) -> tuple[str, Options]:
    refuse_secret(node, {"key-secret": "cephx-key-file", "password-secret": "cephx-key-file"})
    names = [node.needed("pool"), node.text("namespace"), node.needed("image")]
    source = "rbd:" + "/".join(_in_rbd(name, ":@=/") for name in names if name)
    if snapshot := node.text("snapshot"):
        source += f"@{_in_rbd(snapshot, ':@=/')}"
    said = _taken({"id": node.text("user"), "conf": node.text("conf")})
    monitors = [_authority(server, default_port=0) for server in node.objects("server")]
    if monitors:
        said["mon_host"] = ",".join(monitor.removesuffix(":0") for monitor in monitors)
    if modes := node.texts("auth-client-required"):
        said["auth_client_required"] = ",".join(modes)
    found: Options = {}
    encrypt = node.child("encrypt")
    if encrypt is not None:
        found["rbd-encrypt"] = _choice(encrypt, "format", ("luks", "luks2")) or ""
        refuse_secret(encrypt, {"key-secret": "rbd-key-file"})
        encrypt.end()
    return source + "".join(f":{key}={_in_rbd(text, ':@=')}" for key, text in said.items()), found


def _in_rbd(text: str, special: str) -> str:
    return re.sub(rf"[\\{re.escape(special)}]", r"\\\g<0>", text)


def _gluster(node: Members, options: Mapping[str, str]) -> tuple[str, Options]:
    volume, path = node.needed("volume"), node.needed("path")
    servers = node.objects("server")
    if not servers:
        refuse(f"{node.path_of('server')} names no server", "write a list of one or more")
    found: list[str] = []
    socket = ""
    for number, server in enumerate(servers):
        if _kind(server, None, ("inet", "tcp", "unix")) == "unix":
            if number:
                refuse(f"{server.path} is a socket, and not the first server", "write it first", ErrorCode.UNSUPPORTED)
            socket = server.needed("path")
            server.end()
        else:
            found.append(_authority(server, default_port=24007))
    if "/" in volume:
        refuse(f"{node.path_of('volume')} has a /", "write the name of a volume")
    place = f"{volume}/{escaped(path)}"
    if socket:
        return f"gluster+unix:///{place}?socket={escaped(socket)}", _taken({"servers": ",".join(found) or None})
    return f"gluster://{found[0]}/{place}", _taken({"servers": ",".join(found[1:]) or None})


def _vitastor(node: Members, options: Mapping[str, str]) -> tuple[str, Options]:
    said = _taken({
        "image": node.text("image"), "pool": node.number("pool"), "inode": node.number("inode"),
        "size": node.number("size"), "etcd_host": node.text("etcd-host"), "etcd_prefix": node.text("etcd-prefix"),
        "config_path": node.text("config-path"),
    })
    return "vitastor:" + ":".join(f"{key}={_in_rbd(text, ':')}" for key, text in said.items()), {}


DRIVERS: dict[str, Reader] = {
    "file": _local("file"), "host_device": _local("host_device"), "nbd": _nbd, "iscsi": _iscsi, "nfs": _nfs,
    "ssh": _ssh, "rbd": _rbd, "gluster": _gluster, "vitastor": _vitastor,
    **{scheme: _curl(scheme) for scheme in ("http", "https", "ftp", "ftps")},
}
