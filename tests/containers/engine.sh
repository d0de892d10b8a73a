#!/usr/bin/env bash
# A Docker engine and the base image for `make test-containers`, on a plain Debian as root.
set -euo pipefail

base=debian:bookworm-slim
if ! command -v dockerd >/dev/null || ! command -v docker-compose >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq docker.io docker-compose
fi
if ! docker info >/dev/null 2>&1; then
    setsid dockerd --storage-driver=vfs >/var/log/dockerd.log 2>&1 &
    for _ in $(seq 60); do docker info >/dev/null 2>&1 && break; sleep 1; done
fi
docker image inspect "$base" >/dev/null 2>&1 || docker pull --quiet "$base" && exit
# No image registry: make the base from Debian's packages, with this machine's package settings.
command -v debootstrap >/dev/null || apt-get install -y -qq debootstrap
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' | head -1)
debootstrap --variant=minbase bookworm "$root" "$mirror"
rm -f "$root"/etc/apt/sources.list "$root"/var/cache/apt/archives/*.deb
cp -r /etc/apt/sources.list* "$root/etc/apt/"
if [ -e /etc/ssl/certs/ca-certificates.crt ]; then
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/machine-ca.crt"
    printf '[global]\ncert = /etc/machine-ca.crt\n' >"$root/etc/pip.conf"
fi
tar -C "$root" -c . | docker import - "$base"
