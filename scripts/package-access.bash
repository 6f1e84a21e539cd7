# For scripts that install packages in another root: sourced by in-fresh-root and vm-root.
# shellcheck shell=bash
#
# give_package_access ROOT
#
# Gives ROOT (a directory, or the upper one of an overlay) what apt and pip of this machine use to reach their
# packages, and keeps packages' scripts from starting services. It leaves behind:
#   environment  variables that commands in ROOT are to be run with (by env -i)
#   shared       directories of this machine that have to be mounted in ROOT, read-only, at their own path
give_package_access() {
    local root=$1 certificate file variable path
    copy() { [ ! -f "$1" ] || install -D -m 644 "$1" "$root$2"; }
    copy /etc/resolv.conf /etc/resolv.conf
    copy /etc/hosts /etc/hosts
    for certificate in /usr/local/share/ca-certificates/*.crt; do copy "$certificate" "$certificate"; done
    environment=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
        TERM="${TERM:-dumb}" ${CI:+CI="$CI"})
    local pip_files=(/etc/pip.conf /etc/xdg/pip/pip.conf "$HOME/.pip/pip.conf" "$HOME/.config/pip/pip.conf")
    for file in "${pip_files[@]}"; do copy "$file" "${file/#"$HOME"//root}"; done
    while IFS= read -r -d '' variable; do
        case $variable in PIP_*=* | *_proxy=* | *_PROXY=*) environment+=("$variable") ;; esac
    done </proc/self/environ
    # Local indexes and wheels that pip is told of are mounted at their own path; files (certificates)
    # are copied, because a package that brings the same file must be able to replace it.
    shared=()
    while read -r path; do
        # The pages of a local index link to files beside it: .../simple needs its parent.
        path=${path%/simple}
        if [ -d "$path" ]; then shared+=("$path"); else copy "$path" "$path"; fi
    done < <({ cat "${pip_files[@]}" 2>/dev/null; printf '%s\n' "${environment[@]}" | grep ^PIP_; } |
        grep -oE '(file://|[= ])/[^ ]+' | sed -E 's,^(file://|[= ]),,; s,/+$,,' | sort -u)
    unset -f copy

    # Packages' scripts start no services: /dev is this machine's, and so would be what udev did to it.
    install -d "$root/usr/sbin"
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod 755 "$root/usr/sbin/policy-rc.d"
}
