#!/usr/bin/env bash
# `make test` and `make serve` on a machine with nothing but Python, git, make and a C library: a root
# file system made by debootstrap. A release runs it, as root on Debian: tests/system/fresh_machine.sh
# It takes the last commit of this checkout, and this machine's settings of apt and pip.
set -euo pipefail

checkout=$(cd "$(dirname "$0")/../.." && pwd)
root=$(mktemp -d)
chmod 755 "$root"
mounted=()

main() {
    command -v debootstrap >/dev/null || { apt-get update -qq; apt-get install -y -qq debootstrap; }
    trap clean EXIT
    make_root
    take_settings
    bind /proc /sys /dev /dev/pts /dev/shm
    mount -t tmpfs tmpfs "$root/tmp"
    git clone --quiet "$checkout" "$root/root/halimede"
    inside make --no-print-directory test
    serve
}

make_root() {
    local mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' | head -1)
    debootstrap --variant=minbase --include=python3,git,make,ca-certificates bookworm "$root" "$mirror" >/dev/null
    for program in curl redis-server promtool faketime chromium; do
        [ ! -e "$root/usr/bin/$program" ] || { echo "$program is there already" >&2; exit 1; }
    done
}

take_settings() {
    rm -f "$root/etc/apt/sources.list"
    cp -r /etc/apt/sources.list* "$root/etc/apt/"
    cp /etc/resolv.conf /etc/hosts "$root/etc/" 2>/dev/null || true
    if [ -e /etc/ssl/certs/ca-certificates.crt ]; then
        cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    fi
    for file in /etc/pip.conf "$HOME/.config/pip/pip.conf" /etc/xdg/pip/pip.conf; do
        [ ! -e "$file" ] || install -D "$file" "$root/${file/#$HOME//root}"
    done
    # Folders of packages that pip's settings name.
    local folder
    for folder in $(python3 -m pip config list | grep -oE '(^|[^:/])(file://)?/[A-Za-z0-9_-]+/[A-Za-z0-9_-]+' \
            | grep -oE '/[A-Za-z0-9_-]+/[A-Za-z0-9_-]+$' | sort -u); do
        [ ! -d "$folder" ] || bind "$folder"
    done
}

bind() {
    local folder
    for folder in "$@"; do
        mkdir -p "$root$folder"
        mount --bind "$folder" "$root$folder"
        mounted+=("$root$folder")
    done
}

inside() {
    chroot "$root" env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 CI="${CI:-}" \
        $(env | grep '^PIP_' || true) "${in_environment[@]}" sh -c 'cd /root/halimede && exec "$@"' sh "$@"
}
in_environment=()

# Until the sample's vector is printed, then Ctrl-C.
serve() {
    local log="$root/tmp/serve.log" began=$SECONDS
    rm -rf "$root"/root/halimede/{.venv,.halimede} "$root"/root/halimede/model_repository/*/[0-9]*
    inside make --no-print-directory serve >"$log" 2>&1 &
    until grep -q 'Ctrl-C stops it' "$log"; do
        kill -0 $! 2>/dev/null || { cat "$log"; exit 1; }
        sleep 1
    done
    cat "$log"
    echo "make serve: ready after $((SECONDS - began)) s"
    pkill -INT -f 'halimede serve'
    wait $! || true
}

clean() {
    umount "$root/tmp" 2>/dev/null || true
    local place
    for ((place = ${#mounted[@]} - 1; place >= 0; place--)); do umount "${mounted[$place]}" || umount -l "${mounted[$place]}"; done
    rm -rf --one-file-system "$root"
}

main "$@"
