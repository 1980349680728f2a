# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# The build root: a minimal Debian with the packages of root.packages, whose
# tools fit the kernel, whatever the host has. Sourced by scripts/setup.

# What the steps need of the host. All else is the build root's.
host_tools() {
	local missing=() tool
	for tool in mmdebstrap flock unshare chroot tar sha256sum; do
		command -v "$tool" >/dev/null || missing+=("$tool")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	# All but mmdebstrap are essential in Debian.
	if [ "${missing[*]}" = mmdebstrap ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		apt-get update
		DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends mmdebstrap
		return
	fi
	say "missing on this machine: ${missing[*]}"
	say "the testbed works on Debian 12 and 13 as root; elsewhere install these by hand"
	return 1
}

build_root() { # DIR
	local packages
	packages=$(sed 's/#.*//' "$TREE/scripts/root.packages" | xargs | tr ' ' ,)
	mmdebstrap --variant=minbase --include="$packages" "$DEBIAN_SUITE" "$1"
}
