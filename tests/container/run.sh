#!/usr/bin/env bash
# Run the demo in the built image as the strictest host would: no network, root file system and input
# read-only, a user that the image does not know. Outputs must be his.
#
#   tests/container/run.sh IMAGE DEMO_DATASET OUT_DIR
#
# Needs root, buildah and unshare (util-linux); no daemon and no container runtime: the image is
# mounted, made read-only and entered with chroot in its own network, mount and process name spaces.
set -euo pipefail
[ $# = 3 ] || { echo "usage: $0 IMAGE DEMO_DATASET OUT_DIR" >&2; exit 64; }
image=$1 uid=${UID_INSIDE:-12345} gid=${GID_INSIDE:-23456}
bids=$(realpath "$2")
mkdir -p "$3"
out=$(realpath "$3")
chown "$uid:$gid" "$out"

container=$(buildah from --pull-never "$image")
trap 'buildah umount "$container" >/dev/null; buildah rm "$container" >/dev/null' EXIT
root=$(buildah mount "$container")
mkdir -p "$root/bids" "$root/out"
mapfile -t entry < <(buildah inspect --format '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' \
  "$container" | sed '/^$/d')
mapfile -t variables < <(buildah inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' \
  "$container" | sed '/^$/d')

command=(env -i "${variables[@]}" chroot --userspec="$uid:$gid" "$root" "${entry[@]}"
  /bids /out participant --device cpu --offline ${OPTIONS:-})
export root bids out
unshare --net --mount --pid --fork -- bash -euc '
  mount --make-rprivate /
  mount --bind "$root" "$root"
  mount --bind "$bids" "$root/bids"
  mount -o remount,bind,ro "$root/bids"
  mount --bind "$out" "$root/out"
  mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
  mount -t proc proc "$root/proc"
  for device in null zero urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
  done
  mount -o remount,bind,ro "$root"
  for place in "$root" "$root/bids"; do
    if touch "$place/probe" 2>/dev/null; then echo "$place is not read-only" >&2; exit 1; fi
  done
  exec "$@"
' bash "${command[@]}"

if find "$out" ! -user "$uid" -print -quit | grep -q .; then
  echo "some outputs are not of user $uid:" >&2
  find "$out" ! -user "$uid" >&2
  exit 1
fi
find "$out" -type f | sort
