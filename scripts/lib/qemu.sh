# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# QEMU to run inside the emulated machine: the build root's own, with all that it
# needs to start there. Sourced by scripts/setup.

# What QEMU loads of firmware: SeaBIOS, the VGA BIOS, option ROMs of -kernel.
QEMU_FIRMWARE='bios-256k.bin bios-microvm.bin vgabios-stdvga.bin kvmvapic.bin linuxboot.bin
	linuxboot_dma.bin multiboot.bin multiboot_dma.bin pvh.bin'

# stage_qemu DIR: DIR/qemu-system-x86_64 and DIR/qemu-img are scripts that start
# the programs in DIR/lib with the libraries beside them, wherever DIR comes to lie.
stage_qemu() {
	local dir=$1 program
	mkdir -p "$dir/lib" "$dir/firmware"
	# The root has no qemu-img: it comes with tools which nothing else needs.
	(cd "$dir" && apt_in_root deb "$DEBIAN_SUITE" apt-get download qemu-utils)
	"$TREE/scripts/in-root" bash -euc 'cd "$1"
		dpkg-deb --fsys-tarfile ./*.deb | tar -x ./usr/bin/qemu-img
		mv usr/bin/qemu-img lib
		rm -rf usr ./*.deb
		cp /usr/bin/qemu-system-x86_64 lib
		ldd lib/qemu-system-x86_64 lib/qemu-img >libraries
		! grep "not found" libraries
		grep -o "/[^ ]* (0x" libraries | sed "s/ (0x//" | sort -u | xargs cp -L -t lib
		rm libraries
		for file in $2; do
			cp -L "$(ls /usr/share/{qemu,seabios}/"$file" 2>/dev/null | head -n 1)" firmware
		done
		lib/qemu-system-x86_64 --version >version' qemu "$dir" "$(echo $QEMU_FIRMWARE)"
	for program in qemu-system-x86_64 qemu-img; do
		cat >"$dir/$program" <<-EOT
			#!/bin/sh
			dir=\$(cd "\$(dirname "\$0")" && pwd)
			exec "\$dir/lib/ld-linux-x86-64.so.2" --library-path "\$dir/lib" --argv0 "\$0" \\
				"\$dir/lib/$program" "\$@"
		EOT
	done
	sed -i 's|"\$@"$|-L "$dir/firmware" "$@"|' "$dir/qemu-system-x86_64"
	chmod +x "$dir"/qemu-*
}
