#!/usr/bin/env bash
# `make test` and `make serve` on a machine with nothing but Python, git, make and a C library: a root
# file system made by debootstrap. A release runs it, as root on Debian 12: tests/system/fresh_machine.sh
# With the argument `serve` it leaves the tests out.
# It clones the last commit of this checkout and takes this machine's settings of apt and pip.
set -euo pipefail

checkout=$(cd "$(dirname "$0")/../.." && pwd)
root=$(mktemp -d)
mounted=()

main() {
    command -v debootstrap >/dev/null || { apt-get update -qq; apt-get install -y -qq debootstrap; }
    trap clean EXIT
    make_root
    take_settings
    for folder in /proc /sys /dev /dev/pts /dev/shm; do bind "$folder"; done
    git clone --quiet "$checkout" "$root/root/halimede"
    [ "${1:-}" = serve ] || inside make --no-print-directory test
    serve
}

make_root() {
    local mirror program
    chmod 755 "$root"
    mount --bind "$root" "$root"  # so that it is a file system's root, as a machine's is
    mount --make-private "$root"
    mounted=("$root")
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' | head -1)
    debootstrap --variant=minbase --include=python3,git,make,ca-certificates bookworm "$root" "$mirror" >/dev/null
    for program in curl redis-server promtool faketime chromium; do
        [ ! -e "$root/usr/bin/$program" ] || { echo "$program is there already" >&2; exit 1; }
    done
}

# Of apt and pip, with the folders of packages that pip's settings name.
take_settings() {
    local folder
    rm -f "$root/etc/apt/sources.list"
    cp -r /etc/apt/sources.list* "$root/etc/apt/"
    cp /etc/resolv.conf /etc/hosts "$root/etc/"
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    for folder in /etc/pip.conf /etc/xdg/pip; do
        if [ -e "$folder" ]; then mkdir -p "$root/etc/xdg"; cp -r "$folder" "$root$folder"; fi
    done
    if [ -d "$HOME/.config/pip" ]; then mkdir -p "$root/root/.config"; cp -r "$HOME/.config/pip" "$root/root/.config/"; fi
    for folder in $(python3 -m pip config list | grep -oE "['/ ]/opt/[A-Za-z0-9_-]+" | grep -oE '/opt/.*' | sort -u); do
        if [ -d "$folder" ]; then bind "$folder"; fi
    done
}

bind() {
    mkdir -p "$root$1"
    mount --bind "$1" "$root$1"
    mounted=("$root$1" "${mounted[@]}")
}

# A command in the clone, on the new machine.
inside() {
    mapfile -t settings < <(env | grep '^PIP_')
    chroot "$root" env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 CI=true \
        "${settings[@]}" env --chdir=/root/halimede "$@"
}

# `make serve` on a clone without environment and models, until it has printed a vector.
serve() {
    local log="$root/root/serve.log" began=$SECONDS
    rm -rf "$root/root/halimede"
    git clone --quiet "$checkout" "$root/root/halimede"
    inside make --no-print-directory serve >"$log" 2>&1 &
    until grep -q 'Ctrl-C stops it' "$log"; do
        kill -0 $! || { cat "$log"; exit 1; }
        sleep 1
    done
    cat "$log"
    echo "make serve: ready after $((SECONDS - began)) s"
    pkill -TERM -f 'bin/halimede serve'
    wait $!
}

clean() {
    local place
    for place in "${mounted[@]}"; do umount --lazy "$place"; done
    rm -rf --one-file-system "$root"
}

main "$@"
