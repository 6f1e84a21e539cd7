"""What QSD's error texts mean to a user. Pure."""

from __future__ import annotations

import re

from storaged.errors import ErrorCode, StoragedError
from storaged.qsd.drivers import lack_of

#: (pattern in QEMU's text, code, message, hint); the first that matches counts.
_KNOWN: list[tuple[str, ErrorCode, str, str]] = [
    # libcurl's words, of http, https, ftp and ftps.
    (
        r"^CURL: .*(URL returned error: (404|410)|file does not exist)",
        ErrorCode.SOURCE_MISSING, "the server has no such file", "check the path; it counts whether letters are small",
    ),
    (
        r"^CURL: .*URL returned error: 407",
        ErrorCode.OPEN_FAILED, "the proxy refuses us",
        "say -o proxy-user=USER and -o proxy-password-file=PATH, and check them",
    ),
    (
        r"^CURL: .*(URL returned error: 40[13]|Access denied: )",
        ErrorCode.OPEN_FAILED, "the server refuses us",
        "check -o user and -o password-file, with HTTP -o cookie-file; an FTP server that demands TLS on its usual "
        "port cannot be used (ftps:// is TLS from the first byte on)",
    ),
    (
        r"^CURL: .*URL returned error: ",
        ErrorCode.OPEN_FAILED, "the server answers with an error", "look at its log; curl --head URL shows the same",
    ),
    (
        r"^CURL: .*does(n't| not) support 'range'",
        ErrorCode.UNSUPPORTED, "the server cannot send parts of a file",
        "switch ranges on there (nginx: max_ranges), or fetch the file and attach that",
    ),
    (
        r"^CURL: .*didn't report file size",
        ErrorCode.UNSUPPORTED, "the server does not tell how large the file is",
        "it has to be a file, not something that is made on request; or fetch it and attach that",
    ),
    (
        r"^CURL: .*(certificate|CAfile)",
        ErrorCode.OPEN_FAILED, "the server's certificate is not to be trusted",
        "add its CA (/usr/local/share/ca-certificates/X.crt, update-ca-certificates), name the host as the certificate "
        "does, or say -o tls-verify=off, if nobody can stand in its place",
    ),
    (
        r"^CURL: .*(gnutls_handshake|handshake failure|wrong version number|SSL_)",
        ErrorCode.OPEN_FAILED, "the server speaks no TLS on that port, or another one than we",
        "check the port; ftps:// is TLS from the first byte on, usually on port 990",
    ),
    (
        r"^CURL: .*(Could not|Couldn't) resolve",
        ErrorCode.OPEN_FAILED, "the host's name is not known", "check the name, and this host's DNS and /etc/hosts",
    ),
    (
        r"^CURL: .*time(d )?-?out",
        ErrorCode.OPEN_FAILED, "the server does not answer in time",
        "it hangs, a firewall swallows the packets, or it is slow: -o request-timeout=SECONDS waits longer",
    ),
    (
        r"^CURL: .*(Failed to connect|Couldn't connect|Connection refused)",
        ErrorCode.OPEN_FAILED, "nobody listens there, or the host cannot be reached",
        "start the server; check host, port and routes",
    ),
    (
        r"^CURL: ",
        ErrorCode.OPEN_FAILED, "the server and we do not understand each other",
        "the words are libcurl's; try the same with curl",
    ),
    (
        r"^Gluster connection for volume",
        ErrorCode.OPEN_FAILED, "no server describes that volume of Gluster",
        "check host, port and the volume's name, and with gluster volume info that it is started; -o servers=HOST,… "
        "names more servers; QSD's log has Gluster's words",
    ),
    (
        r"TLS negotiation required",
        ErrorCode.OPEN_FAILED, "the server demands TLS",
        "write nbds:// or nbds+unix:///, with -o tls-certificates=DIRECTORY or -o tls-psk-file=PATH",
    ),
    (
        r"option 5 \(starttls\)|support STARTTLS",
        ErrorCode.OPEN_FAILED, "the server offers no TLS",
        "switch it on there; where nobody can listen, nbd:// or nbd+unix:/// goes without",
    ),
    (
        r"Certificate does not match the hostname",
        ErrorCode.OPEN_FAILED, "the certificate is of another server",
        "name the host as its certificate does; or say -o tls-hostname=NAME, if that is the right server",
    ),
    (
        r"Username .* not found in PSK file",
        ErrorCode.OPEN_FAILED, "there is no key of that user",
        "-o tls-user=USER says whose line of -o tls-psk-file it is",
    ),
    (
        r"Unable to (access credentials|import)|Our own certificate|The (CA|client) certificate"
        r"|certificate \S+ (basic constraints|is missing|usage|purpose)|set PSK client credentials",
        ErrorCode.OPEN_FAILED, "the certificates or the key for TLS cannot be used",
        "-o tls-certificates needs ca-cert.pem in its directory, and with a certificate of one's own client-cert.pem "
        "and client-key.pem; -o tls-psk-file lines USER:HEXKEY",
    ),
    (
        r"certificate (is not (trusted|yet)|hasn't got a known issuer|has (been revoked|expired)|uses an insecure)"
        r"|No certificate was found",
        ErrorCode.OPEN_FAILED, "the server's certificate is not to be trusted",
        "it has expired, or ca-cert.pem in -o tls-certificates is not of whoever signed it",
    ),
    (
        r"from TLS channel",
        ErrorCode.OPEN_FAILED, "the server ended the connection after the TLS handshake",
        "it may want a certificate of ours: client-cert.pem and client-key.pem in -o tls-certificates, signed by whom "
        "it trusts; its log tells",
    ),
    (
        r"TLS handshake failed",
        ErrorCode.OPEN_FAILED, "the server and we do not agree in TLS",
        "user and key of -o tls-psk-file must be those of the server; one that has certificates needs "
        "-o tls-certificates",
    ),
    (
        r"does not match (host_key_check|the one in known_hosts)",
        ErrorCode.SOURCE_CHANGED, "the server's host key is another one",
        "somebody else may answer in its name; ask its administrator for the fingerprint before you change "
        "-o host-key or /etc/ssh/ssh_known_hosts",
    ),
    (
        r"no host key was found in known_hosts|known_hosts file not found|host key for this server not found",
        ErrorCode.OPEN_FAILED, "the server's host key is not known here",
        "say -o host-key=SHA256:FINGERPRINT, which ssh-keygen -l -f prints at the server; or put the key into "
        "/etc/ssh/ssh_known_hosts",
    ),
    (
        r"failed to authenticate using publickey",
        ErrorCode.OPEN_FAILED, "the server accepts none of the keys",
        "check user and -o ssh-key (or -o agent), and authorized_keys of that user at the server",
    ),
    (
        r"failed to establish SSH session",
        ErrorCode.OPEN_FAILED, "no SSH server answers there", "check host and port, and whether sshd hangs",
    ),
    (
        r"failed to (initialize|create) sftp handle",
        ErrorCode.OPEN_FAILED, "the server does no SFTP for this user", "its sshd_config needs a Subsystem sftp",
    ),
    (
        r"SFTP server: No such (file|path)",
        ErrorCode.SOURCE_MISSING, "the file is not there", "check the path; it begins at the root directory",
    ),
    (
        r"SFTP server: Failure",
        ErrorCode.OPEN_FAILED, "the server cannot open the file", "check that the path is of a file, and its log",
    ),
    (
        r"error reading header from .*: No such file",
        ErrorCode.SOURCE_MISSING, "the pool has no such image, or the image no such snapshot",
        "rbd ls POOL and rbd snap ls POOL/IMAGE show what there is; an image of a namespace is POOL/NAMESPACE/IMAGE",
    ),
    (
        r"error reading header from .*: Connection timed out",
        ErrorCode.OPEN_FAILED, "the OSDs of the Ceph cluster do not answer", "ceph status tells which are down",
    ),
    (
        r"error (reading header from|opening pool|checking namespace) .*: Operation not permitted",
        ErrorCode.OPEN_FAILED, "the Ceph user may not open the image",
        "QEMU opens it for writing, even to read it: ceph auth caps client.USER mon 'profile rbd' "
        "osd 'profile rbd pool=POOL'",
    ),
    (
        r"error opening pool .*: No such file",
        ErrorCode.SOURCE_MISSING, "the Ceph cluster has no such pool", "ceph osd pool ls shows those that it has",
    ),
    (
        r"namespace '.*' does not exist",
        ErrorCode.SOURCE_MISSING, "the pool has no such namespace", "rbd namespace ls POOL shows those that it has",
    ),
    (
        r"error reading conf file .*: No such file",
        ErrorCode.OPEN_FAILED, "there is no such configuration file of Ceph", "check the path given with -o conf",
    ),
    (
        r"error reading conf file",
        ErrorCode.OPEN_FAILED, "Ceph does not understand its configuration file", "ceph -c FILE status tells more",
    ),
    (
        r"error connecting: (Permission denied|Operation not permitted)",
        ErrorCode.OPEN_FAILED, "the Ceph cluster does not let this user in, or not with this key",
        "check -o user and -o cephx-key-file, or the keyring; ceph auth get client.USER shows what the cluster has",
    ),
    (
        r"error connecting: No such file",
        ErrorCode.OPEN_FAILED, "there is no key for the Ceph user, or nothing says where the monitors are",
        "say -o cephx-key-file=PATH, or put the key into /etc/ceph/ceph.client.USER.keyring; say -o conf=FILE or "
        "-o mon-host=HOST",
    ),
    (
        r"error connecting: Invalid argument",
        ErrorCode.OPEN_FAILED, "Ceph cannot use the key, or finds no monitor by the name that was said",
        "check the key (ceph auth get-key client.USER prints it), and the names of the monitors' hosts",
    ),
    (
        r"error connecting: Connection timed out",
        ErrorCode.OPEN_FAILED, "no monitor of the Ceph cluster lets us in",
        "check that the monitors run and can be reached, and user and key, too, if their ports are unusual ones; "
        "-o open-timeout=SECONDS waits longer",
    ),
    (
        r"encryption load fail: (Operation not permitted|Permission denied)",
        ErrorCode.OPEN_FAILED, "the passphrase does not open the image", "check what -o rbd-key-file says",
    ),
    (
        r"encryption load fail",
        ErrorCode.WRONG_FORMAT, "the image is not encrypted this way",
        "say what rbd encryption format was told: -o rbd-encrypt=luks or luks2; of a LUKS image made otherwise the "
        "format is luks",
    ),
    (
        r'Failed to get (shared )?"(write|resize|consistent read)" lock',
        ErrorCode.SOURCE_IN_USE, "another process has the image open",
        "end that process (a virtual machine? qemu-img? lsof names it), or attach with --read-only",
    ),
    (
        r"Image (is )?not in \S+ format|not a valid|Invalid (footer|signature)|invalid (VMDK|VPC) image"
        r"|invalid magic|bad signature",
        ErrorCode.WRONG_FORMAT, "the image has another format", "say the right one with --format",
    ),
    (
        r"Status: Target not found|Status: Target removed",
        ErrorCode.SOURCE_MISSING, "the server has no such target, or does not show it to this host",
        "check its name, and whom it lets in: -o initiator-name=NAME says who we are",
    ),
    (
        r"Status: (Authentication|Authorization) failure",
        ErrorCode.OPEN_FAILED, "the target does not let us in",
        "check -o user=NAME and the secret of -o password-file=, and whom it lets in by -o initiator-name=NAME",
    ),
    (
        r"LOGICAL_UNIT_NOT_SUPPORTED",
        ErrorCode.SOURCE_MISSING, "the target has no such LUN, or does not show it to this host", "check its number",
    ),
    (
        r"LUN is write protected",
        ErrorCode.OPEN_FAILED, "the LUN is read-only", "attach it with --read-only",
    ),
    (
        r"Failed to connect to LUN : command timed out",
        ErrorCode.OPEN_FAILED, "the server does not answer", "it hangs; -o request-timeout=SECONDS waits longer",
    ),
    (
        r"Failed to connect to LUN : .*Couldn't connect transport",
        ErrorCode.OPEN_FAILED, "there is no RDMA here that reaches the server", "iscsi:// goes without",
    ),
    (
        r"Can not reconnect right now",
        ErrorCode.OPEN_FAILED, "no iSCSI target can be reached there", "start the server; check host and port",
    ),
    (
        r"Can not resolv into IPv4/v6",
        ErrorCode.OPEN_FAILED, "the host's name is not known", "check the name, and this host's DNS and /etc/hosts",
    ),
    (
        r"nfs share: .*Program is not available",
        ErrorCode.OPEN_FAILED, "that host serves no NFS, or none of version 3",
        "start the server; rpcinfo -p HOST shows what the host serves",
    ),
    (
        r"nfs share: nfs_service failed",
        ErrorCode.OPEN_FAILED, "no NFS server can be reached there",
        "start the server; check the host, and that firewalls let us through to its port mapper (111), nfs and mountd",
    ),
    (
        r"MNT3ERR_ACCES",
        ErrorCode.OPEN_FAILED, "the server does not let this host have that directory",
        "check the path, as the server has it, and the server's exports; showmount -e HOST lists them",
    ),
    (
        r"(MNT|NFS)3ERR_NOENT",
        ErrorCode.SOURCE_MISSING, "the source is not there", "check the path, as the server has it",
    ),
    (
        r"ACCESS denied. Required access|NFS3ERR_(ACCES|PERM)",
        ErrorCode.OPEN_FAILED, "the server does not let this user have the file",
        "say who asks with -o uid=NUMBER and -o gid=NUMBER (root is nobody there, unless the server says "
        "no_root_squash), or attach it with --read-only",
    ),
    (r"No such file or directory", ErrorCode.SOURCE_MISSING, "the source is not there", "check the path"),
    (
        r"image does not exist",
        ErrorCode.SOURCE_MISSING, "the Vitastor cluster has no image of that name",
        "vitastor-cli ls shows those that it has; check -o etcd-prefix, too",
    ),
    (
        r"image size not specified",
        ErrorCode.INVALID_SIZE, "the Vitastor image has no size", "vitastor-cli modify --resize SIZE NAME gives it one",
    ),
    (
        r"does not accept value|Invalid parameter '(qcow|qed|vmdk|vdi|vhdx|vpc|parallels|luks)'",
        ErrorCode.UNSUPPORTED, "this qemu-storage-daemon does not know this driver or value",
        "storaged doctor shows its version; convert the image with qemu-img convert, or use another build",
    ),
    (
        r"Invalid password|cannot unlock any key",
        ErrorCode.OPEN_FAILED, "the passphrase does not open the image",
        "check the file given with -o key-file; every byte of it counts, a newline at its end too",
    ),
    (
        r"export not available|unknown export|export .* not (present|found)",
        ErrorCode.OPEN_FAILED, "the server has no export of that name", "nbdinfo --list URI shows those that it has",
    ),
    (
        r"Connection attempt cancelled by timeout|Connection timed out",
        ErrorCode.OPEN_FAILED, "the server does not answer",
        "it hangs, or a firewall swallows the packets; -o open-timeout=SECONDS waits longer",
    ),
    (
        r"Connection refused",
        ErrorCode.OPEN_FAILED, "nobody listens on that port or socket", "start the server; check host and port",
    ),
    (
        r"address resolution failed",
        ErrorCode.OPEN_FAILED, "the host's name is not known", "check the name, and this host's DNS and /etc/hosts",
    ),
    (
        r"No route to host|Network is unreachable|Host is (down|unreachable)",
        ErrorCode.OPEN_FAILED, "the server's host cannot be reached", "check the network and its routes",
    ),
    (r"No space left", ErrorCode.NO_SPACE, "there is no room", "make room on that filesystem"),
    (
        r"does not support resiz|Cannot (grow|resize|shrink)|not resizable|Operation not supported",
        ErrorCode.UNSUPPORTED, "this cannot be done with an image of this format", "",
    ),
    (
        r"Permission denied|Operation not permitted|Read-only file system",
        ErrorCode.OPEN_FAILED, "the source may not be opened this way",
        "check its permissions, or attach with --read-only",
    ),
]


def explain(command: str, text: str) -> StoragedError:
    """Return the failure that QSD's refusal of a QMP command amounts to; its own words become the cause."""
    lacks = lack_of(text)
    if lacks is not None:
        return lacks
    for pattern, code, message, hint in _KNOWN:
        if re.search(pattern, text, re.IGNORECASE):
            return StoragedError(code, message, cause=text, hint=hint)
    code = ErrorCode.OPEN_FAILED if command == "blockdev-add" else ErrorCode.QSD_REFUSED
    return StoragedError(
        code, "cannot open the image" if code is ErrorCode.OPEN_FAILED else f"QSD refused {command}", cause=text,
        hint="the words are QEMU's; for an image, qemu-img info and qemu-img check may tell more",
    )
