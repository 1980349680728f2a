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
	# shellcheck disable=SC2086,SC2048
	printf '%s-%s\n' "$name" "$(cd "$TREE" && sha256sum $* | sha256sum | cut -c1-12)"
}

root_key() { key root scripts/root.packages; }
bochs_key() { key bochs scripts/lib/bochs.sh 'scripts/bochs/*'; }
# The kernel's key does not follow the other flavour's fragment.
kernel_key() {
	local fragments=scripts/kernel/plain.config
	[ "$1" = plain ] || fragments+=" scripts/kernel/$1.config"
	key "kernel-$1" scripts/versions scripts/lib/kernel.sh "$fragments" 'scripts/kernel/*.patch'
}
