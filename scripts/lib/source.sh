# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Fetching from Debian's archive and unpacking the kernel's source. Sourced by
# scripts/setup. The archive's address is the one that the build root has.

# apt_in_root KIND SUITE COMMAND...: run an apt COMMAND in the build root over
# KIND (deb or deb-src) lists of SUITE, which the root itself does not use.
apt_in_root() {
	local lists=$CACHE/apt/$1-$2
	mkdir -p "$lists/lists/partial"
	# shellcheck disable=SC2016
	"$TREE/scripts/in-root" bash -euc '
		kind=$1 suite=$2 lists=$3
		shift 3
		mirror=$(awk "\$1 == \"deb\" { print \$2; exit }" /etc/apt/sources.list)
		echo "$kind $mirror $suite main" >"$lists/sources.list"
		options="-o Dir::Etc::sourcelist=$lists/sources.list -o Dir::Etc::sourceparts=/dev/null
			-o Dir::State::lists=$lists/lists -o APT::Sandbox::User=root"
		[ -n "$(find "$lists/lists" -name "*_InRelease" -mmin -60)" ] || apt-get $options update
		command=$1
		shift
		$command $options "$@"
	' apt "$1" "$2" "$lists" "${@:3}"
}

# check_sha256 FILE HASH
check_sha256() {
	echo "$2  $1" | sha256sum --check --quiet - >&2
}

# fetch_kernel_package DIR: the package that scripts/versions names or, when the
# archive has moved on, its successor, for which apt's signature vouches.
fetch_kernel_package() {
	local suite=$DEBIAN_SUITE-backports
	cd "$1"
	if apt_in_root deb "$suite" apt-get download "$KERNEL_PACKAGE=$KERNEL_PACKAGE_VERSION"; then
		check_sha256 "$(echo "$KERNEL_PACKAGE"_*.deb)" "$KERNEL_PACKAGE_SHA256"
		return
	fi
	say "$KERNEL_PACKAGE $KERNEL_PACKAGE_VERSION has left the archive; taking what is there now"
	if apt_in_root deb "$suite" apt-get download "$KERNEL_PACKAGE"; then
		say "taken: $(echo "$KERNEL_PACKAGE"_*.deb)"
		return
	fi
	say "the archive has no $KERNEL_PACKAGE at all: name a tree or a tarball of Linux 7.2 in" \
		"RKVM_KERNEL_SOURCE"
	return 1
}

# unpack_kernel DIR: the patched source in DIR.
unpack_kernel() {
	local dir=$1 patch from=${RKVM_KERNEL_SOURCE:-}
	mkdir -p "$dir"
	if [ -d "$from" ]; then
		cp -a "$from/." "$dir"
	elif [ -n "$from" ]; then
		tar -xf "$from" -C "$dir" --strip-components=1
	else
		local package=$dir.package
		rm -rf "$package"
		mkdir -p "$package"
		(fetch_kernel_package "$package")
		"$TREE/scripts/in-root" bash -euc 'dpkg-deb --fsys-tarfile "$1"/*.deb |
			tar -x -C "$1" --wildcards "./usr/src/*.tar.xz"
			tar -xf "$1"/usr/src/*.tar.xz -C "$2" --strip-components=1' \
			unpack "$package" "$dir"
		rm -rf "$package"
	fi
	for patch in "$TREE"/scripts/kernel/*.patch; do
		# A tree of one's own may have the patch already.
		"$TREE/scripts/in-root" bash -euc 'cd "$1"
			if patch -p1 -R --dry-run --force <"$2" >/dev/null 2>&1; then exit 0; fi
			patch -p1 --forward <"$2"' patch "$dir" "$patch"
	done
}
