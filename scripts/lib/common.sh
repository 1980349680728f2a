# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# What every script of the testbed knows: where the tree and the cache are, and
# under which key each cached thing lies. Sourced, never run.

set -euo pipefail

TREE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
CACHE=${RKVM_CACHE:-${HOME:-/root}/.cache/rkvm}
export RKVM_CACHE=$CACHE

# shellcheck source=scripts/versions
. "$TREE/scripts/versions"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# key NAME PATTERN...: NAME and a hash of what the files say (patterns are
# relative to the tree's top).
key() {
	local name=$1
	shift
	# shellcheck disable=SC2048,SC2086
	printf '%s-%s\n' "$name" "$(cd "$TREE" && { cat $* && printf %s "${KEY_EXTRA:-}"; } |
		sha256sum | cut -c1-12)"
}

root_key() { KEY_EXTRA=$DEBIAN_SUITE key root scripts/root.packages scripts/lib/root.sh; }

# bochs_key [bochs|bochs-debug]
bochs_key() { KEY_EXTRA=$BOCHS_SHA256 key "${1:-bochs}" scripts/lib/bochs.sh 'scripts/bochs/*'; }

# A tree or tarball named by the environment is another source than ours.
source_key() {
	local KEY_EXTRA="$KERNEL_PACKAGE $KERNEL_PACKAGE_VERSION"
	if [ -n "${RKVM_KERNEL_SOURCE:-}" ]; then
		KEY_EXTRA="$RKVM_KERNEL_SOURCE $(stat -c '%s %Y' "$RKVM_KERNEL_SOURCE")"
	fi
	key linux scripts/lib/source.sh 'scripts/kernel/*.patch'
}

# kernel_key FLAVOUR; a flavour's key does not follow the others' fragments, nor
# every change of the root's packages: the toolchain is the suite's.
kernel_key() {
	local KEY_EXTRA fragments=scripts/kernel/plain.config
	[ "$1" = plain ] || fragments+=" scripts/kernel/$1.config"
	KEY_EXTRA="$(source_key) $DEBIAN_SUITE"
	key "kernel-$1" scripts/lib/kernel.sh "$fragments"
}

# Taken from the build root.
qemu_key() { KEY_EXTRA=$(root_key) key qemu scripts/lib/qemu.sh; }

guest_key() { KEY_EXTRA=$DEBIAN_SUITE key guest scripts/lib/guest.sh; }

# 32-bit kernels for guests; each has a fragment in scripts/guest32.
GUEST32_FLAVOURS='pae nopae'
guest32_key() {
	local KEY_EXTRA
	KEY_EXTRA="$(source_key) $DEBIAN_SUITE"
	key guest32 scripts/lib/guest32.sh 'scripts/guest32/*'
}

kselftests_key() {
	local KEY_EXTRA
	KEY_EXTRA="$(source_key) $DEBIAN_SUITE"
	key kselftests scripts/lib/kselftests.sh
}

# kernel_dir FLAVOUR: where modules for that kernel are built against.
kernel_dir() { printf '%s\n' "$CACHE/$(kernel_key "$1")/build"; }

# testbed_env: tell the scripts that run in the build root what lies where.
testbed_env() {
	RKVM_ENV="RKVM_BOCHS=$CACHE/$(bochs_key) RKVM_KERNEL_PLAIN=$CACHE/$(kernel_key plain)"
	RKVM_ENV+=" RKVM_KERNEL_DEBUG=$CACHE/$(kernel_key debug) RKVM_GUEST=$CACHE/$(guest_key)"
	RKVM_ENV+=" RKVM_BOCHS_DEBUG=$CACHE/$(bochs_key bochs-debug)"
	RKVM_ENV+=" RKVM_KSELFTESTS=$CACHE/$(kselftests_key) RKVM_QEMU=$CACHE/$(qemu_key)"
	RKVM_ENV+=" RKVM_GUEST32=$CACHE/$(guest32_key)"
	export RKVM_ENV
}
