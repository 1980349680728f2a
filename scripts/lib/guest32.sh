# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# 32-bit kernels for guests, from the test kernel's source, of which it is only
# read. Sourced by scripts/setup.

# build_guest32 DIR: DIR/FLAVOUR/bzImage, for each of GUEST32_FLAVOURS.
build_guest32() {
	# shellcheck disable=SC2016
	"$TREE/scripts/in-root" bash -euc '
		src=$1 configs=$2 dir=$3
		shift 3
		export KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=rkvm KBUILD_BUILD_HOST=testbed
		for flavour; do
			out=$dir/build-$flavour
			fragments="$configs/guest.config $configs/$flavour.config"
			mkdir -p "$out" "$dir/$flavour"
			cd "$src"
			# Nothing is there that is not asked for: a default is not enough.
			cat kernel/configs/{tiny-base,tiny}.config $fragments >"$out/all"
			make -s LLVM=1 ARCH=i386 O="$out" KCONFIG_ALLCONFIG="$out/all" allnoconfig
			bad=0
			while IFS== read -r option value; do
				have=$(sed -n "s/^$option=//p" "$out/.config")
				[ "${have:-n}" = "$value" ] || { echo "$option is ${have:-n}, not $value"; bad=1; }
			done < <(grep -h ^CONFIG_ $fragments)
			[ $bad = 0 ] || exit 1
			make LLVM=1 ARCH=i386 O="$out" -j"$(nproc)" bzImage
			cp "$out/arch/x86/boot/bzImage" "$dir/$flavour/bzImage"
			rm -rf "$out"
		done
	' guest32 "$CACHE/$(source_key)" "$TREE/scripts/guest32" "$1" $GUEST32_FLAVOURS
}
