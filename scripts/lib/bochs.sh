# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# The emulator, from Debian's orig tarball with the patches in scripts/bochs/.
# Sourced by scripts/setup.

# fetch_bochs DIR: the tarball, as DIR/bochs.tar.xz.
fetch_bochs() {
	local uri
	uri=$(apt_in_root deb-src "$DEBIAN_SUITE" apt-get source --print-uris bochs |
		sed -n "s/^'\([^']*\.orig\.tar\.xz\)'.*/\1/p")
	[ -n "$uri" ] || { say "the archive names no source of bochs"; return 1; }
	"$TREE/scripts/in-root" /usr/lib/apt/apt-helper -o APT::Sandbox::User=root \
		download-file "$uri" "$1/bochs.tar.xz" "SHA256:$BOCHS_SHA256"
}

# build_bochs KIND DIR: KIND is bochs, or bochs-debug with its debugger.
build_bochs() {
	local kind=$1 dir=$2
	mkdir -p "$dir/src"
	fetch_bochs "$dir"
	# shellcheck disable=SC2016
	"$TREE/scripts/in-root" bash -euc '
		kind=$1 dir=$2 tree=$3
		cd "$dir/src"
		tar -xf ../bochs.tar.xz --strip-components=1
		for p in "$tree"/scripts/bochs/*.patch; do
			echo "$p"
			patch -p1 <"$p"
		done
		speed=--enable-all-optimizations
		[ "$kind" = bochs ] || speed="--enable-debugger --disable-debugger-gui --enable-readline=no"
		CFLAGS="-O2 -pipe" CXXFLAGS="-O2 -pipe" ./configure --with-nogui \
			--disable-plugins --disable-docbook $speed \
			--enable-smp --enable-x86-64 --enable-vmx=2 --enable-svm --enable-avx \
			--enable-evex --enable-cet --enable-pci --enable-monitor-mwait \
			--enable-long-phy-address --enable-memtype --enable-protection-keys \
			--enable-fpu --enable-cpu-level=6
		make -s -j"$(nproc)" bochs
		strip -o ../bochs bochs
		cd ..
		as --32 -o bootrom.o "$tree/scripts/bochs/bootrom.S"
		ld -m elf_i386 -Ttext 0 --oformat binary -o bootrom.bin bootrom.o
		[ "$(stat -c %s bootrom.bin)" = 512 ]
		rm -rf src bochs.tar.xz bootrom.o
	' bochs "$kind" "$dir" "$TREE"
}
