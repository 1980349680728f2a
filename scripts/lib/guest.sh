# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# A distribution's stock kernel, as packaged, for the guest tests. Sourced by
# scripts/setup.

# fetch_guest DIR: DIR/vmlinuz, DIR/version, and in DIR/modules those drivers of
# the sample VMM's devices which are modules, unpacked.
fetch_guest() {
	local dir=$1
	mkdir -p "$dir"
	(
		cd "$dir"
		# The package that the release's metapackage depends on.
		package=$(apt_in_root deb "$DEBIAN_SUITE" apt-cache depends "$GUEST_KERNEL_PACKAGE" |
			sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' | head -n 1)
		[ -n "$package" ] || { say "the archive has no $GUEST_KERNEL_PACKAGE"; exit 1; }
		apt_in_root deb "$DEBIAN_SUITE" apt-get download "$package"
		"$TREE/scripts/in-root" bash -euc 'cd "$1"
			dpkg-deb --fsys-tarfile ./*.deb | tar -x --wildcards "./boot/vmlinuz-*" \
				"*/virtio_mmio.ko*" "*/virtio_blk.ko*" "*/virtio-rng.ko*" \
				"*/virtio_net.ko*" "*/net_failover.ko*" "*/failover.ko*"
			ls boot | sed s/vmlinuz-// >version
			mv boot/vmlinuz-* vmlinuz
			mkdir modules
			find . -name "*.ko*" -exec mv -t modules {} +
			find modules -name "*.xz" -exec xz -d {} +
			rm -rf boot usr lib ./*.deb' guest "$dir"
	)
}
