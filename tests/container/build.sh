#!/usr/bin/env bash
# Build the image without a registry and without a daemon: Debian from debootstrap, then buildah.
#
#   tests/container/build.sh [IMAGE]        default: localhost/tlseg
#
# Needs root, buildah and debootstrap. The pip configuration, certificates and local wheels of this
# machine are lent to the build (not to the image). VARIANT, TORCH_INDEX, VERSION and MIRROR may be set;
# NO_CACHE=1 builds every step anew.
set -euo pipefail
image=${1:-localhost/tlseg}
base=localhost/tlseg-debian
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export BUILDAH_ISOLATION=chroot SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-0}

for program in buildah debootstrap; do
  command -v "$program" >/dev/null || { echo "skip: $program is not installed" >&2; exit 77; }
done
[ "$(id -u)" = 0 ] || { echo "skip: debootstrap needs root" >&2; exit 77; }

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm \
    "$folder/base" ${MIRROR:-} >"$folder/log" 2>&1 || { tail -5 "$folder/log" >&2; exit 1; }
  # What an image does not need, and what differs from one day to the next.
  rm -rf "$folder"/base/var/cache/apt/* "$folder"/base/var/lib/apt/lists/* \
    "$folder"/base/var/log/* "$folder"/base/usr/share/doc/* "$folder"/base/usr/share/man/* \
    "$folder"/base/usr/share/locale/* "$folder"/base/var/cache/ldconfig/aux-cache \
    "$folder"/base/etc/machine-id "$folder"/base/etc/hostname "$folder"/base/etc/resolv.conf
  find "$folder/base" -name __pycache__ -prune -exec rm -rf {} +
  container=$(buildah from scratch)
  buildah copy --quiet "$container" "$folder/base" / >/dev/null
  buildah commit --quiet --timestamp "$SOURCE_DATE_EPOCH" "$container" "$base" >/dev/null
  buildah rm "$container" >/dev/null
fi

lent=()
while read -r path; do
  [ -e "$path" ] && lent+=(--volume "$path:$path:ro")
done < <(
  printf '%s\n' /etc/pip.conf /etc/ssl/certs
  python3 -m pip config list 2>/dev/null | grep -oE "(file://)?/[^' \\]+" |
    sed 's,^file://,,; s,/simple$,,' | sort -u | grep -v '^/etc/ssl'
)
user_conf=${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf
[ -e "$user_conf" ] && lent+=(--volume "$user_conf:/root/.config/pip/pip.conf:ro")
echo "lent to the build: ${lent[*]}" >&2

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$root/tlseg_bids/__init__.py")
revision=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)
buildah build --layers ${NO_CACHE:+--no-cache} --timestamp "$SOURCE_DATE_EPOCH" "${lent[@]}" \
  --build-arg BASE="$base" --build-arg VARIANT="${VARIANT:-cpu}" \
  --build-arg TORCH_INDEX="${TORCH_INDEX-}" --build-arg VERSION="${VERSION:-$version}" \
  --build-arg REVISION="$revision" --build-arg SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" \
  --tag "$image" "$root"
