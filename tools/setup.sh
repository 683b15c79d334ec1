#!/usr/bin/env bash
# Installs what a target needs: `tools/setup.sh run|test`. Quick when all is there.
#
# Debian packages are installed as root or with sudo; without either, or on another system, what is
# missing is named and the tests that need it are skipped (under CI=true they fail).
set -eu
cd "$(dirname "$0")/.."
what=${1:-test}
venv=.venv

packages=(python3-venv)
[ "$what" = run ] && packages+=(qemu-utils qemu-system-x86 busybox-static e2fsprogs cpio)
if [ "$what" = test ]; then
    packages+=(qemu-utils qemu-system-common qemu-system-x86 libnbd-bin python3-libnbd nbdkit
        nbdkit-plugin-python fio busybox-static xfsprogs e2fsprogs strace socat cpio kmod
        util-linux)
fi

root=()
if [ "$(id -u)" != 0 ]; then
    if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then root=(sudo -n); else root=(no); fi
fi

missing=()
if command -v dpkg-query >/dev/null; then
    for p in "${packages[@]}"; do
        dpkg-query -W -f '${db:Status-Abbrev}' "$p" 2>/dev/null | grep -q '^ii' || missing+=("$p")
    done
fi
if [ ${#missing[@]} -gt 0 ]; then
    if [ "${root[0]:-}" = no ] || ! command -v apt-get >/dev/null; then
        echo "setup: not installed, and no way to install them here: ${missing[*]}" >&2
    else
        echo "setup: installing ${missing[*]}"
        "${root[@]}" apt-get update -qq >/dev/null
        DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y -qq \
            --no-install-recommends "${missing[@]}" >/dev/null
    fi
fi

# A guest kernel, unpacked and not installed: its package's files are all that is needed.
cache=.cache/guest
if [ ! -e "$cache/vmlinuz" ] && command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
    mkdir -p "$cache/deb"
    [ "${root[0]:-}" = no ] || "${root[@]}" apt-get update -qq >/dev/null || true
    name=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/.*Depends: \(linux-image-[^ ]*cloud-amd64\)$/\1/p' | head -1)
    if [ -n "$name" ] && (cd "$cache/deb" && apt-get download -qq "$name" >/dev/null 2>&1); then
        dpkg -x "$cache"/deb/linux-image-*.deb "$cache/root"
        cp "$cache"/root/boot/vmlinuz-* "$cache/vmlinuz"
    else
        echo "setup: no guest kernel to be had; tests with real guests cannot run" >&2
    fi
    rm -rf "$cache/deb"
fi

# The guest agent likewise: installed, it would be a service of this machine.
if [ "$what" = test ] && [ ! -e "$cache/agent/usr/sbin/qemu-ga" ] &&
    command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
    mkdir -p "$cache/agent/deb"
    [ "${root[0]:-}" = no ] || "${root[@]}" apt-get update -qq >/dev/null || true
    if (cd "$cache/agent/deb" && apt-get download -qq qemu-guest-agent >/dev/null 2>&1); then
        dpkg -x "$cache"/agent/deb/qemu-guest-agent_*.deb "$cache/agent"
    else
        echo "setup: no guest agent to be had; quiesced snapshots cannot be tested" >&2
    fi
    rm -rf "$cache/agent/deb"
fi

python=${PYTHON:-python3}
if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv"
fi
stamp=$venv/.installed-$what
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    extra=
    [ "$what" = test ] && extra="[dev]"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -e ".$extra"
    touch "$stamp"
fi
