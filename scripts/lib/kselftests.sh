# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# The kernel's own KVM selftests, from the test kernel's source, unmodified.
# Sourced by scripts/setup.

# build_kselftests DIR: the programs, static, as DIR/bin/PROGRAM and
# DIR/bin/x86/PROGRAM. The kernel's source is only read: the makefiles write
# beside what they build, so they get a copy of the parts that they reach.
build_kselftests() {
	# shellcheck disable=SC2016
	"$TREE/scripts/in-root" bash -euc '
		src=$1 dir=$2
		mkdir -p "$dir/src" "$dir/bin/x86"
		cd "$src"
		make -s O="$dir/headers" ARCH=x86 INSTALL_HDR_PATH="$dir/src/usr" headers_install
		cp -a --parents -t "$dir/src" scripts/subarch.include \
			tools/{arch/x86,build,include,lib,scripts} tools/testing/selftests/{lib.mk,*.h} \
			tools/testing/selftests/{cgroup,clone3,kvm,rseq}
		cd "$dir/src/tools/testing/selftests/kvm"
		make -s -j"$(nproc)" ARCH=x86 OUTPUT="$dir/obj" LDFLAGS=-static
		cd "$dir/obj"
		find . -type f -executable -exec strip -o "$dir/bin/{}" {} \;
		rm -rf "$dir/src" "$dir/obj" "$dir/headers"
	' kselftests "$CACHE/$(source_key)" "$1"
}
