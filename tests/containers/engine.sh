#!/usr/bin/env bash
# Run a command with a Docker engine and the base image, on a plain Debian as root. An engine that
# was not there before is stopped after it.
set -euo pipefail

base=debian:bookworm-slim

main() {
    if ! command -v dockerd >/dev/null || ! command -v docker-compose >/dev/null; then
        apt-get update -qq
        apt-get install -y -qq docker.io docker-compose
    fi
    docker info >/dev/null 2>&1 || start_engine
    docker image inspect "$base" >/dev/null 2>&1 || docker pull --quiet "$base" || make_base
    "$@"
}

start_engine() {
    # A session of its own: Ctrl-C ends the command, and the command ends its containers.
    setsid dockerd --storage-driver=vfs >/var/log/dockerd.log 2>&1 &
    local engine=$!
    trap "kill $engine; wait $engine" EXIT
    for _ in $(seq 60); do docker info >/dev/null 2>&1 && return; sleep 1; done
    echo 'The Docker engine does not answer; see /var/log/dockerd.log' >&2
    exit 1
}

# No image registry: the base from Debian's packages, with this machine's package settings.
make_base() {
    command -v debootstrap >/dev/null || apt-get install -y -qq debootstrap
    local root mirror
    root=$(mktemp -d)
    chmod 755 "$root"  # every user of a container must reach what lies in it
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' | head -1)
    debootstrap --variant=minbase bookworm "$root" "$mirror"
    rm -f "$root"/etc/apt/sources.list "$root"/var/cache/apt/archives/*.deb
    cp -r /etc/apt/sources.list* "$root/etc/apt/"
    if [ -e /etc/ssl/certs/ca-certificates.crt ]; then
        cp /etc/ssl/certs/ca-certificates.crt "$root/etc/machine-ca.crt"
        printf '[global]\ncert = /etc/machine-ca.crt\n' >"$root/etc/pip.conf"
    fi
    tar -C "$root" -c . | docker import - "$base"
    rm -rf "$root"
}

main "$@"
